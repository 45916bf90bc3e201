"""Decoding, cropping and flipping of one image: pure functions."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import DataError

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
MAX_PIXELS = 2**27  # larger images are refused before they are decoded


@dataclass(frozen=True)
class Decoded:
    """RGB pixels (H, W, 3), and whether an alpha channel was flattened over white."""

    pixels: Pixels
    flattened: bool


def decode(content: bytes | Path) -> Decoded:
    """The first frame of an image file as 8-bit RGB, turned as its EXIF orientation says, alpha laid over white.

    Raises: DataError if it is no image, truncated, or has more than MAX_PIXELS pixels.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(f"{content!s}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        name = f"{content}: " if isinstance(content, Path) else ""
        raise DataError(f"{name}not a readable image ({' '.join(str(error).split())})") from None


def _to_rgb(image: Image.Image) -> Decoded:
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit grey: Pillow's convert() would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        scale = 65535 if image.mode.startswith("I") else max(1.0, float(values.max()))
        grey = np.clip(np.rint(values / scale * 255), 0, 255).astype(np.uint8)
        return Decoded(np.repeat(grey[..., None], 3, axis=2), flattened=False)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        flattened = np.asarray(rgba)[..., 3].min() < 255
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Decoded(np.array(Image.alpha_composite(white, rgba).convert("RGB")), bool(flattened))
    return Decoded(np.array(image.convert("RGB")), flattened=False)


def recompressed(pixels: Pixels, quality: int) -> Pixels:
    """What is left of an image after JPEG at that quality."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=quality)
    with Image.open(stream) as image:
        return np.array(image)


def pad_to(pixels: Pixels, height: int, width: int) -> Pixels:
    """Pads right and bottom to at least (height, width) by reflection, as often as needed."""
    while pixels.shape[0] < height or pixels.shape[1] < width:
        grow_h = min(max(height - pixels.shape[0], 0), max(pixels.shape[0] - 1, 0))
        grow_w = min(max(width - pixels.shape[1], 0), max(pixels.shape[1] - 1, 0))
        if grow_h or grow_w:
            pixels = np.pad(pixels, ((0, grow_h), (0, grow_w), (0, 0)), mode="reflect")
        if (pixels.shape[0] == 1 and height > 1) or (pixels.shape[1] == 1 and width > 1):  # nothing to reflect
            repeat = (
                2 if pixels.shape[0] == 1 and height > 1 else 1,
                2 if pixels.shape[1] == 1 and width > 1 else 1,
                1,
            )
            pixels = np.tile(pixels, repeat)
    return pixels


def spread_crops(pixels: Pixels, size: int, count: int) -> list[Pixels]:
    """Up to `count` windows of (size, size) that do not overlap, evenly spread over the image; one is the centre.

    Two are not opposite corners: those show less than the rest, and a codec's rate on them misleads.
    """
    pixels = pad_to(pixels, size, size)
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    if count == 1:
        rows = columns = 1
    top, left = (pixels.shape[0] - rows * size) // 2, (pixels.shape[1] - columns * size) // 2
    corners = [(top + r * size, left + c * size) for r in range(rows) for c in range(columns)]
    count = min(count, len(corners))
    chosen = [int((i + 0.5) * len(corners) / count) for i in range(count)]
    return [pixels[t : t + size, s : s + size] for t, s in (corners[i] for i in chosen)]


def random_crop(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A random (size, size) window, padded where the image is smaller."""
    pixels = pad_to(pixels, size, size)
    top, left = rng.integers(pixels.shape[0] - size + 1), rng.integers(pixels.shape[1] - size + 1)
    return pixels[top : top + size, left : left + size]


def random_resized_crop(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A window of 8 to 100 % of the area and aspect 3/4 to 4/3, scaled bilinearly to (size, size).

    Source: Szegedy et al. 2015, as in the MS-ILLM release; after ten failed draws the largest centred square.
    """
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            break
    else:
        w = h = min(height, width)
        top, left = (height - h) // 2, (width - w) // 2
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
    return np.asarray(image)
