"""The two passes of the shard stage, in chunks that can be done anywhere and again: examine every image, write every shard."""

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from pipeline.data.shards import Shard
from pipeline.errors import DataError
from pipeline.processes.pool import map_chunks
from pipeline.sharding import writer
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import AcceptedImage, NameLists, RejectedFile, described, examine_chunk
from pipeline.sharding.items import Item
from pipeline.sharding.plan import Plan
from pipeline.storage import disk, fetch
from pipeline.text import printable

NOT_FETCHED = "unreadable: cannot be fetched"


def examined(cfg: ShardConfig, items: list[Item], work: Path) -> list[AcceptedImage | RejectedFile]:
    """What examining each item found, in their order; chunks that an earlier job examined are not done again."""
    chunks = math.ceil(len(items) / cfg.chunk_size)
    examine_chunks(cfg, items, work, range(chunks))
    files = [examined_file(work, number) for number in range(chunks)]
    kinds: dict[str, Any] = {"AcceptedImage": AcceptedImage, "RejectedFile": RejectedFile}
    records = (json.loads(line) for file in files for line in file.read_text().splitlines())
    results = [kinds[kind](**fields) for kind, fields in records]
    return [replace(r, item=n) if isinstance(r, AcceptedImage) else r for n, r in enumerate(results)]


def examine_chunks(cfg: ShardConfig, items: list[Item], work: Path, numbers: range) -> None:
    """Examines the chunks of these numbers that have not been examined yet."""
    missing = [number for number in numbers if not examined_file(work, number).is_file()]
    task = partial(
        examine_chunk, rules=cfg, lists=NameLists.of(cfg), spool=work / "spool", max_bytes=int(cfg.max_file_mb * 1e6)
    )
    workers = _workers(cfg)
    # A small folder: the threads of one chunk are enough
    if len(items) <= cfg.chunk_size:
        task, workers = partial(task, threads=workers), 1
    chunks = [items[number * cfg.chunk_size : (number + 1) * cfg.chunk_size] for number in missing]
    for place, found in _shown(map_chunks(task, chunks, workers, cfg.backend), "examining", len(missing)):
        lines = "".join(json.dumps([type(r).__name__, asdict(r)]) + "\n" for r in found)
        disk.write_atomic(examined_file(work, missing[place]), lines.encode())


def check_fetched(cfg: ShardConfig, items: list[Item], results: list[AcceptedImage | RejectedFile], work: Path) -> None:
    """Raises: DataError if more URLs failed than the config allows: then the network is broken, not some images."""
    remote = [r for r, item in zip(results, items, strict=True) if fetch.is_url(item.location)]
    failed = {n: r for n, r in enumerate(results) if isinstance(r, RejectedFile) and r.reason.startswith(NOT_FETCHED)}
    if failed and len(failed) > cfg.max_failed_fraction * len(remote):
        for chunk in {number // cfg.chunk_size for number in failed}:
            # So that the next start tries again
            examined_file(work, chunk).unlink()
        listed = "\n".join(f"  {described(r)}" for r in islice(failed.values(), 10))
        raise DataError(
            f"{len(failed)} of {len(remote)} URLs cannot be fetched (max_failed_fraction={cfg.max_failed_fraction:g}); "
            f"the same command tries again:\n{listed}"
        )


def examined_file(work: Path, chunk: int) -> Path:
    return work / "examined" / f"{chunk:08d}.jsonl"


def write_shards(cfg: ShardConfig, plans: list[Plan], work: Path, numbers: range) -> list[Shard]:
    """The shards of these numbers, in order; those that an earlier job wrote are not written again.

    Raises: DataError if files are no longer what was examined, after making the next start examine them again.
    """
    folder = work / "shards"
    written = {number: shard for number in numbers if (shard := plans[number].done(folder))}
    missing = [number for number in numbers if number not in written]
    done = map_chunks(
        partial(writer.write, folder=folder), [plans[number] for number in missing], _workers(cfg), cfg.backend
    )
    changed: list[AcceptedImage] = []
    for place, result in _shown(done, "writing", len(missing)):
        if isinstance(result, Shard):
            written[missing[place]] = result
        else:
            changed += result
    _examine_again(cfg, changed, work)
    return [written[number] for number in numbers]


def _examine_again(cfg: ShardConfig, changed: list[AcceptedImage], work: Path) -> None:
    if not changed:
        return
    for chunk in {photo.item // cfg.chunk_size for photo in changed}:
        examined_file(work, chunk).unlink(missing_ok=True)
    listed = "\n".join(f"  {printable(photo.path)}" for photo in sorted(changed, key=lambda p: p.item)[:10])
    raise DataError(
        f"{len(changed)} file(s) changed while they were being sharded; the same command examines them again:\n{listed}"
    )


def _workers(cfg: ShardConfig) -> int:
    return cfg.num_workers or os.cpu_count() or 1


def _checked(done: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Raises: DataError instead of what a pool says whose workers keep dying."""
    try:
        yield from done
    except BrokenProcessPool:
        raise DataError(
            "worker processes keep dying, often for lack of memory; lower num_workers or chunk_size, and the same command continues"
        ) from None


def _shown(done: Iterator[tuple[int, Any]], words: str, total: int) -> Iterator[tuple[int, Any]]:
    console = Console(stderr=True)
    yield from track(_checked(done), words, total=total, console=console, disable=not console.is_terminal)
