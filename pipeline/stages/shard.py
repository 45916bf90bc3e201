"""Turns images from anywhere into WebDataset tars with an index.

Two passes, each in pieces that can be done anywhere and again: every image is examined; then shards are planned, which
depends on nothing but the images, and written. What is done is kept in `work/`, so a killed job goes on.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track

from pipeline import artifacts, disk, ownership, patience, runs, tracking
from pipeline.data import card, fetch, listing, shards
from pipeline.data.examine import Lists, Photo, Refusal, Rules, without_duplicates
from pipeline.data.piece import examine_piece
from pipeline.data.shards import SPLITS, Plan, Shard, Split, Store
from pipeline.data.sources import Item, Source
from pipeline.data.spread import On, spread
from pipeline.errors import DataError
from pipeline.wording import printable

NOT_FETCHED = "unreadable: cannot be fetched"
FEW = 10  # validation images


class StageConfig(Rules):
    """Which images become shards, and how."""

    stage: Literal["shard"] = "shard"
    source: str | list[Source]  # a folder, glob, archive, list, URL, shards; or samples://photos, inside packages
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.02  # of images, chosen by content, kept from training
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # likewise
    shard_mb: PositiveFloat = 256.0  # a tar is closed when it holds this much
    store: Store = "original"  # bytes as found, lossless webp, jpeg at quality 95, or decoded pixels
    max_file_mb: PositiveFloat = 256.0  # larger files are refused
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.05  # of URLs that cannot be fetched; more stop the stage
    workers: NonNegativeInt = 0  # processes or threads; 0: one per core
    spread: On = "auto"  # threads, ray, or what suits the amount of work
    piece: PositiveInt = 256  # images that a worker examines at a time

    def sources(self) -> list[Source]:
        return [Source(name="images", path=self.source)] if isinstance(self.source, str) else self.source


def run(cfg: StageConfig, folder: Path) -> Path:
    """Shards the sources and publishes tars, tables, index and data card."""
    work = folder / "work"
    if done := _finished(cfg, folder):
        return done
    found = _found(cfg, work)
    with ownership.held(folder) as still_ours:
        if done := _finished(cfg, folder):  # by a job that had the lock before
            return done
        runs.claim(folder, cfg, runs.inputs())
        with tracking.run("shard", folder, cfg, runs.inputs()) as tracker:
            listing.write(work, found)
            _shard(cfg, folder, work, tracker, still_ours)
        # another start, which found the artifact, may be removing it, too
        shutil.rmtree(work, ignore_errors=True)
    return folder / "artifact"


def run_part(cfg: StageConfig, folder: Path, what: str, number: int = 0, count: int = 1) -> str:
    """The share of one of `count` jobs in a pass: first "list", then all of "examine", then all of "write", then `run`.

    Raises: DataError if the pass before has not been done.
    """
    work = folder / "work"
    if done := _finished(cfg, folder):
        return f"already done: {done}"
    if what == "list":
        found = _found(cfg, work)
        with ownership.held(folder):
            runs.claim(folder, cfg, runs.inputs())
            listing.write(work, found)
        return f"listed {len(listing.read(work))} files"
    if not patience.wait_for(work / listing.FILE):
        raise DataError(f"{folder}: its files have not been listed; run the part `list` first")
    items = listing.read(work)
    pieces = math.ceil(len(items) / cfg.piece)
    if what == "examine":
        _examine(cfg, items, work, range(number, pieces, count))
        return f"examined pieces {number}, {number + count}, ... of {pieces}"
    if not all(patience.wait_for(_examined_file(work, piece)) for piece in range(pieces)):
        raise DataError(f"{folder}: not all of its {pieces} pieces have been examined; run those parts first")
    plans, *_ = _planned(cfg, items, _examined(cfg, items, work), work)
    _written(cfg, plans, work, range(number, len(plans), count))
    return f"wrote shards {number}, {number + count}, ... of {len(plans)}"


def _found(cfg: StageConfig, work: Path) -> list[Item]:
    """What the sources hold, unless that has been written down; reads the lists of excluded images, too."""
    Lists.of(cfg)
    return [] if (work / listing.FILE).exists() else listing.found(cfg.sources())


def _finished(cfg: StageConfig, folder: Path) -> Path | None:
    done = runs.finished(folder, cfg)
    if done:
        shutil.rmtree(folder / "work", ignore_errors=True)  # a job was killed after it had published
    return done


def _shard(
    cfg: StageConfig, folder: Path, work: Path, tracker: tracking.Tracker, still_ours: Callable[[], None]
) -> None:
    """Both passes over the listed items, and the publication."""
    items = listing.read(work)
    results = _examined(cfg, items, work)
    _check_fetched(cfg, items, results, work)
    plans, photos, splits, refused = _planned(cfg, items, results, work)
    written = _written(cfg, plans, work, range(len(plans)))
    metrics = {
        **{f"{split}_images": len(splits[split]) for split in SPLITS},
        "refused_files": len(refused),
        "bytes": sum(shard.bytes for shard in written),
    }
    manifest = runs.manifest("shards", cfg, runs.inputs(), metrics, tracker.run_id)
    tracker.log(0, metrics)
    index = {
        "splits": {split: [asdict(s) for s in written if s.file.startswith(split)] for split in SPLITS},
        "sources": Counter(photo.dataset for photo in photos),
        "refused": [asdict(refusal) for refusal in refused],
    }

    def assemble(scratch: Path) -> None:
        shards.assemble(work / "shards", written, index, scratch)
        deciding = {key: value for key, value in manifest.config.items() if key not in runs.CHANGEABLE}
        card.write(scratch, ", ".join(s.name for s in cfg.sources()), splits, written, refused, deciding)

    made = artifacts.publish(folder / "artifact", manifest, assemble, still_ours)
    tracker.artifact(made)
    tracker.dataset(folder.name, made, "sharded")
    print(f"data card: {folder / 'artifact' / 'card.html'}")
    counts = " and ".join(f"{len(splits[split])} {split}" for split in SPLITS if splits[split])
    print(f"{counts} images in {len(written)} shards, {len(refused)} files refused")
    for refusal in refused[:10]:
        print(f"  refused {_told(refusal)}")
    if len(refused) > 10:
        print(f"  ... and {len(refused) - 10} more in {folder / 'artifact' / 'index.json'}")
    _warn_of_few(cfg, len(splits["valid"]))


def _told(refusal: Refusal) -> str:
    return printable(f"{refusal.path}: {refusal.reason}")


def _warn_of_few(cfg: StageConfig, count: int) -> None:
    """Says so if there are too few validation images, unless none were asked for."""
    wanted = cfg.validation_share > 0 or any(source.split == "valid" for source in cfg.sources())
    if wanted and count < FEW:
        print(
            f"warning: {count} validation image(s), too few to judge a codec by; shard more images, "
            f"or raise validation_share ({cfg.validation_share:g}) in another run=",
            file=sys.stderr,
        )


def _planned(
    cfg: StageConfig, items: list[Item], results: list[Photo | Refusal], work: Path
) -> tuple[list[Plan], list[Photo], dict[Split, list[Photo]], list[Refusal]]:
    """Which photo goes to which split and shard, and what is left out. Depends on the images alone."""
    photos, refused = _weighted(*without_duplicates(results, cfg), items)
    if not photos:
        reasons = "\n".join(f"  {_told(r)}" for r in refused[:20])
        places = ", ".join(source.path for source in cfg.sources())
        raise DataError(f"{places}: none of {len(items)} files is a usable image; the first refusals:\n{reasons}")
    fixed = {source.name: source.split for source in cfg.sources() if source.split}
    splits = shards.split_photos(photos, cfg.validation_share, cfg.test_share, fixed)
    plans = [
        Plan(
            f"{split}-{number:06d}.tar",
            [(photo, items[photo.item]) for photo in group],
            cfg.store,
            int(cfg.max_file_mb * 1e6),
            str(work / "spool"),
        )
        for split in SPLITS
        for number, group in enumerate(shards.in_shards(splits[split], int(cfg.shard_mb * 1e6)))
    ]
    return plans, photos, splits, refused


def _examined(cfg: StageConfig, items: list[Item], work: Path) -> list[Photo | Refusal]:
    """What examining each item found, in their order; pieces that an earlier job examined are not done again."""
    pieces = math.ceil(len(items) / cfg.piece)
    _examine(cfg, items, work, range(pieces))
    files = [_examined_file(work, number) for number in range(pieces)]
    kinds: dict[str, Any] = {"Photo": Photo, "Refusal": Refusal}
    records = (json.loads(line) for file in files for line in file.read_text().splitlines())
    results = [kinds[kind](**fields) for kind, fields in records]
    return [replace(r, item=n) if isinstance(r, Photo) else r for n, r in enumerate(results)]


def _examine(cfg: StageConfig, items: list[Item], work: Path, numbers: range) -> None:
    """Examines the pieces of these numbers that have not been examined yet."""
    missing = [number for number in numbers if not _examined_file(work, number).is_file()]
    task = partial(
        examine_piece, rules=cfg, lists=Lists.of(cfg), spool=work / "spool", max_bytes=int(cfg.max_file_mb * 1e6)
    )
    workers = _workers(cfg)
    if len(items) <= cfg.piece:  # a small folder: the threads of one piece are enough
        task, workers = partial(task, threads=workers), 1
    pieces = [items[number * cfg.piece : (number + 1) * cfg.piece] for number in missing]
    for place, found in _shown(spread(task, pieces, workers, cfg.spread), "examining", len(missing)):
        lines = "".join(json.dumps([type(r).__name__, asdict(r)]) + "\n" for r in found)
        disk.write_durably(_examined_file(work, missing[place]), lines.encode())


def _check_fetched(cfg: StageConfig, items: list[Item], results: list[Photo | Refusal], work: Path) -> None:
    """Raises: DataError if more URLs failed than the config allows: then the network is broken, not some images."""
    remote = [r for r, item in zip(results, items, strict=True) if fetch.is_url(item.location)]
    failed = {n: r for n, r in enumerate(results) if isinstance(r, Refusal) and r.reason.startswith(NOT_FETCHED)}
    if failed and len(failed) > cfg.max_failed_share * len(remote):
        for piece in {number // cfg.piece for number in failed}:
            _examined_file(work, piece).unlink()  # so that the next start tries again
        listed = "\n".join(f"  {_told(r)}" for r in islice(failed.values(), 10))
        raise DataError(
            f"{len(failed)} of {len(remote)} URLs cannot be fetched (max_failed_share={cfg.max_failed_share:g}); "
            f"the same command tries again:\n{listed}"
        )


def _examined_file(work: Path, piece: int) -> Path:
    return work / "examined" / f"{piece:08d}.jsonl"


def _weighted(photos: list[Photo], refused: list[Refusal], items: list[Item]) -> tuple[list[Photo], list[Refusal]]:
    """Photos with how often they come per epoch: of weight 1.5, half come twice, chosen by content."""
    kept = []
    for photo in photos:
        weight = items[photo.item].weight
        place = int(hashlib.sha256(f"weight {photo.sha256}".encode()).hexdigest()[:8], 16) / 2**32
        if repeats := math.floor(weight) + (place < weight % 1):
            kept.append(replace(photo, repeats=repeats))
        else:
            refused.append(Refusal(photo.path, photo.dataset, f"left out: its source has weight {weight:g}"))
    return kept, refused


def _written(cfg: StageConfig, plans: list[Plan], work: Path, numbers: range) -> list[Shard]:
    """The shards of these numbers, in order; those that an earlier job wrote are not written again.

    Raises: DataError if files are no longer what was examined, after making the next start examine them again.
    """
    folder = work / "shards"
    written = {number: shard for number in numbers if (shard := plans[number].done(folder))}
    missing = [number for number in numbers if number not in written]
    done = spread(
        partial(shards.write, folder=folder), [plans[number] for number in missing], _workers(cfg), cfg.spread
    )
    changed: list[Photo] = []
    for place, result in _shown(done, "writing", len(missing)):
        if isinstance(result, Shard):
            written[missing[place]] = result
        else:
            changed += result
    _examine_again(cfg, changed, work)
    return [written[number] for number in numbers]


def _examine_again(cfg: StageConfig, changed: list[Photo], work: Path) -> None:
    if not changed:
        return
    for piece in {photo.item // cfg.piece for photo in changed}:
        _examined_file(work, piece).unlink(missing_ok=True)
    listed = "\n".join(f"  {printable(photo.path)}" for photo in sorted(changed, key=lambda p: p.item)[:10])
    raise DataError(
        f"{len(changed)} file(s) changed while they were being sharded; the same command examines them again:\n{listed}"
    )


def _workers(cfg: StageConfig) -> int:
    return cfg.workers or os.cpu_count() or 1


def _shown(done: Iterator[tuple[int, Any]], words: str, total: int) -> Iterator[tuple[int, Any]]:
    console = Console(stderr=True)
    yield from track(done, words, total=total, console=console, disable=not console.is_terminal)
