"""Files of conventional codecs at about a given size, to compare a codec with."""

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.data.images import Pixels, image_file
from pipeline.errors import ConfigError
from pipeline.evaluation import ffmpeg

Anchor = Literal["jpeg", "webp", "avif", "jpegxl", "vvc"]
HOW_TO_GET = "pip install -r requirements/classics.txt"
# Butteraugli distances from 19.9 down to 0.1
JPEGXL_LEVELS = 199
# QP from 63 down to 17; at lower ones this encoder fails where files get larger than their pixels
VVC_LEVELS = 47


@dataclass(frozen=True)
class Classic:
    """A conventional codec.

    encode: takes a level from 0 to `levels` - 1; files grow with it. start: a level of about 0.3 bits per pixel.
    missing: what this machine lacks for it, or "". settings: as reports say it.
    """

    settings: str
    levels: int
    start: int
    encode: Callable[[Pixels, int], bytes]
    decode: Callable[[bytes, Sequence[int]], Pixels]
    missing: Callable[[], str] = lambda: ""


def _jpeg(pixels: Pixels, level: int) -> bytes:
    return image_file(pixels, "JPEG", quality=level + 1, optimize=True, progressive=True, subsampling="4:2:0")


def _webp(pixels: Pixels, level: int) -> bytes:
    return image_file(pixels, "WEBP", quality=level, method=6)


def _avif(pixels: Pixels, level: int) -> bytes:
    return image_file(pixels, "AVIF", quality=level, speed=4, subsampling="4:2:0", max_threads=1)


def _jpegxl(pixels: Pixels, level: int) -> bytes:
    import imagecodecs

    # larger distances halve the image, and then files grow again
    return bytes(imagecodecs.jpegxl_encode(pixels, distance=(JPEGXL_LEVELS - level) / 10, effort=7, numthreads=1))


def _by_imagecodecs(content: bytes, shape: Sequence[int]) -> Pixels:
    import imagecodecs

    return np.array(imagecodecs.jpegxl_decode(content, numthreads=1), np.uint8).reshape(tuple(shape))


def _no_imagecodecs() -> str:
    return "" if find_spec("imagecodecs") else f"the package imagecodecs ({HOW_TO_GET})"


def _no_vvenc() -> str:
    if ffmpeg.has("libvvenc"):
        return ""
    return f"ffmpeg with libvvenc ({HOW_TO_GET})"


def _by_pillow(content: bytes, shape: Sequence[int]) -> Pixels:
    with Image.open(io.BytesIO(content), formats=["JPEG", "WEBP", "AVIF"]) as image:
        return np.array(image.convert("RGB")).reshape(tuple(shape))


CLASSICS: dict[Anchor, Classic] = {
    "jpeg": Classic("libjpeg-turbo, progressive, optimized, 4:2:0", 95, 20, _jpeg, _by_pillow),
    "webp": Classic("libwebp, method 6", 96, 20, _webp, _by_pillow),
    "avif": Classic("libavif with aom, speed 4, 4:2:0", 96, 40, _avif, _by_pillow),
    "jpegxl": Classic("libjxl, effort 7", JPEGXL_LEVELS, 130, _jpegxl, _by_imagecodecs, missing=_no_imagecodecs),
    "vvc": Classic(
        "vvenc, preset medium, intra, 4:2:0, 10 bits",
        VVC_LEVELS,
        29,
        lambda pixels, level: ffmpeg.encode_vvc(pixels, 63 - level),
        ffmpeg.decode_vvc,
        missing=_no_vvenc,
    ),
}


def require(anchors: Sequence[Anchor]) -> None:
    """Raises: ConfigError if this machine lacks what one of them needs."""
    for anchor in anchors:
        if missing := CLASSICS[anchor].missing():
            raise ConfigError(f"anchors: {anchor} needs {missing}; or leave it out")


def encode(pixels: Pixels, classic: Classic, target_bytes: int) -> tuple[bytes, float]:
    """The file whose size is nearest to `target_bytes` among the codec's levels, and the seconds that it took to make it."""
    files: dict[int, bytes] = {}
    seconds: dict[int, float] = {}

    def make(level: int) -> None:
        started = time.perf_counter()
        files[level] = classic.encode(pixels, level)
        seconds[level] = time.perf_counter() - started

    low, high, guess = 0, classic.levels - 1, classic.start
    # the smallest level that reaches the target; between two known sizes, sizes grow about exponentially
    while low < high:
        make(guess)
        if len(files[guess]) < target_bytes:
            low = guess + 1
        else:
            high = guess
        guess = _next_guess(files, low, high, target_bytes)
    for level in {max(low - 1, 0), low} - set(files):
        make(level)
    nearest = min(max(low - 1, 0), low, key=lambda level: abs(len(files[level]) - target_bytes))
    return files[nearest], seconds[nearest]


def _next_guess(files: dict[int, bytes], low: int, high: int, target_bytes: int) -> int:
    """A level in [low, high) that is likely to be next to the wanted one."""
    below = [level for level in files if level < low]
    above = [level for level in files if level >= high]
    guess = (low + high) // 2
    if below and above and len(files) < 6:
        a, b = max(below), min(above)
        size_a, size_b = (math.log(len(files[level])) for level in (a, b))
        if size_b > size_a:
            guess = round(a + (b - a) * (math.log(max(1, target_bytes)) - size_a) / (size_b - size_a))
    elif len(files) < 6:
        # one side is open: a long step to where it may end
        guess = low + 8 if below else high - 8
    return min(max(guess, low), high - 1)
