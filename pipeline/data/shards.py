"""WebDataset tars and their index: what they hold.

An artifact of kind "shards" holds `train-000000.tar`, ..., `valid-...` and `test-...`; beside each tar a table, one JSON
line per sample with the place of its bytes; and `index.json`, which the manifest covers and which covers tars and tables
by digest. So opening a data set of any size reads the index and no tar.
"""

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
StoredFormat = Literal["original", "webp", "jpeg", "pixels"]
# Hex digits of the image's SHA-256
KEY_LENGTH = 20


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One image in a shard: `size` bytes at `offset` of the tar, whose SHA-256 is `sha256`.

    plain_jpeg: what `decode_jpeg` takes. repeats: times per epoch.
    """

    key: str
    extension: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int
    # The file's name
    source: str
    dataset: str
    plain_jpeg: bool = False
    repeats: int = 1


@dataclass(frozen=True)
class Shard:
    """A tar file and its table. count: samples; draws: samples per epoch, where some may come twice."""

    file: str
    count: int
    draws: int
    bytes: int
    sha256: str
    table_bytes: int
    table_sha256: str

    @property
    def table(self) -> str:
        return self.file.removesuffix(".tar") + ".jsonl"
