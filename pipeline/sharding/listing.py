"""The list of what the sources hold, which a stage writes down once and every job of it reads."""

import json
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import DataError
from pipeline.sharding import known_datasets, sources
from pipeline.sharding.items import Item, row
from pipeline.sharding.sources import Source
from pipeline.storage import disk

FILE = "items.jsonl"


def found(places: Iterable[Source], folder: Path) -> BinaryIO:
    """What the sources hold, after the checks of known data sets, in a file without a name near `folder`.

    Raises: DataError if a source is invalid, or not the data set that it names.
    """
    near = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    # Nothing is left of it if this process ends
    stream = tempfile.TemporaryFile(dir=near)  # noqa: SIM115
    with disk.naming(near):
        for source in places:
            for item in _checked(source):
                stream.write(json.dumps(row(item)).encode() + b"\n")
        stream.seek(0)
    return stream


def _checked(source: Source) -> Iterator[Item]:
    items = sources.items(source)
    if source.known_dataset is None:
        return items
    if source.known_dataset not in known_datasets.DATASETS:
        raise DataError(
            f"known_dataset {source.known_dataset!r} is not known; expected one of {', '.join(known_datasets.DATASETS)}"
        )
    return known_datasets.checked(source.known_dataset, items, source.allow_missing)


def write(work: Path, lines: BinaryIO | None) -> None:
    """Makes the folders of the stage and writes the list, unless it is there; closes `lines`."""
    for name in ("examined", "spool", "shards"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if lines is None:
        return
    with lines:
        if not (work / FILE).exists():
            # URLs of lists may hold credentials
            with disk.atomic_writer(work / FILE, private=True) as stream:
                shutil.copyfileobj(lines, stream)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive lines of a list: those between two places in its file."""

    path: Path
    number: int
    start: int
    end: int

    def items(self) -> list[Item]:
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            return [Item(*json.loads(line)) for line in stream.read(self.end - self.start).splitlines()]


class Listing:
    """The list, which stays on disk, in chunks of `chunk_size` items.

    Raises: DataError if another version wrote it.
    """

    def __init__(self, work: Path, chunk_size: int):
        self._path, self.num_items, end = work / FILE, 0, 0
        # Where chunks begin and, last, where the file ends
        self._starts = array("q")
        with self._path.open("rb") as stream:
            for self.num_items, line in enumerate(stream, 1):
                if not line.startswith(b"["):
                    raise DataError(f"{self._path}: written by another version; remove {work} and run the same command")
                if (self.num_items - 1) % chunk_size == 0:
                    self._starts.append(end)
                end += len(line)
        self._starts.append(end)

    @property
    def num_chunks(self) -> int:
        return len(self._starts) - 1

    def chunk(self, number: int) -> Chunk:
        return Chunk(self._path, number, self._starts[number], self._starts[number + 1])

    def __iter__(self) -> Iterator[Item]:
        with self._path.open("rb") as stream:
            for line in stream:
                yield Item(*json.loads(line))
