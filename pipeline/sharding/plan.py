"""Which image goes to which split and shard: follows from the images alone."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.data.shards import SPLITS, Shard, Split, StoredFormat
from pipeline.errors import DataError
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import AcceptedImage, RejectedFile, described, without_duplicates
from pipeline.sharding.items import Item


@dataclass(frozen=True)
class Plan:
    """A shard to be written: its file name and its photos, in order, each with where its bytes are."""

    file: str
    photos: list[tuple[AcceptedImage, Item]]
    store: StoredFormat
    max_bytes: int
    # Folder with the bytes of what was fetched
    spool: str

    @property
    def digest(self) -> str:
        """Digest of everything that determines the shard's bytes."""
        rows = [f"{photo.sha256} {photo.repeats} {photo.dataset} {photo.path}" for photo, _ in self.photos]
        return hashlib.sha256("\n".join([self.store, *rows]).encode()).hexdigest()

    def done(self, folder: Path) -> Shard | None:
        """The shard, if it was written before by an equal plan."""
        try:
            plan, fields = json.loads((folder / f"{self.file}.done").read_text())
            if plan != self.digest:
                return None
            shard = Shard(**fields)
            whole = (folder / self.file).stat().st_size == shard.bytes and (folder / shard.table).is_file()
        except (OSError, ValueError, TypeError):
            return None
        return shard if whole else None


def split_photos(
    photos: list[AcceptedImage],
    validation_fraction: float,
    test_fraction: float = 0.0,
    fixed: Mapping[str, Split] | None = None,
) -> dict[Split, list[AcceptedImage]]:
    """Splits by a hash of what an image looks like: it falls on the same side whatever else there is.

    fixed: data set -> the side that its images are on, and what looks like them.
    Two images or more give training and validation at least one each, so that small folders work.
    """
    splits: dict[Split, list[AcceptedImage]] = {"train": [], "valid": [], "test": []}
    places = {photo.group: side for photo in photos if (side := (fixed or {}).get(photo.dataset))}
    for photo in photos:
        if photo.group in places:
            splits[(fixed or {}).get(photo.dataset) or places[photo.group]].append(photo)
            continue
        place = _split_hash(photo) / 2**32
        valid, test = place < validation_fraction, place < validation_fraction + test_fraction
        splits["valid" if valid else "test" if test else "train"].append(photo)
    train, valid_photos = splits["train"], splits["valid"]
    for empty, full in ((valid_photos, train), (train, valid_photos)):
        if not empty and len({p.group for p in full}) > 1 and validation_fraction > 0 and not places:
            full.sort(key=_split_hash, reverse=empty is train)
            moved = full[0].group
            empty += [photo for photo in full if photo.group == moved]
            full[:] = sorted((photo for photo in full if photo.group != moved), key=lambda p: p.sha256)
    return splits


def in_shards(photos: Sequence[AcceptedImage], shard_bytes: int) -> Iterator[list[AcceptedImage]]:
    """Consecutive photos, in groups of about `shard_bytes`."""
    group: list[AcceptedImage] = []
    filled = 0
    for photo in photos:
        group.append(photo)
        filled += photo.size
        if filled >= shard_bytes:
            yield group
            group, filled = [], 0
    if group:
        yield group


def _split_hash(photo: AcceptedImage) -> int:
    return int(hashlib.sha256(f"split {photo.group}".encode()).hexdigest()[:8], 16)


def plan_shards(
    cfg: ShardConfig, items: list[Item], results: list[AcceptedImage | RejectedFile], work: Path
) -> tuple[list[Plan], list[AcceptedImage], dict[Split, list[AcceptedImage]], list[RejectedFile]]:
    """Which photo goes to which split and shard, and what is left out. Depends on the images alone."""
    photos, refused = _weighted(*without_duplicates(results, cfg), items)
    if not photos:
        reasons = "\n".join(f"  {described(r)}" for r in refused[:20])
        places = ", ".join(source.path for source in cfg.sources())
        raise DataError(f"{places}: none of {len(items)} files is a usable image; the first refusals:\n{reasons}")
    fixed = {source.name: source.split for source in cfg.sources() if source.split}
    splits = split_photos(photos, cfg.validation_fraction, cfg.test_fraction, fixed)
    plans = [
        Plan(
            f"{split}-{number:06d}.tar",
            [(photo, items[photo.item]) for photo in group],
            cfg.format,
            int(cfg.max_file_mb * 1e6),
            str(work / "spool"),
        )
        for split in SPLITS
        for number, group in enumerate(in_shards(splits[split], int(cfg.shard_mb * 1e6)))
    ]
    return plans, photos, splits, refused


def _weighted(
    photos: list[AcceptedImage], refused: list[RejectedFile], items: list[Item]
) -> tuple[list[AcceptedImage], list[RejectedFile]]:
    """Photos with how often they come per epoch: of weight 1.5, half come twice, chosen by content."""
    kept = []
    for photo in photos:
        weight = items[photo.item].weight
        place = int(hashlib.sha256(f"weight {photo.sha256}".encode()).hexdigest()[:8], 16) / 2**32
        if repeats := math.floor(weight) + (place < weight % 1):
            kept.append(replace(photo, repeats=repeats))
        else:
            refused.append(RejectedFile(photo.path, photo.dataset, f"left out: its source has weight {weight:g}"))
    return kept, refused
