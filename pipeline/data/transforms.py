"""Cropping, scaling and flipping of one image: pure functions of pixels and a random generator."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.data.images import Pixels
from pipeline.data.windows import Window


def recompressed(pixels: Pixels, quality: int) -> Pixels:
    """An image after JPEG compression at that quality."""
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
        # Nothing to reflect
        if (pixels.shape[0] == 1 and height > 1) or (pixels.shape[1] == 1 and width > 1):
            repeat = (
                2 if pixels.shape[0] == 1 and height > 1 else 1,
                2 if pixels.shape[1] == 1 and width > 1 else 1,
                1,
            )
            pixels = np.tile(pixels, repeat)
    return pixels


def spread_crops(pixels: Pixels, size: int, count: int) -> list[Pixels]:
    """Up to `count` windows of (size, size) that do not overlap, evenly spread over the image; one is the center.

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


# Logarithms of the aspects of a random window
_LOWEST, _HIGHEST = math.log(3 / 4), math.log(4 / 3)


def random_window(height: int, width: int, rng: np.random.Generator) -> Window:
    """A window of 8 to 100 % of the area and aspect 3/4 to 4/3.

    Source: Szegedy et al. 2015, as in the MS-ILLM release; after ten failed draws the largest centered square.
    """
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        aspect = math.exp(rng.uniform(_LOWEST, _HIGHEST))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Window(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    side = min(height, width)
    return Window((height - side) // 2, (width - side) // 2, side, side)


def random_scale(height: int, width: int, size: int, share: float, rng: np.random.Generator) -> float:
    """How much an image is scaled down before it is cropped to (size, size): of a `share` of images 1 to 4 times.

    Never so far that it is smaller than the crop.
    """
    if not share or rng.random() >= share:
        return 1.0
    return float(rng.uniform(1, max(1.0, min(4.0, height / size, width / size))))


def random_square(height: int, width: int, side: int, rng: np.random.Generator) -> Window:
    """A random square window, or as much of it as the image has."""
    h, w = min(side, height), min(side, width)
    return Window(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)


def shrink_for(window: Window, size: int) -> int:
    """1, 2, 4 or 8: how much smaller an image may be decoded and still give the window (size, size) pixels or more."""
    return max(shrink for shrink in (1, 2, 4, 8) if shrink == 1 or min(window.height, window.width) >= shrink * size)


def shrunk(window: Window, shrink: int) -> Window:
    """Where the window is in the image at 1 / shrink of its size: all pixels that it touches."""
    top, left = window.top // shrink, window.left // shrink
    bottom, right = -(-(window.top + window.height) // shrink), -(-(window.left + window.width) // shrink)
    return Window(top, left, bottom - top, right - left)


def scaled(pixels: Pixels, size: int) -> Pixels:
    """Scaled bilinearly, and without aliasing, to (size, size)."""
    part = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    # On bytes: several times Pillow's speed
    small = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0).numpy()


def mirrored(pixels: Pixels) -> Pixels:
    """Left and right exchanged."""
    return torch.from_numpy(pixels).flip(1).numpy()


def to_float(pixels: Pixels) -> Tensor:
    """Shapes: pixels (B, H, W, 3) in 0..255; returns (B, 3, H, W) in [0, 1]."""
    return in_unit_range(torch.tensor(pixels).permute(0, 3, 1, 2))


def in_unit_range(x: Tensor) -> Tensor:
    """0..255 as [0, 1], with the same bits on every device.

    A GPU multiplies by the reciprocal of a plain number, which rounds otherwise; it divides by a tensor of its own.
    """
    return x.float().div_(torch.full((), 255.0, device=x.device))
