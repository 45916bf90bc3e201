"""The images that codecs are measured on."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pipeline.artifacts import run_folder
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.manifest import MANIFEST
from pipeline.data.images import SUFFIXES, Pixels, decode
from pipeline.data.reader import ShardReader
from pipeline.errors import DataError
from pipeline.registry import resolve
from pipeline.sharding.sources import find_files
from pipeline.storage import disk
from pipeline.text import file_name


class HeldOut:
    """The images to measure on: (name, pixels), the same ones in the same order every time. Names can name files.

    images: a shards artifact, whose validation images are taken, or a folder; limit: how many at most.

    Raises: DataError if there are none.
    """

    def __init__(self, images: str, limit: int):
        self.parents: dict[str, tuple[str, Artifact]] = {}
        # Whose artifact may be missing, which `read` reports
        is_run = (Path(images) / run_folder.RUN_FILE).is_file()
        if is_run or (resolve.path_of(images) / MANIFEST).is_file():
            shards = resolve.read(images, "shards")
            self.parents["images"] = (images, shards)
            self.reader: ShardReader | None = ShardReader(shards, "valid")
            self.files: list[Path] = []
            count = sum(shard.count for shard in self.reader.shards)
        else:
            self.reader = None
            self.files = [p for p in find_files(images) if p.suffix.lower() in SUFFIXES]
            count = len(self.files)
        if not count:
            raise DataError(f"{images}: no images to evaluate on")
        self.count = min(count, limit)

    @cached_property
    def digest(self) -> str:
        """Of the shards, or of the files' bytes."""
        if self.parents:
            return self.parents["images"][1].digest
        return hashlib.sha256("".join(disk.sha256(p) for p in self.files).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[str, Pixels]:
        """Raises: IndexError beyond the last."""
        if number >= self.count:
            raise IndexError(number)
        if self.reader is not None:
            sample, content = self.reader.image(number)
            return f"{sample.key}-{file_name(Path(sample.source).stem)}", decode(content).pixels
        path = self.files[number]
        return f"{number:05d}-{file_name(path.stem)}", decode(path).pixels

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        return (self[number] for number in range(self.count))
