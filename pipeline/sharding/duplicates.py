"""Images that look alike: a perceptual hash of 64 bits, and the groups of images whose hashes differ in few of them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import Pixels

_SIDE, _LOW = 32, 8
# Pixels
_BAND = 2**21
# Rows of a DCT-II
_FREQUENCIES = np.cos(np.pi * np.arange(_LOW)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))


def perceptual_hash(pixels: Pixels) -> int:
    """Which of the 64 lowest frequencies of the image, scaled to 32x32 and gray, lie above their median.

    Source: the pHash of Zauner 2010, with the constant term left out of the median.
    """
    small = _gray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    low = (_FREQUENCIES @ np.asarray(small, dtype=np.float64) @ _FREQUENCIES.T).round(6).ravel()
    bits = low > np.median(low[1:])
    return int(np.packbits(bits).view(">u8")[0])


def _gray(pixels: Pixels) -> Image.Image:
    """Made in bands: Pillow takes four bytes for each colored pixel."""
    height, width = pixels.shape[:2]
    gray, rows = Image.new("L", (width, height)), max(1, _BAND // width)
    for top in range(0, height, rows):
        gray.paste(Image.fromarray(pixels[top : top + rows]).convert("L"), (0, top))
    return gray


def groups(hashes: Sequence[int], distance: int) -> list[int]:
    """For each hash, the number of the first one that it is linked to by steps of at most `distance` differing bits.

    Two hashes that differ in at most d of 64 bits agree in at least one of d + 1 parts, so only those are compared.
    """
    values, first, inverse = np.unique(np.asarray(hashes, dtype=np.uint64), return_index=True, return_inverse=True)
    parent = np.arange(len(values))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    bounds = [64 * part // (distance + 1) for part in range(distance + 2)]
    for low, high in pairwise(bounds) if distance else ():
        part = (values >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(part, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            for place, i in enumerate(run[:-1]):
                others = run[place + 1 :]
                for j in others[_differing_bits(values[i], values[others]) <= distance]:
                    a, b = sorted((root(int(i)), root(int(j))), key=lambda k: first[k])
                    parent[b] = a
    return [int(first[root(int(i))]) for i in inverse]


def _differing_bits(one: np.uint64, many: NDArray[np.uint64]) -> NDArray[np.int64]:
    octets = (many ^ one).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1).sum(axis=1, dtype=np.int64)
