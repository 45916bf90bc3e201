"""Turns images from anywhere into WebDataset tars with an index.

Two passes, each in pieces that can be done anywhere and again: every image is examined; then shards are planned, which
depends on nothing but the images, and written. What is done is kept in `work/`, so a killed job goes on.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track

from pipeline import artifacts, redaction, runs, tracking
from pipeline.data import card, fetch, recipes, shards, sources
from pipeline.data.examine import Lists, Photo, Refusal, Rules, examine, without_duplicates
from pipeline.data.shards import SPLITS, Plan, Shard, Store
from pipeline.data.sources import Item, Source
from pipeline.data.spread import On, spread
from pipeline.errors import DataError, UnreachableError

FETCHED_AT_ONCE = 8  # by each worker
NOT_FETCHED = "unreadable: cannot be fetched"


class StageConfig(Rules):
    """Which images become shards, and how."""

    stage: Literal["shard"] = "shard"
    source: (
        str | list[Source]
    )  # a folder, glob, archive, list, URL or shards; samples://photos for some inside packages
    validation_share: Annotated[float, Field(ge=0, lt=1)] = (
        0.02  # share of images, chosen by content, kept from training
    )
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # likewise
    shard_mb: PositiveFloat = 256.0  # a tar is closed when it holds this much
    store: Store = "original"  # bytes as found, lossless webp, jpeg at quality 95, or decoded pixels
    max_file_mb: PositiveFloat = 256.0  # larger files are refused
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = (
        0.05  # of URLs that cannot be fetched before the stage stops
    )
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
    found = [] if (work / "items.jsonl").exists() else [item for source in cfg.sources() for item in _listed(source)]
    Lists.of(cfg)
    runs.claim(folder, cfg, runs.inputs())
    with _alone(folder):
        if done := _finished(cfg, folder):  # by a job that had the lock before
            return done
        with tracking.run("shard", folder, cfg, runs.inputs()) as tracker:
            for name in ("examined", "spool", "shards"):
                (work / name).mkdir(parents=True, exist_ok=True)
            if not (work / "items.jsonl").exists():
                lines = "".join(json.dumps(asdict(item)) + "\n" for item in found)
                artifacts.write_durably(work / "items.jsonl", lines.encode())
            _shard(cfg, folder, work, tracker)
        shutil.rmtree(work)
    return folder / "artifact"


def _finished(cfg: StageConfig, folder: Path) -> Path | None:
    done = runs.finished(folder, cfg)
    if done:
        shutil.rmtree(folder / "work", ignore_errors=True)  # a job was killed after it had published
    return done


def _shard(cfg: StageConfig, folder: Path, work: Path, tracker: tracking.Tracker) -> None:
    """Both passes over the listed items, and the publication."""
    items = [Item(**json.loads(line)) for line in (work / "items.jsonl").read_text().splitlines()]
    results = _examined(cfg, items, work)
    _check_fetched(cfg, items, results, work)
    photos, refused = _weighted(*without_duplicates(results, cfg), items)
    if not photos:
        reasons = "\n".join(f"  {r.path}: {r.reason}" for r in refused[:20])
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
    written = _written(cfg, plans, work / "shards")
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
        _assemble(work / "shards", written, index, scratch)
        deciding = {key: value for key, value in manifest.config.items() if key not in runs.CHANGEABLE}
        card.write(scratch, ", ".join(s.name for s in cfg.sources()), splits, written, refused, deciding)

    made = artifacts.publish(folder / "artifact", manifest, assemble)
    tracker.artifact(made)
    tracker.dataset(folder.name, made, "sharded")
    print(f"data card: {folder / 'artifact' / 'card.html'}")
    counts = " and ".join(f"{len(splits[split])} {split}" for split in SPLITS if splits[split])
    print(f"{counts} images in {len(written)} shards, {len(refused)} files refused")
    for refusal in refused[:10]:
        print(f"  refused {refusal.path}: {refusal.reason}")
    if len(refused) > 10:
        print(f"  ... and {len(refused) - 10} more in {folder / 'artifact' / 'index.json'}")


def _listed(source: Source) -> list[Item]:
    items = sources.items(source)
    if source.recipe is not None:
        if source.recipe not in recipes.RECIPES:
            raise DataError(f"no recipe is called {source.recipe!r}; there are {', '.join(recipes.RECIPES)}")
        recipes.check(source.recipe, items, source.allow_missing)
    return items


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises: DataError if another job works on this folder."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"{folder}: another job is writing these shards; wait for it or choose another run="
            ) from None
        yield


def _examined(cfg: StageConfig, items: list[Item], work: Path) -> list[Photo | Refusal]:
    """What examining each item found, in their order; pieces that an earlier job examined are not done again."""
    pieces = [items[start : start + cfg.piece] for start in range(0, len(items), cfg.piece)]
    files = [_examined_file(work, number) for number in range(len(pieces))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    task = partial(
        examine_piece, rules=cfg, lists=Lists.of(cfg), spool=work / "spool", max_bytes=int(cfg.max_file_mb * 1e6)
    )
    workers = _workers(cfg)
    if len(pieces) == 1:  # a small folder: the threads of one piece are enough
        task, workers = partial(task, threads=workers), 1
    done = spread(task, [pieces[number] for number in missing], workers, cfg.spread)
    for place, found in _shown(done, "examining", len(missing)):
        lines = "".join(json.dumps([type(r).__name__, asdict(r)]) + "\n" for r in found)
        artifacts.write_durably(files[missing[place]], lines.encode())
    kinds: dict[str, Any] = {"Photo": Photo, "Refusal": Refusal}
    records = (json.loads(line) for file in files for line in file.read_text().splitlines())
    results = [kinds[kind](**fields) for kind, fields in records]
    return [replace(r, item=n) if isinstance(r, Photo) else r for n, r in enumerate(results)]


def examine_piece(
    items: list[Item], rules: Rules, lists: Lists, spool: Path, max_bytes: int, threads: int = 1
) -> list[Photo | Refusal]:
    """Examines some items; keeps the bytes of accepted ones that came over a network."""

    def one(item: Item) -> Photo | Refusal:
        try:
            content = fetch.read(item, max_bytes)
        except UnreachableError as error:
            reason = redaction.masked(str(error).removeprefix(f"{item.location}: "))
            return Refusal(item.name, item.dataset, f"unreadable: {reason}")
        except DataError as error:
            return Refusal(item.name, item.dataset, item.problem or f"unreadable: {error}")
        result = examine(item.name, item.dataset, content, rules, lists)
        if isinstance(result, Photo) and fetch.is_url(item.location):
            artifacts.write_durably(spool / result.sha256, content)
        return result

    remote = any(fetch.is_url(item.location) for item in items)
    with ThreadPoolExecutor(FETCHED_AT_ONCE if remote else threads) as pool:
        return list(pool.map(one, items))


def _check_fetched(cfg: StageConfig, items: list[Item], results: list[Photo | Refusal], work: Path) -> None:
    """Raises: DataError if more URLs failed than the config allows: then the network is broken, not some images."""
    remote = [r for r, item in zip(results, items, strict=True) if fetch.is_url(item.location)]
    failed = {n: r for n, r in enumerate(results) if isinstance(r, Refusal) and r.reason.startswith(NOT_FETCHED)}
    if failed and len(failed) > cfg.max_failed_share * len(remote):
        for piece in {number // cfg.piece for number in failed}:
            _examined_file(work, piece).unlink()  # so that the next start tries again
        listed = "\n".join(f"  {r.path}: {r.reason}" for r in islice(failed.values(), 10))
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


def _written(cfg: StageConfig, plans: list[Plan], folder: Path) -> list[Shard]:
    """All shards in order; those that an earlier job wrote are not written again."""
    written = {number: shard for number, plan in enumerate(plans) if (shard := plan.done(folder))}
    missing = [number for number in range(len(plans)) if number not in written]
    done = spread(
        partial(shards.write, folder=folder), [plans[number] for number in missing], _workers(cfg), cfg.spread
    )
    for place, shard in _shown(done, "writing", len(missing)):
        written[missing[place]] = shard
    return [written[number] for number in range(len(plans))]


def _assemble(work: Path, written: list[Shard], index: dict[str, Any], scratch: Path) -> None:
    """Links tars and tables into the artifact's folder and writes the index."""
    for shard in written:
        for name in (shard.file, shard.table):
            try:
                os.link(work / name, scratch / name)
            except OSError:  # a file system without links
                shutil.copyfile(work / name, scratch / name)
            (scratch / name).chmod(0o444)
    (scratch / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _workers(cfg: StageConfig) -> int:
    return cfg.workers or os.cpu_count() or 1


def _shown(done: Iterator[tuple[int, Any]], words: str, total: int) -> Iterator[tuple[int, Any]]:
    console = Console(stderr=True)
    yield from track(done, words, total=total, console=console, disable=not console.is_terminal)
