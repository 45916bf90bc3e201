"""Images that look alike: a perceptual hash of 64 bits, and the groups of images whose hashes differ in few of them."""

from collections.abc import Iterator
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import Pixels

_SIDE, _LOW = 32, 8
# Pixels
_BAND = 2**21
Hashes = NDArray[np.uint64]
Numbers = NDArray[np.uint32]
# Hashes that are sorted at a time, and numbers that are partitioned at a time: bound the memory beside the hashes
_BLOCK, _SLICE = 2**22, 2**20
# Hashes of one key that are compared pair by pair; more of them are divided again
_COMPARED = 512
# Nanoseconds, roughly: to sort one hash, to compare two
_SORTING, _COMPARING = 100, 15
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


def groups(hashes: Hashes, distance: int) -> Numbers:
    """For each hash, the number of the first one that it is linked to by steps of at most `distance` differing bits.

    Divide the bits that vary among some hashes into distance + r parts: two hashes that differ in at most `distance` bits
    agree in at least r of the parts. So for each choice of r parts, hashes are sorted by them, and only those that agree
    are compared. Where many agree, the bits that still vary among these are divided in the same way.

    Source: Manku, Jain and Das Sarma 2007, section 3.
    """
    parent = np.arange(len(hashes), dtype=np.uint32)
    numbers = parent.copy()
    for block in _blocks(hashes, numbers, np.uint64(2**64 - 1)):
        chosen, starts, _ = _runs(hashes[block], block)
        parent[chosen] = np.repeat(chosen[starts], np.diff(starts, append=len(chosen)))
    _link(hashes, numbers[parent == numbers], distance, parent)
    return _roots(parent, numbers)


def _link(hashes: Hashes, numbers: Numbers, distance: int, parent: Numbers) -> None:
    """Links those of the given hashes, all different, that differ in at most `distance` bits."""
    if len(numbers) < 2 or not distance:
        return
    varying = _varying(hashes, numbers)
    for mask in _masks(varying, distance, len(numbers)):
        for block in _blocks(hashes, numbers, mask):
            _link_equal(hashes, block, mask, varying & ~mask, distance, parent)
        roots = _roots(parent, numbers)
        if (roots == roots[0]).all():
            return


def _link_equal(
    hashes: Hashes, numbers: Numbers, mask: np.uint64, free: np.uint64, distance: int, parent: Numbers
) -> None:
    """Likewise for those that are equal under `mask`, and so may differ in the bits of `free`."""
    numbers, starts, lengths = _runs(hashes[numbers] & mask, numbers)
    several = lengths > 1
    numbers, lengths = numbers[np.repeat(several, lengths)], lengths[several]
    if not len(numbers):
        return
    starts = np.cumsum(lengths) - lengths
    roots = _roots(parent, numbers)
    # What is in one group already needs no comparison
    several = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
    numbers, lengths = numbers[np.repeat(several, lengths)], lengths[several]
    starts = np.cumsum(lengths) - lengths
    if int(free).bit_count() <= distance:
        _unite(parent, numbers, np.repeat(numbers[starts], lengths))
        return
    for start, length in zip(starts[lengths > _COMPARED], lengths[lengths > _COMPARED], strict=True):
        _link(hashes, numbers[start : start + length], distance, parent)
    few = lengths <= _COMPARED
    numbers, lengths = numbers[np.repeat(few, lengths)], lengths[few]
    ends = np.repeat(np.cumsum(lengths), lengths)
    values, at = hashes[numbers], np.arange(len(numbers))
    for step in range(1, int(lengths.max(initial=0))):
        at = at[at + step < ends[at]]
        near = at[_bit_count(values[at] ^ values[at + step]) <= distance]
        _unite(parent, numbers[near], numbers[near + step])


def _masks(varying: np.uint64, distance: int, count: int) -> Iterator[np.uint64]:
    """The choices of parts of the varying bits under which `count` hashes are compared, as many as is the least work."""
    bits = [bit for bit in range(64) if int(varying) >> bit & 1]
    if len(bits) <= distance:
        yield np.uint64(0)
        return

    def work(r: int) -> float:
        pairs = count / 2 / 2 ** (len(bits) * r / (distance + r))
        return comb(distance + r, r) * (_SORTING + _COMPARING * pairs)

    r = min(range(1, len(bits) - distance + 1), key=work)
    parts = [sum(1 << bit for bit in bits[first :: distance + r]) for first in range(distance + r)]
    for chosen in combinations(parts, r):
        yield np.uint64(sum(chosen))


def _blocks(hashes: Hashes, numbers: Numbers, mask: np.uint64) -> Iterator[Numbers]:
    """The numbers in blocks of about _BLOCK, with hashes that are equal under `mask` in one block."""
    blocks = -(-len(numbers) // _BLOCK)
    if blocks == 1:
        yield numbers
        return
    slices = [slice(start, start + _SLICE) for start in range(0, len(numbers), _SLICE)]
    for block in range(blocks):
        # An odd number, so that its product depends on all bits
        places = ((hashes[numbers[s]] & mask) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40) for s in slices)
        yield np.concatenate(
            [numbers[s][place % np.uint64(blocks) == block] for s, place in zip(slices, places, strict=True)]
        )


def _runs(keys: Hashes, numbers: Numbers) -> tuple[Numbers, NDArray[np.intp], NDArray[np.intp]]:
    """The numbers sorted by key, in their order where keys are equal; start and length of each run of equal keys."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    return numbers[order], starts, np.diff(starts, append=len(keys))


def _unite(parent: Numbers, ones: Numbers, others: Numbers) -> None:
    """Makes the groups of each pair one."""
    while len(ones):
        ones, others = _roots(parent, ones), _roots(parent, others)
        apart = ones != others
        ones, others = np.minimum(ones, others)[apart], np.maximum(ones, others)[apart]
        np.minimum.at(parent, others, ones)


def _roots(parent: Numbers, numbers: Numbers) -> Numbers:
    """The first number of each one's group; what is found is kept in `parent`."""
    found = parent[numbers]
    while not np.array_equal(above := parent[found], found):
        parent[numbers] = found = above
    return found


def _varying(hashes: Hashes, numbers: Numbers) -> np.uint64:
    """The bits in which some of the hashes differ."""
    first, varying = hashes[numbers[0]], np.uint64(0)
    for start in range(0, len(numbers), _SLICE):
        varying |= np.bitwise_or.reduce(hashes[numbers[start : start + _SLICE]] ^ first)
    return varying


def _bit_count(values: Hashes) -> NDArray[np.uint64]:
    """Bits set in each: sums of neighboring fields of 1, 2, 4 bits, then of all bytes by a product."""
    one, two, four, top = (np.uint64(number) for number in (1, 2, 4, 56))
    values = values - (values >> one & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + (values >> two & np.uint64(0x3333333333333333))
    return (values + (values >> four) & np.uint64(0x0F0F0F0F0F0F0F0F)) * np.uint64(0x0101010101010101) >> top
