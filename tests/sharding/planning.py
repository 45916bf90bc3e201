"""Plans for tests: made by the package from given results of examining, and as an earlier version made them in memory."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from pipeline.data.shards import SPLITS
from pipeline.sharding import plan
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import AcceptedImage, RejectedFile
from pipeline.sharding.items import Item
from pipeline.sharding.summary import Summary

Results = list[tuple[Item, AcceptedImage | RejectedFile]]
_FOLDERS = count()


@dataclass
class Planned:
    """The images of each shard, with their items; the refused files; the images of each split, and of each source."""

    shards: dict[str, list[tuple[AcceptedImage, Item]]]
    refused: list[RejectedFile]
    splits: dict[str, int]
    sources: list[tuple[str, int]]
    look_alikes: int

    def paths(self, split: str) -> list[str]:
        return [photo.path for name, shard in self.shards.items() if name.startswith(split) for photo, _ in shard]


def image(number: int, path: str = "", dataset: str = "x", looks: int | None = None, size: int = 100) -> AcceptedImage:
    """An image of its own digest, which looks like no other unless `looks` says what its hash is."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    hashed = int(digest[:16], 16) if looks is None else looks
    return AcceptedImage(path or f"{number}.png", dataset, "png", size, digest, 300, 200, False, hash=hashed)


def results_of(images: list[AcceptedImage | RejectedFile], weights: dict[str, float] | None = None) -> Results:
    """The images as results of examining files that are called like them."""
    numbered = [replace(i, item=n) if isinstance(i, AcceptedImage) else i for n, i in enumerate(images)]
    return [
        (Item(i.path, i.dataset, f"/there/{i.path}", weight=(weights or {}).get(i.dataset, 1.0)), i) for i in numbered
    ]


def planned(cfg: ShardConfig, results: Results, folder: Path) -> Planned:
    work = folder / f"work{next(_FOLDERS)}"
    work.mkdir()
    plans, summary = plan.plan_shards(cfg, iter(results), work)
    assert {path.name for path in (work / plan.FOLDER).iterdir()} == {
        "train.jsonl", "valid.jsonl", "test.jsonl", plan.REFUSED, plan.SUMMARY,
    }  # fmt: skip
    assert summary == Summary.read(work / plan.FOLDER / plan.SUMMARY)
    refused = list(plan.refused(work))
    assert summary.refused == len(refused)
    return Planned(
        {each.file: each.photos() for each in plans},
        refused,
        {split: told.images for split, told in summary.splits.items()},
        list(summary.sources.items()),
        summary.look_alikes,
    )


def reference(cfg: ShardConfig, results: Results) -> Planned:
    """The plan as version 0.1 made it, with all images in memory. Raises: LookupError if there are none."""
    photos, groups, refused = _without_duplicates(cfg, [result for _, result in results])
    items, kept = [item for item, _ in results], []
    for photo in photos:
        weight = items[photo.item].weight
        place = int(hashlib.sha256(f"weight {photo.sha256}".encode()).hexdigest()[:8], 16) / 2**32
        if repeats := math.floor(weight) + (place < weight % 1):
            kept.append(replace(photo, repeats=repeats))
        else:
            refused.append(RejectedFile(photo.path, photo.dataset, f"left out: its source has weight {weight:g}"))
    if not kept:
        raise LookupError
    splits, shards = _split(cfg, kept, groups), {}
    for split in SPLITS:
        group, filled, number = [], 0, 0
        for place, photo in enumerate(splits[split], 1):
            group.append((photo, items[photo.item]))
            filled += photo.size
            if filled >= int(cfg.shard_mb * 1e6) or place == len(splits[split]):
                shards[f"{split}-{number:06d}.tar"] = group
                group, filled, number = [], 0, number + 1
    sources = list(Counter(photo.dataset for photo in kept).items())
    look_alikes = len(kept) - len({groups[photo.sha256] for photo in kept})
    return Planned(shards, refused, {split: len(splits[split]) for split in SPLITS}, sources, look_alikes)


def _without_duplicates(
    cfg: ShardConfig, results: list[AcceptedImage | RejectedFile]
) -> tuple[list[AcceptedImage], dict[str, str], list[RejectedFile]]:
    """Accepted images by digest; the digest that stands for what looks like each; refused files."""
    first: dict[str, AcceptedImage] = {}
    refused = []
    for result in results:
        if isinstance(result, RejectedFile):
            refused.append(result)
        elif result.sha256 in first:
            refused.append(RejectedFile(result.path, result.dataset, f"same bytes as {first[result.sha256].path}"))
        else:
            first[result.sha256] = result
    photos = [first[digest] for digest in sorted(first)]
    if cfg.duplicate_distance is None:
        return photos, {photo.sha256: photo.sha256 for photo in photos}, refused
    numbers = all_pairs([photo.hash for photo in photos], cfg.duplicate_distance)
    groups = {photo.sha256: photos[number].sha256 for photo, number in zip(photos, numbers, strict=True)}
    if not cfg.drop_near_duplicates:
        return photos, groups, refused
    kept: dict[str, AcceptedImage] = {}
    for photo in sorted(photos, key=lambda p: (-p.width * p.height, p.sha256)):
        best = kept.setdefault(groups[photo.sha256], photo)
        if best is not photo:
            refused.append(RejectedFile(photo.path, photo.dataset, f"looks like {best.path}"))
    return sorted(kept.values(), key=lambda p: p.sha256), groups, refused


def all_pairs(hashes: list[int], distance: int) -> list[int]:
    """For each hash the number of the first one in its group, by comparing every pair."""
    found = list(range(len(hashes)))
    for i, a in enumerate(hashes):
        for j in range(i):
            if found[i] != found[j] and (a ^ hashes[j]).bit_count() <= distance:
                low, high = sorted((found[i], found[j]))
                found = [low if number == high else number for number in found]
    return found


def _split(cfg: ShardConfig, photos: list[AcceptedImage], groups: dict[str, str]) -> dict[str, list[AcceptedImage]]:
    fixed = {source.name: source.split for source in cfg.sources() if source.split}
    splits: dict[str, list[AcceptedImage]] = {"train": [], "valid": [], "test": []}

    def hashed(photo: AcceptedImage) -> int:
        return int(hashlib.sha256(f"split {groups[photo.sha256]}".encode()).hexdigest()[:8], 16)

    places = {groups[photo.sha256]: side for photo in photos if (side := fixed.get(photo.dataset))}
    for photo in photos:
        if groups[photo.sha256] in places:
            splits[fixed.get(photo.dataset) or places[groups[photo.sha256]]].append(photo)
            continue
        place = hashed(photo) / 2**32
        valid, test = place < cfg.validation_fraction, place < cfg.validation_fraction + cfg.test_fraction
        splits["valid" if valid else "test" if test else "train"].append(photo)
    train, valid_photos = splits["train"], splits["valid"]
    for empty, full in ((valid_photos, train), (train, valid_photos)):
        if not empty and len({groups[p.sha256] for p in full}) > 1 and cfg.validation_fraction > 0 and not places:
            full.sort(key=hashed, reverse=empty is train)
            moved = groups[full[0].sha256]
            empty += [photo for photo in full if groups[photo.sha256] == moved]
            full[:] = sorted((p for p in full if groups[p.sha256] != moved), key=lambda p: p.sha256)
    return splits
