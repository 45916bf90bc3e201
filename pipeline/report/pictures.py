"""Pictures inside a page: all of them without loss if that fits the page's size, else as AVIF, of fewer images if it has to be."""

import base64
import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import Pixels, image_file
from pipeline.evaluation.metrics import psnr_db

# Larger pictures are cut to their middle: pixels on a side
MAX_SIDE = 1536
# Bytes of a page per byte of a picture, in base64
GROWTH = 4 / 3


@dataclass(frozen=True)
class Coding:
    """How pictures are stored. name: for readers of the page; kind: of the data URI."""

    name: str
    kind: str
    encode: Callable[[Pixels], bytes]


def _webp(pixels: Pixels) -> bytes:
    return image_file(pixels, "WEBP", lossless=True, quality=30)


def _avif(quality: int) -> Coding:
    def at(pixels: Pixels) -> bytes:
        return image_file(pixels, "AVIF", quality=quality, subsampling="4:4:4", speed=8, max_threads=1)

    return Coding(f"AVIF at quality {quality}", "image/avif", at)


# The first whose pictures fit
CODINGS = (Coding("WebP without loss", "image/webp", _webp), *map(_avif, (96, 93, 90, 87, 84, 80)))


@dataclass(frozen=True)
class Pictures:
    """What a page shows. uris: a data URI for each picture of each image; fewer images than were asked for if they did not fit.

    psnr_db: of the worst picture against what it stands for; None if they are without loss. cut: whether some are middles.
    """

    uris: list[list[str]]
    coding: str
    psnr_db: float | None
    cut: bool


def fit(images: Sequence[Sequence[Path]], max_bytes: int) -> Pictures:
    """Pictures of as many images, from the first on, as fit into `max_bytes` of a page, at least one. images: files of each."""
    # they stand for all, so that pictures that will not fit are not all encoded first
    few = [images[number] for number in sorted({0, len(images) // 2, len(images) - 1})]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for coding in CODINGS:
            last = coding is CODINGS[-1]
            sample = _encode_up_to(pool, few, coding, math.inf)
            if not last and _size(sample) / len(few) * len(images) > max_bytes:
                continue
            kept = _encode_up_to(pool, images, coding, max_bytes)
            if len(kept) == len(images):
                break
    uris = [[f"data:{coding.kind};base64,{base64.b64encode(each.content).decode()}" for each in row] for row in kept]
    worst = min(each.psnr_db for row in kept for each in row)
    cut = any(each.cut for row in kept for each in row)
    return Pictures(uris, coding.name, None if math.isinf(worst) else worst, cut)


@dataclass(frozen=True)
class _Encoded:
    """A picture: its bytes, its PSNR in dB against the file's pixels, and whether it is only their middle."""

    content: bytes
    psnr_db: float
    cut: bool


def _encode_up_to(
    pool: ThreadPoolExecutor, images: Sequence[Sequence[Path]], coding: Coding, max_bytes: float
) -> list[list[_Encoded]]:
    """Pictures of the first images, as many as fit, at least of one; what cannot fit is not encoded."""
    kept: list[list[_Encoded]] = []
    for paths in images:
        row = list(pool.map(partial(_encode, coding=coding), paths))
        if kept and _size([*kept, row]) > max_bytes:
            break
        kept.append(row)
    return kept


def _size(rows: Sequence[Sequence[_Encoded]]) -> float:
    """Bytes in a page."""
    return sum(len(each.content) for row in rows for each in row) * GROWTH


def _encode(path: Path, coding: Coding) -> _Encoded:
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    height, width = pixels.shape[:2]
    top, left = max(0, height - MAX_SIDE) // 2, max(0, width - MAX_SIDE) // 2
    middle = np.ascontiguousarray(pixels[top : top + MAX_SIDE, left : left + MAX_SIDE])
    content = coding.encode(middle)
    with Image.open(io.BytesIO(content)) as image:
        loss = psnr_db(np.array(image.convert("RGB")), middle)
    return _Encoded(content, loss, middle.shape != pixels.shape)
