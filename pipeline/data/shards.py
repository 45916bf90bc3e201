"""WebDataset tars and their index: writing them from image files, and reading them back with every byte checked.

An artifact of kind "shards" holds `train-000000.tar`, ... and `valid-000000.tar`, ...; beside each tar a JSON table of
its samples with the place of every image's bytes; and `index.json`. The manifest covers tables and index, the index
covers the tars, so that opening a data set of any size reads no tar.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import webdataset as wds
from PIL import Image

from pipeline.artifacts import Artifact, sha256
from pipeline.data import transforms
from pipeline.data.sources import SUFFIXES
from pipeline.errors import DataError

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp"}
_TAR_NAME = re.compile(r"(train|valid)-\d{6}\.tar")


@dataclass(frozen=True)
class Photo:
    """An image file that was examined and accepted."""

    path: str
    extension: str
    size: int  # bytes
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Refusal:
    """An image file that was not accepted, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One image in a shard: its file's bytes are `size` bytes at `offset` of the tar."""

    key: str
    extension: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int
    source: str


@dataclass(frozen=True)
class Shard:
    """A tar file: its name in the artifact, its number of samples, its bytes and its digest."""

    file: str
    count: int
    bytes: int
    sha256: str


def examine(path: Path, min_side: int) -> Photo | Refusal:
    """Decodes one file to see that it is a whole image of at least `min_side` pixels on its shorter side."""
    if path.suffix.lower() not in SUFFIXES:
        return Refusal(str(path), f"not an image ({path.suffix or 'no suffix'})")
    try:
        content = path.read_bytes()
        if not content:
            return Refusal(str(path), "unreadable: zero bytes")
        height, width = transforms.decode(content).pixels.shape[:2]
        with Image.open(io.BytesIO(content)) as image:
            extension = _EXTENSIONS.get(image.format or "")
    except (DataError, OSError) as error:
        return Refusal(str(path), f"unreadable: {error}")
    if extension is None:
        return Refusal(str(path), f"not an image of a known format, though named {path.suffix}")
    if min(height, width) < min_side:
        return Refusal(str(path), f"too small: {width}x{height}, shorter side below {min_side}")
    return Photo(str(path), extension, len(content), hashlib.sha256(content).hexdigest(), width, height)


def without_duplicates(results: Iterable[Photo | Refusal]) -> tuple[list[Photo], list[Refusal]]:
    """Accepted photos in the order of their digests, which mixes folders and ignores names; and the refused files."""
    first: dict[str, Photo] = {}
    refused = []
    for result in results:
        if isinstance(result, Refusal):
            refused.append(result)
        elif result.sha256 in first:
            refused.append(Refusal(result.path, f"same bytes as {first[result.sha256].path}"))
        else:
            first[result.sha256] = result
    return [first[digest] for digest in sorted(first)], refused


def split_photos(photos: list[Photo], validation_share: float) -> dict[Split, list[Photo]]:
    """Splits by content hash: the same image falls on the same side whatever else there is.

    Two images or more give both sides at least one, so that small folders work.
    """
    bound = validation_share * 2**32
    valid = [p for p in photos if _split_hash(p) < bound]
    train = [p for p in photos if _split_hash(p) >= bound]
    for empty, full in ((valid, train), (train, valid)):
        if not empty and len(full) > 1 and validation_share > 0:
            full.sort(key=_split_hash, reverse=empty is train)
            empty.append(full.pop(0))
            full.sort(key=lambda p: p.sha256)
    return {"train": train, "valid": valid}


def write(
    folder: Path, splits: dict[Split, list[Photo]], refused: list[Refusal], shard_bytes: int, workers: int
) -> None:
    """Writes tars of about `shard_bytes`, their tables and `index.json`. The bytes do not depend on `workers`."""
    jobs = [
        (folder / f"{split}-{number:06d}.tar", group)
        for split, photos in splits.items()
        for number, group in enumerate(_groups(photos, shard_bytes))
    ]
    with ThreadPoolExecutor(workers) as pool:
        shards = list(pool.map(_write_tar, *zip(*jobs, strict=True))) if jobs else []
    index = {
        "splits": {split: [asdict(shard) for shard in shards if shard.file.startswith(split)] for split in SPLITS},
        "refused": [asdict(r) for r in refused],
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


class ShardReader:
    """Random and sequential access to one split of a shards artifact.

    Raises: DataError if a shard is missing or its size differs from the index, or a sample's digest is wrong.
    """

    def __init__(self, artifact: Artifact, split: Split):
        self.folder = artifact.path
        self.shards = [Shard(**entry) for entry in artifact.json("index.json")["splits"][split]]
        self.samples: list[tuple[str, Sample]] = []
        for shard in self.shards:
            self._check(shard)
            table = artifact.json(_table_name(shard.file))
            self.samples += [(shard.file, Sample(**row)) for row in table]
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """What to call a sample when telling the user about it."""
        file, sample = self.samples[index]
        return f"{self.folder / file}: {sample.key}.{sample.extension} (from {sample.source})"

    def read(self, index: int) -> bytes:
        """The image file's bytes, equal to the original file's."""
        file, sample = self.samples[index]
        content = os.pread(self._descriptor(file), sample.size, sample.offset)
        if hashlib.sha256(content).hexdigest() != sample.sha256:
            raise DataError(f"{self.name(index)}: its bytes differ from the index; the shard is damaged")
        return content

    def first(self, count: int) -> Iterator[tuple[Sample, bytes]]:
        """The first `count` samples in order, through webdataset's own reader."""
        tars = [str(self.folder / shard.file) for shard in self.shards]
        known = {sample.key: sample for _, sample in self.samples}
        for item in islice(wds.WebDataset(tars, shardshuffle=False), count) if tars else []:
            sample = known[item["__key__"]]
            content = item[sample.extension]
            if hashlib.sha256(content).hexdigest() != sample.sha256:
                raise DataError(f"{item['__url__']}: {sample.key} is damaged; make the shards again")
            yield sample, content

    def _check(self, shard: Shard) -> None:
        if not _TAR_NAME.fullmatch(shard.file):
            raise DataError(f"{self.folder / 'index.json'}: {shard.file!r} is no name of a shard")
        path = self.folder / shard.file
        if not path.is_file():
            raise DataError(f"{path}: missing, but the index lists it; make the shards again")
        if (size := path.stat().st_size) != shard.bytes:
            raise DataError(
                f"{path}: {size} bytes, expected {shard.bytes} (truncated or changed); make the shards again"
            )

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._open[file]


def _split_hash(photo: Photo) -> int:
    return int(hashlib.sha256(f"split {photo.sha256}".encode()).hexdigest()[:8], 16)


def _groups(photos: list[Photo], shard_bytes: int) -> Iterator[list[Photo]]:
    group: list[Photo] = []
    filled = 0
    for photo in photos:
        group.append(photo)
        filled += photo.size
        if filled >= shard_bytes:
            yield group
            group, filled = [], 0
    if group:
        yield group


def _table_name(tar: str) -> str:
    return tar.removesuffix(".tar") + ".json"


def _write_tar(target: Path, photos: list[Photo]) -> Shard:
    by_key = {photo.sha256[:16]: photo for photo in photos}
    # Fixed owner and time make the tar a function of its content alone.
    with wds.TarWriter(str(target), mtime=0, user="illm", group="illm", mode=0o444) as writer:
        for key, photo in by_key.items():
            content = Path(photo.path).read_bytes()
            if hashlib.sha256(content).hexdigest() != photo.sha256:
                raise DataError(f"{photo.path}: changed while it was being sharded; run the stage again")
            about = {
                "width": photo.width,
                "height": photo.height,
                "sha256": photo.sha256,
                "source": Path(photo.path).name,
            }
            writer.write({"__key__": key, photo.extension: content, "json": about})
    with tarfile.open(target) as tar:
        places = {member.name: member.offset_data for member in tar}
    table = [
        Sample(key, p.extension, places[f"{key}.{p.extension}"], p.size, p.sha256, p.width, p.height, Path(p.path).name)
        for key, p in by_key.items()
    ]
    (target.parent / _table_name(target.name)).write_text(json.dumps([asdict(s) for s in table]), encoding="utf-8")
    return Shard(target.name, len(photos), target.stat().st_size, sha256(target))
