"""Where images come from: folders, globs, archives, shards, lists, and whatever else fsspec opens.

A source becomes a list of items, each a file or a part of an archive that can be read by itself. Nothing is unpacked.
"""

import csv
import importlib.util
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

import fsspec
from pydantic import Field, PositiveFloat

from pipeline import redaction
from pipeline.config import Config
from pipeline.data.images import SUFFIXES
from pipeline.errors import DataError, UnreachableError
from pipeline.sharding import archives
from pipeline.sharding.items import Item
from pipeline.storage import fetch
from pipeline.storage.fetch import is_url
from pipeline.text import printable, reason

SAMPLES = "samples://photos"
LISTS = (".txt", ".csv", ".parquet")
# Protocols that a list may name; others may read what is not meant for it
LISTED = ("http", "https", "s3", "gs", "az")
# Of a CSV or Parquet list, the first that is there
COLUMNS = ("url", "path", "file", "image", "filename")

# What packages ship: the color images (of the stereo pair, one view), and a wheel of all hues, which these few lack
_SAMPLES: dict[str, dict[str, list[str]]] = {
    SAMPLES: {
        "skimage": [
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        ],
        "sklearn": ["china.jpg", "flower.jpg"],
    },
    "samples://hues": {"skimage": ["color.png"]},
}
_SAMPLE_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


class Source(Config):
    """One of several places that images come from."""

    name: str
    """Name of the source, recorded with each of its images."""
    path: str
    """Where its images are, as for `source`."""
    weight: PositiveFloat = Field(default=1.0, le=100)
    """How many times per epoch each of its images is used."""
    split: Literal["train", "valid", "test"] | None = None
    """The split that gets all of its images; null: by content."""
    known_dataset: str | None = None
    """Name of a known data set (docs/data.md) whose file names and sizes are checked."""
    allow_missing: bool = False
    """A failed check of the known data set is only a warning."""


def items(source: Source) -> Iterator[Item]:
    """Everything a source holds, in a stable order; hidden files and folders are left out.

    Raises: DataError if there is no such place, or nothing in it.
    """
    count = 0
    for count, item in enumerate(_items(source.path, source), 1):  # noqa: B007
        yield item
    if not count:
        raise DataError(f"{source.path}: holds no files; expected images ({', '.join(sorted(SUFFIXES))})")


def find_files(source: str) -> Iterator[Path]:
    """Every file of a folder, sorted, or the sample photos.

    Raises: DataError if there is no such folder, or no file in it.
    """
    if source in _SAMPLES:
        for package, names in _SAMPLES[source].items():
            yield from _sample_files(package, names)
        return
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{source}: no such folder; expected a folder of images, or {SAMPLES}")
    files = _files_below(folder)
    first = next(files, None)
    if first is None:
        raise DataError(f"{source}: the folder holds no files; expected images ({', '.join(sorted(SUFFIXES))})")
    yield first
    yield from files


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder in the order of their paths; links to folders and folders that may not be listed are left out."""
    try:
        with os.scandir(folder) as found:
            # Entries themselves would take three times the memory
            names = sorted((entry.name, _kind(entry)) for entry in found if not entry.name.startswith("."))
    except PermissionError:
        return
    for name, kind in names:
        path = folder / name
        if kind == "folder":
            yield from _files_below(path)
        elif kind == "file" or (kind == "link" and path.is_file()):
            yield path


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "file", "link", "other"]:
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "link" if entry.is_symlink() else "file" if entry.is_file(follow_symlinks=False) else "other"


def _items(path: str, source: Source) -> Iterator[Item]:
    suffix = PurePosixPath(path).suffix.lower()
    if path in _SAMPLES or (not is_url(path) and Path(path).is_dir()):
        if (shards := Path(path) / "artifact").is_dir() or (shards := Path(path) / "index.json").is_file():
            folder = shards if shards.is_dir() else shards.parent
            for tar in sorted(folder.glob("*.tar")):
                yield from _members(str(tar), source)
            return
        for file in find_files(path):
            yield from _one_of_many(str(file), source)
    elif any(mark in path for mark in "*?["):
        for name in _glob(path):
            yield from _one_of_many(name, source)
    elif suffix in LISTS:
        for name in _listed(path, suffix):
            if problem := _forbidden(name, path):
                yield _item(name, source, problem)
            else:
                yield from _one_of_many(name, source)
    elif is_url(path) and not suffix:
        for name in _below(path):
            yield from _one_of_many(name, source)
    elif is_url(path) or Path(path).is_file():
        yield from _one(path, source)
    else:
        raise DataError(
            f"{path}: no such folder, file or pattern; expected a folder of images, a glob, a .tar or .zip archive, "
            f"a .txt, .csv or .parquet list, a run folder of shards, a URL, or {SAMPLES}"
        )


def _one(name: str, source: Source) -> Iterator[Item]:
    """A file, or what is in it if it is an archive."""
    if name.lower().endswith(archives.SUFFIXES):
        yield from _members(name, source)
    else:
        yield _item(name, source)


def _one_of_many(name: str, source: Source) -> Iterator[Item]:
    """Likewise; an unreadable archive among other files is refused like an image.

    Raises: UnreachableError for one that is unavailable now, since what is refused here is never retried.
    """
    try:
        yield from _one(name, source)
    except UnreachableError:
        raise
    except DataError as error:
        yield _item(name, source, str(error).removeprefix(f"{name}: "))


def _item(name: str, source: Source, problem: str = "") -> Item:
    return Item(_label(name), source.name, name, weight=source.weight, problem=redaction.masked(problem))


def _label(name: str) -> str:
    """What to call a file in public tables: without the secrets of a signed URL, and without control characters."""
    return printable(redaction.masked(name))


def _forbidden(name: str, path: str) -> str:
    """Why an entry of the list at `path`, which may be untrusted, is not opened; "" if it is."""
    scheme, remote = name.partition("://")[0].lower(), is_url(name)
    if remote and scheme not in LISTED and not name.startswith(f"{path.rpartition('/')[0]}/"):
        return f"a list may not name {scheme}:// URLs, only {', '.join(f'{known}://' for known in LISTED)}"
    # `a::b` reads b, from anywhere, by way of a
    if remote and "::" in name and scheme not in ("http", "https"):
        return "a list may not name chains of protocols"
    return "a list on a server may not name files of this machine" if is_url(path) and not remote else ""


def _members(archive: str, source: Source) -> Iterator[Item]:
    for member in archives.members(archive):
        # Shards hold a record beside each image
        if member.name.endswith(".json") or _hidden(member.name):
            continue
        yield Item(
            f"{_label(archive)}/{printable(member.name)}",
            source.name,
            archive,
            member.offset,
            member.size,
            member.deflated,
            source.weight,
            member.problem,
        )


def _glob(pattern: str) -> list[str]:
    fs, path = _open(pattern)
    found = _listing(pattern, lambda: fs.glob(path))
    return [name if not is_url(pattern) else fs.unstrip_protocol(name) for name in found if fs.isfile(name)]


def _below(url: str) -> list[str]:
    """Every file below a URL of a store that can list."""
    fs, path = _open(url)
    found = _listing(url, lambda: fs.find(path))
    return [fs.unstrip_protocol(name) for name in found if not _hidden(name.removeprefix(path))]


def _listing(place: str, look: Callable[[], Iterable[str]]) -> list[str]:
    """What `look` finds, sorted. Raises: DataError that names the place."""
    try:
        return sorted(look())
    except Exception as error:
        # Stores raise errors of their own kinds
        raise DataError(f"{place}: cannot be listed ({reason(error)})") from None


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if not is_url(url):
        # absolute, since a relative one may look like one of fsspec's protocols
        path = Path(url).expanduser() if url.startswith("~/") else Path(url)
        return fsspec.filesystem("file"), str(path.absolute())
    try:
        return fetch.open_remote(url)
    except (ImportError, ValueError) as error:
        # A protocol that needs another package, or an unknown one
        raise DataError(f"{url}: {reason(error)}") from None


def _listed(path: str, suffix: str) -> Iterator[str]:
    """The entries of a list; relative ones are beside the list."""
    try:
        with fetch.opened(path) as stream:
            for name in map(str.strip, _names(path, suffix, stream)):
                if name and not name.startswith("#"):
                    here = is_url(name) or name.startswith("/")
                    yield name if here else path.rpartition("/")[0] + "/" * ("/" in path) + name
    except DataError:
        raise
    except Exception as error:
        # Of a store, of pyarrow, of decoding
        raise DataError(f"{path}: cannot be read as a list of images ({reason(error)})") from None


def _names(path: str, suffix: str, stream: BinaryIO) -> Iterator[str]:
    """What the lines of a list or its column say, a part of the file at a time."""
    if suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(stream)
        column = _column(path, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[column]):
            yield from map(str, batch.column(0).to_pylist())
        return
    text = io.TextIOWrapper(stream, encoding="utf-8")
    # Some separators of lines are known to `splitlines` alone
    lines = (part for line in text for part in line.splitlines())
    if suffix == ".csv":
        rows = csv.DictReader(lines)
        column = _column(path, list(rows.fieldnames or []))
        yield from (row[column] or "" for row in rows)
    else:
        yield from lines


def _column(path: str, columns: list[str]) -> str:
    for column in COLUMNS:
        if column in columns:
            return column
    raise DataError(f"{path}: columns {', '.join(columns)}; expected one called {', '.join(COLUMNS)}")


def _hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def _sample_files(package: str, names: list[str]) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"{SAMPLES}: the package {package!r} is not installed; `pip install 'illm-pipeline[demo]'`")
    folder = Path(spec.origin).parent / _SAMPLE_FOLDERS[package]
    return [folder / name for name in names]
