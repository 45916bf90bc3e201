"""The list of what the sources hold, which a stage writes down once and every job of it reads."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sharding import known_datasets, sources
from pipeline.sharding.items import Item
from pipeline.sharding.sources import Source
from pipeline.storage import disk

FILE = "items.jsonl"


def found(places: Iterable[Source]) -> list[Item]:
    """What the sources hold, after the checks of known data sets.

    Raises: DataError if a source is invalid, or not the data set that it names.
    """
    return [item for source in places for item in _checked(source)]


def _checked(source: Source) -> list[Item]:
    items = sources.items(source)
    if source.known_dataset is not None:
        if source.known_dataset not in known_datasets.DATASETS:
            raise DataError(
                f"known_dataset {source.known_dataset!r} is not known; expected one of {', '.join(known_datasets.DATASETS)}"
            )
        known_datasets.check(source.known_dataset, items, source.allow_missing)
    return items


def write(work: Path, items: Iterable[Item]) -> None:
    """Makes the folders of the stage and writes the list, unless it is there."""
    for name in ("examined", "spool", "shards"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / FILE).exists():
        lines = "".join(json.dumps(asdict(item)) + "\n" for item in items)
        # URLs of lists may hold credentials
        disk.write_atomic(work / FILE, lines.encode(), private=True)


def read(work: Path) -> list[Item]:
    """The list, as it was written."""
    return [Item(**json.loads(line)) for line in (work / FILE).read_text().splitlines()]
