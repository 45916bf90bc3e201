"""Writes one shard: a tar, and a table of what is in it."""

import hashlib
import json
import math
import os
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import webdataset as wds

from pipeline.data.images import decode, image_file
from pipeline.data.shards import KEY_LENGTH, Shard, ShardSample, StoredFormat
from pipeline.errors import DataError, UnreachableError
from pipeline.sharding import decode_limit
from pipeline.sharding.filters import AcceptedImage, RejectedFile
from pipeline.sharding.items import Item, read_item
from pipeline.sharding.plan import Plan
from pipeline.storage import disk
from pipeline.storage.disk import fsync_folder, sha256, write_atomic

# Longest side that the format has, in pixels; longer images are stored as they are
LONGEST = {"webp": 16383, "jpeg": 65500}


def write(plan: Plan, folder: Path) -> Shard | list[AcceptedImage]:
    """Writes a tar and its table into `folder`; their bytes follow from the plan alone. Does nothing if they exist.

    Returns: the shard, or the photos whose files changed or vanished since they were examined: then nothing is written.
    """
    if done := plan.done(folder):
        return done
    photos = plan.photos()
    # Another job may write the same shard
    scratch = disk.beside(folder / plan.file)
    try:
        return _write(plan, photos, folder, scratch)
    finally:
        scratch.unlink(missing_ok=True)


def _write(
    plan: Plan, photos: list[tuple[AcceptedImage, Item]], folder: Path, scratch: Path
) -> Shard | list[AcceptedImage]:
    """Likewise, by way of the file `scratch`."""
    changed: list[AcceptedImage] = []
    rows = []
    # Fixed owner and time make the tar a function of its content alone. An open file, since webdataset runs a path that
    # looks like `pipe:command` as a command.
    with (
        scratch.open("wb") as stream,
        wds.TarWriter(stream, mtime=0, user="illm", group="illm", mode=0o444) as writer,
    ):
        for photo, item in photos:
            original = _original(photo, item, plan)
            if original is None:
                changed.append(photo)
                continue
            with decode_limit.for_image(photo.width * photo.height, Path(plan.spool)):
                content, extension, plain = _stored(original, photo, plan.store)
            row = ShardSample(
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
        return changed
    with tarfile.open(scratch) as tar:
        places = {member.name: member.offset_data for member in tar}
    for line in rows:
        line["offset"] = places[f"{line['key']}.{line['extension']}"]
    table = "".join(json.dumps(line) + "\n" for line in rows).encode()
    digest = hashlib.sha256(table).hexdigest()
    draws = sum(photo.repeats for photo, _ in photos)
    shard = Shard(plan.file, len(rows), draws, scratch.stat().st_size, sha256(scratch), len(table), digest)
    write_atomic(folder / shard.table, table)
    with scratch.open("rb") as written:
        os.fsync(written.fileno())
    scratch.rename(folder / plan.file)
    fsync_folder(folder)
    write_atomic(folder / f"{plan.file}.done", json.dumps([plan.digest, asdict(shard)]).encode())
    return shard


def _original(photo: AcceptedImage, item: Item, plan: Plan) -> bytes | None:
    """The bytes that were examined; None if they are no longer there. Raises: UnreachableError if a server is unavailable."""
    spooled = Path(plan.spool) / photo.sha256
    try:
        content = spooled.read_bytes() if spooled.is_file() else read_item(item, plan.max_bytes)
    except UnreachableError:
        raise
    except DataError:
        return None
    return content if hashlib.sha256(content).hexdigest() == photo.sha256 else None


def _stored(content: bytes, photo: AcceptedImage, store: StoredFormat) -> tuple[bytes, str, bool]:
    """What goes into the tar: bytes, extension, and whether they are a plain JPEG file."""
    if store == "original" or max(photo.width, photo.height) > LONGEST.get(store, math.inf):
        return content, photo.extension, photo.plain_jpeg
    pixels = decode(content, photo.width * photo.height).pixels
    if store == "webp":
        return image_file(pixels, "WEBP", lossless=True, quality=50, method=4), "webp", False
    if store == "jpeg":
        return image_file(pixels, "JPEG", quality=95, subsampling=0), "jpg", True
    return image_file(pixels, "PPM"), "ppm", False


def assemble(
    work: Path, written: list[Shard], index: dict[str, Any], refused: Iterable[RejectedFile], scratch: Path
) -> None:
    """Links tars and tables into the artifact's folder and writes the index, with the refused files as its last entry."""
    for shard in written:
        for name in (shard.file, shard.table):
            try:
                os.link(work / name, scratch / name)
            except OSError:
                # A file system without links
                shutil.copyfile(work / name, scratch / name)
            (scratch / name).chmod(0o444)
    with (scratch / "index.json").open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(index, indent=1).removesuffix("\n}") + ',\n "refused": [')
        end = "]"
        for refusal, comma in zip(refused, chain([""], repeat(",")), strict=False):
            text = json.dumps(asdict(refusal), indent=1).replace("\n", "\n  ")
            stream.write(f"{comma}\n  {text}")
            end = "\n ]"
        stream.write(f"{end}\n}}")
