"""JPEG and WebP files of an image at about a given rate, to compare a codec with."""

import io
from typing import Literal

from PIL import Image

from pipeline.data import images
from pipeline.data.images import Pixels

Anchor = Literal["jpeg", "webp"]


def encode(pixels: Pixels, anchor: Anchor, target_bytes: int) -> bytes:
    """The file whose size is nearest to `target_bytes` among qualities 1 to 95."""
    low, high = 1, 95
    # The smallest quality that reaches the target: size grows with quality
    while low < high:
        middle = (low + high) // 2
        if len(_encoded(pixels, anchor, middle)) < target_bytes:
            low = middle + 1
        else:
            high = middle
    candidates = [_encoded(pixels, anchor, quality) for quality in {max(low - 1, 1), low}]
    return min(candidates, key=lambda content: abs(len(content) - target_bytes))


def decode(content: bytes) -> Pixels:
    """The pixels of an anchor's file."""
    return images.decode(content).pixels


def _encoded(pixels: Pixels, anchor: Anchor, quality: int) -> bytes:
    stream = io.BytesIO()
    if anchor == "jpeg":
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality, optimize=True, subsampling="4:2:0")
    else:
        Image.fromarray(pixels).save(stream, "WEBP", quality=quality, method=6)
    return stream.getvalue()
