"""Which image goes to which split and shard: follows from the images alone.

The plan is a folder of files, made once for all jobs, since a list of all images may be larger than the memory: the images of
each split in the order of their digests, the files that were refused, and a summary.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.data.shards import SPLITS, Shard, StoredFormat
from pipeline.errors import DataError
from pipeline.sharding import splits
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import AcceptedImage, RejectedFile, described
from pipeline.sharding.items import Item
from pipeline.sharding.selection import Refusals, Results, parse, refusal_of, select
from pipeline.sharding.summary import Summary, shard_digest
from pipeline.storage import disk

FOLDER = "plan"
REFUSED, SUMMARY = "refused.jsonl", "summary.json"


@dataclass(frozen=True)
class Plan:
    """A shard to be written: its file name, and where in the plan of its split its images are."""

    file: str
    path: Path
    start: int
    end: int
    # Of everything that determines its bytes
    digest: str
    store: StoredFormat
    max_bytes: int
    # Folder with the bytes of what was fetched
    spool: str

    def photos(self) -> list[tuple[AcceptedImage, Item]]:
        """The images, in order, each with where its bytes are.

        Raises: DataError if another job plans again, since it examined files again.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.start)
                found = [parse(line) for line in stream.read(self.end - self.start).splitlines()]
        except (FileNotFoundError, ValueError, TypeError, LookupError):
            found = []
        if shard_digest(self.store, (each.photo for each in found)) != self.digest:
            raise DataError(
                f"{self.path}: replaced by another job, which examined files again; run the same command once that has ended"
            )
        return [(each.photo, each.item) for each in found]

    def done(self, folder: Path) -> Shard | None:
        """The shard, if it was written before by an equal plan."""
        try:
            plan, fields = json.loads((folder / f"{self.file}.done").read_text())
            shard = Shard(**fields)
            sizes = [(folder / name).stat().st_size for name in (shard.file, shard.table)]
        except (OSError, ValueError, TypeError):
            return None
        return shard if plan == self.digest and sizes == [shard.bytes, shard.table_bytes] else None


def plan_shards(cfg: ShardConfig, results: Results, work: Path) -> tuple[list[Plan], Summary]:
    """Which image goes to which split and shard: the plans of all shards, those of training first, and a summary.

    Made of the results unless it is there; depends on the images alone.
    Raises: DataError if no image can be used.
    """
    target = work / FOLDER
    # Of an array of jobs, one makes it
    with disk.exclusive_lock(work / f"{FOLDER}.lock"), disk.naming(target):
        summary = _read(target) or _make(cfg, results, target)
    plans = [
        Plan(
            f"{split}-{number:06d}.tar",
            splits.file_of(target, split),
            *place,
            cfg.format,
            int(cfg.max_file_mb * 1e6),
            str(work / "spool"),
        )
        for split in SPLITS
        for number, place in enumerate(summary.splits[split].shards)
    ]
    return plans, summary


def remove(work: Path) -> None:
    """Removes the plan, if there is one, at once for all who read it."""
    removed = disk.beside(work / FOLDER)
    with suppress(FileNotFoundError):
        (work / FOLDER).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def refused(work: Path) -> Iterator[RejectedFile]:
    """The refused files, as the plan lists them."""
    with (work / FOLDER / REFUSED).open("rb") as stream:
        yield from map(refusal_of, stream)


def _read(folder: Path) -> Summary | None:
    """The summary of a whole plan; None if there is none, or a part of one, as after a power cut."""
    try:
        summary = Summary.read(folder / SUMMARY)
        ends = {split: told.shards[-1][1] if told.shards else 0 for split, told in summary.splits.items()}
        whole = all(splits.file_of(folder, split).stat().st_size == ends[split] for split in SPLITS)
        return summary if whole and (folder / REFUSED).is_file() else None
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _make(cfg: ShardConfig, results: Results, target: Path) -> Summary:
    # URLs of lists may hold credentials
    with disk.scratch_folder(target, private=True) as scratch:
        summary = _write(cfg, results, scratch)
        while True:
            try:
                scratch.rename(target)
                return summary
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            # Without locks another job was faster, and its plan is the same; or there is a part of one
            if made := _read(target):
                return made
            remove(target.parent)


def _write(cfg: ShardConfig, results: Results, folder: Path) -> Summary:
    """Writes a plan into a folder, its summary last."""
    refusals = Refusals(folder / "refusals")
    selection = select(cfg, results, folder, refusals)
    summary = splits.write(cfg, selection, folder)
    if not summary.sources:
        reasons = "\n".join(f"  {described(refusal_of(row))}" for row in islice(refusals.rows(), 20))
        places = ", ".join(source.path for source in cfg.sources())
        raise DataError(f"{places}: none of {len(refusals)} files is a usable image; the first refusals:\n{reasons}")
    selection.remove()
    with disk.atomic_writer(folder / REFUSED) as stream:
        stream.writelines(refusals.rows())
    summary.refused = len(refusals)
    refusals.remove()
    summary.write(folder / SUMMARY)
    return summary
