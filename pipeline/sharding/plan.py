"""Which image goes to which split and shard: follows from the images alone.

The plan is a folder of files, made once for all jobs, since a list of all images may be larger than the memory: the images of
each split in the order of their digests, the files that were refused, and a summary.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

from pipeline.data.shards import SPLITS, Shard, StoredFormat
from pipeline.errors import DataError
from pipeline.sharding import splits
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import AcceptedImage, RejectedFile, described
from pipeline.sharding.items import Item
from pipeline.sharding.selection import Refusals, Results, parse, refusal_of, select
from pipeline.sharding.summary import Summary
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
    store: StoredFormat
    max_bytes: int
    # Folder with the bytes of what was fetched
    spool: str

    def photos(self) -> list[tuple[AcceptedImage, Item]]:
        """The images, in order, each with where its bytes are."""
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            found = map(parse, stream.read(self.end - self.start).splitlines())
            return [(each.photo, each.item) for each in found]

    @property
    def digest(self) -> str:
        """Digest of everything that determines the shard's bytes."""
        rows = [f"{photo.sha256} {photo.repeats} {photo.dataset} {photo.path}" for photo, _ in self.photos()]
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


class Plans(Sequence[Plan]):
    """The plans of all shards, those of training first; each is made when it is asked for."""

    def __init__(self, cfg: ShardConfig, work: Path, summary: Summary):
        self._cfg, self._work = cfg, work
        self._places = [
            (split, number, start, end)
            for split in SPLITS
            for number, (start, end) in enumerate(summary.splits[split].shards)
        ]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, number: int) -> Plan: ...
    @overload
    def __getitem__(self, number: slice) -> list[Plan]: ...
    def __getitem__(self, number: int | slice) -> Plan | list[Plan]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        split, place, start, end = self._places[number]
        return Plan(
            f"{split}-{place:06d}.tar",
            splits.file_of(self._work / FOLDER, split),
            start,
            end,
            self._cfg.format,
            int(self._cfg.max_file_mb * 1e6),
            str(self._work / "spool"),
        )


def plan_shards(cfg: ShardConfig, results: Results, work: Path) -> tuple[Plans, Summary]:
    """Which image goes to which split and shard. Made of the results unless it is there; depends on the images alone.

    Raises: DataError if no image can be used.
    """
    target = work / FOLDER
    # Of an array of jobs, one makes it
    with disk.exclusive_lock(work / f"{FOLDER}.lock"):
        if not target.is_dir():
            with disk.scratch_folder(target) as scratch:
                _make(cfg, results, scratch)
                scratch.rename(target)
    summary = Summary.read(target / SUMMARY)
    return Plans(cfg, work, summary), summary


def refused(work: Path) -> Iterator[RejectedFile]:
    """The refused files, as the plan lists them."""
    with (work / FOLDER / REFUSED).open("rb") as stream:
        yield from map(refusal_of, stream)


def _make(cfg: ShardConfig, results: Results, folder: Path) -> None:
    refusals = Refusals(folder / "refusals")
    selection = select(cfg, results, folder, refusals)
    summary = splits.write(cfg, selection, folder)
    if not summary.sources:
        reasons = "\n".join(f"  {described(refusal_of(row))}" for row in islice(refusals.rows(), 20))
        places = ", ".join(source.path for source in cfg.sources())
        raise DataError(f"{places}: none of {len(refusals)} files is a usable image; the first refusals:\n{reasons}")
    selection.remove()
    with (folder / REFUSED).open("wb") as stream:
        stream.writelines(refusals.rows())
    summary.refused = len(refusals)
    refusals.remove()
    summary.write(folder / SUMMARY)
