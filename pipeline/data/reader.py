"""Reading shards back, by number or in order, with every byte checked."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.artifacts.artifact import Artifact, refuse_outside
from pipeline.data.images import EXTENSIONS, Pixels, decode, decode_jpeg
from pipeline.data.shards import KEY_LENGTH, Shard, ShardSample, Split
from pipeline.data.windows import Window, decode_window
from pipeline.errors import DataError, UnreachableError
from pipeline.storage import disk
from pipeline.storage.cache import ShardCache
from pipeline.text import printable, reason

TABLES_KEPT = 128
_TAR_NAME = re.compile(r"(train|valid|test)-\d{6}\.tar")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")


class ShardReader:
    """One split of a shards artifact. A sample that comes n times per epoch has n numbers. Safe to use from threads.

    Raises: DataError if a shard is missing, its size differs from the index or is more than the cache may hold, or a sample's
    digest
    is wrong; UnreachableError if it cannot be read now.
    """

    def __init__(self, artifact: Artifact, split: Split, cache_gb: float = 50.0):
        self.folder = artifact.path
        self.cache = ShardCache(artifact.origin, int(cache_gb * 1e9)) if artifact.origin else None
        try:
            self.shards = [Shard(**entry) for entry in artifact.json("index.json")["splits"].get(split, [])]
        except (KeyError, TypeError):
            raise DataError(
                f"{self.folder / 'index.json'}: written by another version; make the shards again"
            ) from None
        # Numbers in each shard
        self.draws = [shard.draws for shard in self.shards]
        self._starts = np.cumsum([0, *self.draws])
        for shard in self.shards:
            _check(None if self.cache else self.folder, shard)
            if self.cache:
                self.cache.check_size(shard.file, shard.bytes)
        self._table = lru_cache(TABLES_KEPT)(self._read_table)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, number: int) -> tuple[Shard, ShardSample]:
        """The sample of that number, and its shard."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        rows, order = self._table(place)
        return self.shards[place], rows[order[number - int(self._starts[place])]]

    def name(self, number: int) -> str:
        """The name of a sample in messages."""
        return self._name(*self.sample(number))

    def _name(self, shard: Shard, sample: ShardSample) -> str:
        place = f"{self.cache.origin}/{shard.file}" if self.cache else self.folder / shard.file
        return printable(f"{place}: {sample.key}.{sample.extension} (from {sample.source})")

    def read(self, number: int) -> bytes:
        """The image file's bytes, equal to what was stored."""
        return self._bytes(*self.sample(number))

    def _bytes(self, shard: Shard, sample: ShardSample) -> bytes:
        try:
            if self.cache:
                content = self.cache.read(shard.file, shard.bytes, shard.sha256, sample.offset, sample.size)
            else:
                file = os.open(f"{self.folder}/{shard.file}", os.O_RDONLY)
                try:
                    content = os.pread(file, sample.size, sample.offset)
                finally:
                    os.close(file)
        except OSError as error:
            raise UnreachableError(f"{self._name(shard, sample)}: cannot be read ({error.strerror})") from None
        if hashlib.sha256(content).hexdigest() != sample.sha256:
            raise DataError(f"{self._name(shard, sample)}: its bytes differ from the index; the shard is damaged")
        return content

    def pixels(self, number: int, shrink: int = 1) -> Pixels:
        """The decoded image; if it is a plain JPEG file, at 1 / shrink of its size (see `decode_jpeg`)."""
        shard, sample = self.sample(number)
        content = self._bytes(shard, sample)
        if sample.plain_jpeg:
            return decode_jpeg(content, sample.width, sample.height, shrink)
        return decode(content).pixels

    def part(self, number: int, window: Window, shrink: int = 1) -> Pixels:
        """What `pixels` has in that window; of a plain JPEG file at its own size with as little of the rest as pays."""
        shard, sample = self.sample(number)
        if sample.plain_jpeg and shrink == 1:
            return decode_window(self._bytes(shard, sample), sample.width, sample.height, window)
        return window.of(self.pixels(number, shrink))

    def image(self, number: int) -> tuple[ShardSample, bytes]:
        """The image of that number among all of them, each counted once. Raises: IndexError beyond the last."""
        for place, shard in enumerate(self.shards):
            if number < shard.count:
                sample = self._table(place)[0][number]
                return sample, self._bytes(shard, sample)
            number -= shard.count
        raise IndexError(number)

    def first(self, count: int) -> Iterator[tuple[ShardSample, bytes]]:
        """The first `count` images in order, each once."""
        return (self.image(number) for number in range(min(count, sum(shard.count for shard in self.shards))))

    def _read_table(self, place: int) -> tuple[list[ShardSample], list[int]]:
        """A shard's samples, and for each of its numbers which of them it is."""
        shard = self.shards[place]
        path = f"{self.cache.origin}/{shard.table}" if self.cache else self.folder / shard.table
        try:
            if self.cache:
                size = shard.table_bytes
                content = self.cache.read(shard.table, size, shard.table_sha256, 0, size)
            else:
                content = disk.content_of(self.folder / shard.table, shard.table_bytes)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({reason(error)}); make the shards again") from None
        if hashlib.sha256(content).hexdigest() != shard.table_sha256:
            raise DataError(f"{path}: its SHA-256 differs from the index (damaged); make the shards again")
        try:
            rows = [ShardSample(**json.loads(line)) for line in content.splitlines()]
            sound = len(rows) == shard.count and all(map(_sound, rows))
        except (ValueError, TypeError):
            sound = False
        if not sound:
            raise DataError(f"{path}: not a table of samples of this version; make the shards again")
        return rows, [i for i, row in enumerate(rows) for _ in range(row.repeats)]

    def prepare(self, places: list[int]) -> None:
        """Fetches these shards in the background, if they are elsewhere."""
        if self.cache:
            for shard in (self.shards[place] for place in places):
                self.cache.want(shard.file, shard.bytes, shard.sha256)


def samples_of(folder: Path, shard: Shard) -> Iterator[tuple[ShardSample, bytes]]:
    """The samples of a shard in a local folder, in order, as its table places them."""
    with (folder / shard.file).open("rb") as tar, (folder / shard.table).open("rb") as table:
        for line in table:
            sample = ShardSample(**json.loads(line))
            tar.seek(sample.offset)
            yield sample, tar.read(sample.size)


def _sound(row: ShardSample) -> bool:
    """Whether a row, which may come from elsewhere, can be used: its key becomes the name of a file."""
    known = row.extension in EXTENSIONS.values() and _KEY.fullmatch(row.key)
    return bool(known and row.repeats >= 1 and row.size >= 0 and row.offset >= 0)


def _check(folder: Path | None, shard: Shard) -> None:
    """Names and, of a local shard, that tar and table are regular files of their sizes and inside the folder."""
    # Names of files in the cache
    if not (_DIGEST.fullmatch(shard.sha256) and _DIGEST.fullmatch(shard.table_sha256)):
        raise DataError(f"{folder or ''}/index.json: {shard.sha256!r} is not a SHA-256; make the shards again")
    if not _TAR_NAME.fullmatch(shard.file):
        raise DataError(f"{folder or ''}/index.json: {shard.file!r} is not the name of a shard; make the shards again")
    if folder is None:
        return
    for name, expected in ((shard.file, shard.bytes), (shard.table, shard.table_bytes)):
        path = folder / name
        refuse_outside(folder, name)
        if not path.is_file():
            what = "not a regular file" if path.exists() else "missing, but the index lists it"
            raise DataError(f"{path}: {what}; make the shards again")
        if (size := path.stat().st_size) != expected:
            raise DataError(f"{path}: {size} bytes, expected {expected} (truncated or changed); make the shards again")
