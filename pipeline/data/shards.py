"""WebDataset tars and their index: dividing images among them, and writing one.

An artifact of kind "shards" holds `train-000000.tar`, ..., `valid-...` and `test-...`; beside each tar a table, one JSON
line per sample with the place of its bytes; and `index.json`, which the manifest covers and which covers tars and tables
by digest. So opening a data set of any size reads the index and no tar.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import webdataset as wds
from PIL import Image

from pipeline.data import fetch, room
from pipeline.data.examine import Photo
from pipeline.data.images import decode
from pipeline.data.sources import Item
from pipeline.disk import flush_folder, sha256, write_durably
from pipeline.errors import DataError, UnreachableError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Store = Literal["original", "webp", "jpeg", "pixels"]
KEY_LENGTH = 20  # hex digits of the image's SHA-256


@dataclass(frozen=True, slots=True)
class Sample:
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
    source: str  # the file's name
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


@dataclass(frozen=True)
class Plan:
    """A shard to be written: its file name and its photos, in order, each with where its bytes are."""

    file: str
    photos: list[tuple[Photo, Item]]
    store: Store
    max_bytes: int
    spool: str  # folder with the bytes of what was fetched

    @property
    def digest(self) -> str:
        """Of what the shard's bytes follow from."""
        rows = [f"{photo.sha256} {photo.repeats} {photo.dataset} {photo.path}" for photo, _ in self.photos]
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


def split_photos(
    photos: list[Photo], validation_share: float, test_share: float = 0.0, fixed: Mapping[str, Split] | None = None
) -> dict[Split, list[Photo]]:
    """Splits by a hash of what an image looks like: it falls on the same side whatever else there is.

    fixed: data set -> the side that its images are on, and what looks like them.
    Two images or more give training and validation at least one each, so that small folders work.
    """
    splits: dict[Split, list[Photo]] = {"train": [], "valid": [], "test": []}
    places = {photo.group: side for photo in photos if (side := (fixed or {}).get(photo.dataset))}
    for photo in photos:
        if photo.group in places:
            splits[(fixed or {}).get(photo.dataset) or places[photo.group]].append(photo)
            continue
        place = _split_hash(photo) / 2**32
        valid, test = place < validation_share, place < validation_share + test_share
        splits["valid" if valid else "test" if test else "train"].append(photo)
    train, valid_photos = splits["train"], splits["valid"]
    for empty, full in ((valid_photos, train), (train, valid_photos)):
        if not empty and len({p.group for p in full}) > 1 and validation_share > 0 and not places:
            full.sort(key=_split_hash, reverse=empty is train)
            moved = full[0].group
            empty += [photo for photo in full if photo.group == moved]
            full[:] = sorted((photo for photo in full if photo.group != moved), key=lambda p: p.sha256)
    return splits


def in_shards(photos: Sequence[Photo], shard_bytes: int) -> Iterator[list[Photo]]:
    """Consecutive photos, in groups of about `shard_bytes`."""
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


def write(plan: Plan, folder: Path) -> Shard | list[Photo]:
    """Writes a tar and its table into `folder`; their bytes follow from the plan alone. Done before: does nothing.

    Returns: the shard, or the photos whose files changed or vanished since they were examined: then nothing is written.
    """
    if done := plan.done(folder):
        return done
    changed: list[Photo] = []
    scratch = folder / f".{plan.file}"
    rows = []
    # Fixed owner and time make the tar a function of its content alone. An open file, since webdataset runs a path that
    # looks like `pipe:command` as a command.
    with (
        scratch.open("wb") as stream,
        wds.TarWriter(stream, mtime=0, user="illm", group="illm", mode=0o444) as writer,
    ):
        for photo, item in plan.photos:
            original = _original(photo, item, plan)
            if original is None:
                changed.append(photo)
                continue
            with room.for_image(photo.width * photo.height, Path(plan.spool)):
                content, extension, plain = _stored(original, photo, plan.store)
            row = Sample(
                photo.sha256[:KEY_LENGTH],
                extension,
                0,
                len(content),
                hashlib.sha256(content).hexdigest(),
                photo.width,
                photo.height,
                photo.path.rsplit("/", 1)[-1],
                photo.dataset,
                plain,
                photo.repeats,
            )
            rows.append(asdict(row))
            about = {name: rows[-1][name] for name in ("width", "height", "sha256", "source", "dataset")}
            writer.write({"__key__": row.key, extension: content, "json": about})
    if changed:
        scratch.unlink()
        return changed
    with tarfile.open(scratch) as tar:
        places = {member.name: member.offset_data for member in tar}
    for line in rows:
        line["offset"] = places[f"{line['key']}.{line['extension']}"]
    table = "".join(json.dumps(line) + "\n" for line in rows).encode()
    digest = hashlib.sha256(table).hexdigest()
    draws = sum(photo.repeats for photo, _ in plan.photos)
    shard = Shard(plan.file, len(rows), draws, scratch.stat().st_size, sha256(scratch), len(table), digest)
    write_durably(folder / shard.table, table)
    with scratch.open("rb") as written:
        os.fsync(written.fileno())
    scratch.rename(folder / plan.file)
    flush_folder(folder)
    (folder / f"{plan.file}.done").write_text(json.dumps([plan.digest, asdict(shard)]))
    return shard


def _original(photo: Photo, item: Item, plan: Plan) -> bytes | None:
    """The bytes that were examined; None if they are no longer there. Raises: UnreachableError if a server is gone."""
    spooled = Path(plan.spool) / photo.sha256
    try:
        content = spooled.read_bytes() if spooled.is_file() else fetch.read(item, plan.max_bytes)
    except UnreachableError:
        raise
    except DataError:
        return None
    return content if hashlib.sha256(content).hexdigest() == photo.sha256 else None


def _stored(content: bytes, photo: Photo, store: Store) -> tuple[bytes, str, bool]:
    """What goes into the tar: bytes, extension, and whether they are a plain JPEG file."""
    if store == "original":
        return content, photo.extension, photo.plain_jpeg
    stream = io.BytesIO()
    image = Image.fromarray(decode(content, photo.width * photo.height).pixels)
    if store == "webp":
        image.save(stream, "WEBP", lossless=True, quality=50, method=4)
        return stream.getvalue(), "webp", False
    if store == "jpeg":
        image.save(stream, "JPEG", quality=95, subsampling=0)
        return stream.getvalue(), "jpg", True
    image.save(stream, "PPM")
    return stream.getvalue(), "ppm", False


def _split_hash(photo: Photo) -> int:
    return int(hashlib.sha256(f"split {photo.group}".encode()).hexdigest()[:8], 16)


def assemble(work: Path, written: list[Shard], index: dict[str, Any], scratch: Path) -> None:
    """Links tars and tables into the artifact's folder and writes the index."""
    for shard in written:
        for name in (shard.file, shard.table):
            try:
                os.link(work / name, scratch / name)
            except OSError:  # a file system without links
                shutil.copyfile(work / name, scratch / name)
            (scratch / name).chmod(0o444)
    (scratch / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
