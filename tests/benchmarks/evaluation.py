"""Images per second by part of an evaluation: the codec, each metric, features of patches, and the conventional codecs.

IMAGES=folder holds photos, of which the middle 768x512 of four are taken; without it they are synthetic.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import Pixels
from pipeline.evaluation import anchors
from pipeline.evaluation.anchors import CLASSICS
from pipeline.evaluation.instruments import Instruments
from pipeline.models import initial
from pipeline.models.codec import Codec, CodecConfig
from tests.benchmarks.measure import Row, seconds
from tests.conftest import REAL_TORCH_HOME, picture

WIDTH, HEIGHT, COUNT = 768, 512, 4
# configs/small
SMALL = CodecConfig(channels=(32, 64, 96, 128, 192), latent_channels=96, hyper_channels=64, num_residual_blocks=3)
# Bytes of a file of 0.3 bits per pixel
TARGET = WIDTH * HEIGHT * 3 // 80


def rows() -> Iterator[Row]:
    # weights where the tests do not look; other groups see none, as before
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_HOME")
        if REAL_TORCH_HOME:
            patch.setenv("TORCH_HOME", REAL_TORCH_HOME)
        yield from measured()


def measured() -> Iterator[Row]:
    images = photos()
    codec = small_codec()
    files = [codec.compress(image) for image in images]
    restored = [codec.decompress(file) for file in files]
    yield rate("evaluate: encode, small codec", codec.compress, images)
    yield rate("evaluate: decode, small codec", codec.decompress, files)
    for name in ("psnr_db", "ms_ssim", "lpips", "dists", "ssimulacra2", "vmaf"):
        tools = Instruments({name})
        known = [tools.original(image) for image in images]
        if tools.of_pair(restored[0], known[0]).get(name) is not None:
            pairs = list(zip(restored, known, strict=True))
            yield rate(f"evaluate: {name}", lambda pair, tools=tools: tools.of_pair(*pair), pairs)
    features = Instruments({"vgg_fd_64", "fid", "fid_64"})
    for kind, found in features._features.items():
        yield rate(f"evaluate: features, {kind}", found.of, images)
    for name, classic in CLASSICS.items():
        if not classic.missing():
            yield rate(
                f"evaluate: {name} at the size of 0.3 bits per pixel, with the search",
                lambda image, c=classic: anchors.encode(image, c, TARGET),
                images[:1],
            )


def rate(name: str, call: Callable[..., object], items: list) -> Row:
    """Of the median item, after one call where there are several."""
    for item in items[1:2]:
        call(item)
    return Row(name, 1 / statistics.median(seconds(lambda item=item: call(item)) for item in items), "images/s")


def photos() -> list[Pixels]:
    if "IMAGES" not in os.environ:
        return [picture(number, HEIGHT, WIDTH) for number in range(COUNT)]
    found = []
    for path in sorted(p for p in Path(os.environ["IMAGES"]).rglob("*") if p.is_file()):
        pixels = np.array(Image.open(path).convert("RGB"))
        top, left = (pixels.shape[0] - HEIGHT) // 2, (pixels.shape[1] - WIDTH) // 2
        if min(top, left) >= 0:
            found.append(np.ascontiguousarray(pixels[top : top + HEIGHT, left : left + WIDTH]))
    return found[:COUNT]


def small_codec() -> ImageCodec:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    initial.he_codec(codec)
    codec.update_tables()
    return ImageCodec(codec.requires_grad_(False).eval())
