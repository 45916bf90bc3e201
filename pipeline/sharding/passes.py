"""The two passes of the shard stage, in chunks that can be done anywhere and again: examine every image, write every shard."""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from pipeline.data.shards import Shard
from pipeline.errors import DataError
from pipeline.processes.pool import map_chunks
from pipeline.sharding import filters, plan, writer
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import AcceptedImage, NameLists, RejectedFile, described, examine_chunk
from pipeline.sharding.items import Item
from pipeline.sharding.listing import Chunk, Listing
from pipeline.sharding.plan import Plan
from pipeline.storage import disk, fetch
from pipeline.text import printable

NOT_FETCHED = "unreadable: cannot be fetched"


def examine_chunks(cfg: ShardConfig, listing: Listing, work: Path, numbers: range) -> None:
    """Examines the chunks of these numbers that have not been examined yet."""
    missing = [listing.chunk(number) for number in numbers if not examined_file(work, number).is_file()]
    if missing:
        # Made of what an earlier job examined
        plan.remove(work)
    task = partial(_examine, rules=cfg, lists=NameLists.of(cfg), work=work, max_bytes=int(cfg.max_file_mb * 1e6))
    workers = _workers(cfg)
    # A small folder: the threads of one chunk are enough
    if listing.num_items <= cfg.chunk_size:
        task, workers = partial(task, threads=workers), 1
    for _ in _shown(map_chunks(task, missing, workers, cfg.backend), "examining", len(missing)):
        pass


def _examine(chunk: Chunk, rules: ShardConfig, lists: NameLists, work: Path, max_bytes: int, threads: int = 1) -> None:
    """Examines a chunk and writes down what was found: in the worker, since this would be most of what one process does."""
    rows: list[tuple[Any, ...]] = []
    found = examine_chunk(chunk.items(), rules, lists, work / "spool", max_bytes, threads)
    for number, result in enumerate(found, chunk.number * rules.chunk_size):
        if isinstance(result, AcceptedImage):
            rows.append(("AcceptedImage", *filters.row(replace(result, item=number))))
        else:
            rows.append(("RejectedFile", *astuple(result)))
    disk.write_atomic(examined_file(work, chunk.number), "".join(json.dumps(row) + "\n" for row in rows).encode())


def examined(cfg: ShardConfig, listing: Listing, work: Path) -> Iterator[tuple[Item, AcceptedImage | RejectedFile]]:
    """The items with what examining each found, in their order.

    Raises: DataError after the last if more URLs failed than the config allows, after making the next start examine them
    again: then the network is broken, not some images.
    """
    remote, failed = 0, 0
    first, chunks = list[RejectedFile](), set[int]()
    for number, (item, result) in enumerate(zip(listing, _results(listing, work), strict=True)):
        remote += fetch.is_url(item.location)
        if isinstance(result, RejectedFile) and result.reason.startswith(NOT_FETCHED):
            failed += 1
            chunks.add(number // cfg.chunk_size)
            if len(first) < 10:
                first.append(result)
        yield item, result
    if failed > cfg.max_failed_fraction * remote:
        _examine_again(work, chunks)
        listed = "\n".join(f"  {described(r)}" for r in first)
        raise DataError(
            f"{failed} of {remote} URLs cannot be fetched (max_failed_fraction={cfg.max_failed_fraction:g}); "
            f"the same command tries again:\n{listed}"
        )


def _results(listing: Listing, work: Path) -> Iterator[AcceptedImage | RejectedFile]:
    kinds: dict[str, Any] = {"AcceptedImage": AcceptedImage, "RejectedFile": RejectedFile}
    for chunk in range(listing.num_chunks):
        try:
            content = examined_file(work, chunk).read_bytes()
        except FileNotFoundError:
            # Another job found that its files changed
            raise DataError(
                f"{work.parent}: chunk {chunk} is to be examined again; run the same command, or the part `examine`"
            ) from None
        for line in content.splitlines():
            kind, *values = json.loads(line)
            yield kinds[kind](*values)


def examined_file(work: Path, chunk: int) -> Path:
    return work / "examined" / f"{chunk:08d}.jsonl"


def _examine_again(work: Path, chunks: Iterable[int]) -> None:
    """Makes the next start examine these chunks once more."""
    for chunk in set(chunks):
        examined_file(work, chunk).unlink(missing_ok=True)


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
    if changed:
        _examine_again(work, (photo.item // cfg.chunk_size for photo in changed))
        listed = "\n".join(f"  {printable(photo.path)}" for photo in sorted(changed, key=lambda p: p.item)[:10])
        raise DataError(
            f"{len(changed)} file(s) changed while they were being sharded; the same command examines them again:\n{listed}"
        )
    return [written[number] for number in numbers]


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
