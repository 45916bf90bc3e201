"""On which side of the split an image is: follows from what it looks like, whatever else there is."""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import SPLITS, Split
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.selection import Selection, parse
from pipeline.sharding.summary import Counting, Summary
from pipeline.storage import disk

Sides = NDArray[np.uint8]


@dataclass
class _Seen:
    """The groups of a split: the first, whether there is another, and the first ones of the smallest and largest hash."""

    first: int = -1
    several: bool = False
    lowest: tuple[int, int] = (2**32, -1)
    highest: tuple[int, int] = (-1, -1)

    def add(self, group: int, hashed: int) -> None:
        self.several |= group != self.first != -1
        self.first = group if self.first < 0 else self.first
        if hashed < self.lowest[0]:
            self.lowest = hashed, group
        if hashed > self.highest[0]:
            self.highest = hashed, group


def file_of(folder: Path, split: Split) -> Path:
    """The images of a split, in order, in the folder of a plan."""
    return folder / f"{split}.jsonl"


def write(cfg: ShardConfig, selection: Selection, folder: Path) -> Summary:
    """Writes the images of each split and says what they are.

    A source may have a side, which then holds for what looks like its images, too. Two images or more give training and
    validation at least one each, so that small folders work.
    """
    fixed = {source.name: source.split for source in cfg.sources() if source.split}
    sides = _sides(selection, fixed) if fixed else np.zeros(selection.num_images, np.uint8)
    summary, seen = _write(cfg, selection, folder, fixed, sides)
    if cfg.validation_fraction > 0 and not sides.any():
        train, valid = seen["train"], seen["valid"]
        if (valid.first < 0 and train.several) or (train.first < 0 and valid.several):
            group, split = (train.lowest[1], "valid") if valid.first < 0 else (valid.highest[1], "train")
            sides[group] = SPLITS.index(split) + 1
            summary, _ = _write(cfg, selection, folder, fixed, sides)
    return summary


def _write(
    cfg: ShardConfig, selection: Selection, folder: Path, fixed: dict[str, Split], sides: Sides
) -> tuple[Summary, dict[Split, _Seen]]:
    """sides: of each group, from 1 on; 0: by a hash of what its images look like."""
    seen = {split: _Seen() for split in SPLITS}
    shard_bytes = int(cfg.shard_mb * 1e6)
    with Counting(folder, selection.num_images, shard_bytes, cfg.format) as counting, ExitStack() as opened:
        files = {split: opened.enter_context(disk.atomic_writer(file_of(folder, split))) for split in SPLITS}
        for line in selection.lines():
            image = parse(line)
            group = selection.group(image.number)
            if place := sides[group]:
                split = fixed.get(image.photo.dataset) or SPLITS[place - 1]
            else:
                hashed = _split_hash(selection.digest(group))
                split = side(hashed / 2**32, cfg.validation_fraction, cfg.test_fraction)
                seen[split].add(group, hashed)
            files[split].write(line)
            counting.add(split, image.photo, group, len(line))
        return counting.summary(), seen


def side(place: float, validation_fraction: float, test_fraction: float) -> Split:
    """The split of an image at `place` in [0, 1)."""
    valid, test = place < validation_fraction, place < validation_fraction + test_fraction
    return "valid" if valid else "test" if test else "train"


def _sides(selection: Selection, fixed: dict[str, Split]) -> Sides:
    """For each group the number of the split that its last image with a side has, from 1 on; 0 if none has."""
    sides = np.zeros(selection.num_images, np.uint8)
    for line in selection.lines():
        image = parse(line)
        if split := fixed.get(image.photo.dataset):
            sides[selection.group(image.number)] = SPLITS.index(split) + 1
    return sides


def _split_hash(digest: str) -> int:
    return int(hashlib.sha256(f"split {digest}".encode()).hexdigest()[:8], 16)
