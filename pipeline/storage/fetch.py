"""Bytes from anywhere fsspec reads: with retries, and resuming where a connection broke."""

import io
import random
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import fsspec

from pipeline.errors import DataError, UnreachableError
from pipeline.storage import disk
from pipeline.text import reason

if TYPE_CHECKING:
    import requests

# Attempts in a row without a single new byte
ATTEMPTS = 5
# For data that training cannot continue without: about three minutes
TRAINING_ATTEMPTS = 10
# Broken connections per file
MAX_BREAKS = 100
# Seconds before another attempt, doubling, with up to half of it at random
FIRST_RETRY_S, MAX_RETRY_S = 0.5, 30.0
CHUNK = 2**20
# Seconds without a byte
TIMEOUT = 60.0
_PROTOCOLS = re.compile(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://")
# Answers that a retry would not change
PERMANENT_STATUS = (400, 401, 403, 404, 405, 410, 451)


class _Gone(Exception):
    """A retry would not help."""


@dataclass(frozen=True)
class _Opened:
    """A file that is being received: from which byte on, how long it is if that is known, and its version."""

    start: int
    size: int | None
    version: str
    chunks: Iterator[bytes]


def is_url(name: str) -> bool:
    """Whether a name starts with a protocol, or with several of fsspec's, such as `zip::s3://`."""
    return _PROTOCOLS.match(name) is not None


def open_remote(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store of a URL and the file's name there. Raises: ImportError, ValueError if there is no such protocol."""
    # Where `::` is not a chain of protocols
    if url.startswith(("http://", "https://")):
        return fsspec.filesystem("http"), url
    return fsspec.core.url_to_fs(url)


def opened(location: str) -> BinaryIO:
    """The file at a path or URL. Raises: whatever the store raises."""
    if not is_url(location):
        return disk.open_regular(location)
    fs, path = open_remote(location)
    return fs.open(path, "rb")


def content(url: str, max_bytes: int = 2**30) -> bytes:
    """A whole small file. Raises: DataError if it cannot be fetched."""
    stream = io.BytesIO()
    pull(url, stream, max_bytes)
    return stream.getvalue()


def download(url: str, target: Path, size: int, sha256: str) -> None:
    """Writes a file of known size and digest to `target`; resumes from what an earlier attempt left beside it.

    Callers lock out others who download it. On a file system without locks each downloads a file of its own, and resumes nothing.
    Raises: DataError if it cannot be fetched or is another file.
    """
    resumable = disk.can_lock(target.parent)
    part = target.with_name(f"{target.name}.part" if resumable else f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        for last in (False, True):
            with part.open("ab") as stream:
                pull(url, stream, size, attempts=TRAINING_ATTEMPTS)
            if part.stat().st_size == size and disk.sha256(part) == sha256:
                part.rename(target)
                return
            found = part.stat().st_size
            part.unlink()
            if last:
                raise DataError(
                    f"{url}: {found} bytes that are not the {size} bytes of the index; make or copy it again"
                )
    finally:
        if not resumable:
            part.unlink(missing_ok=True)


def pull(url: str, stream: BinaryIO, max_bytes: int, offset: int = 0, size: int = -1, attempts: int = ATTEMPTS) -> None:
    """Appends to `stream` what it lacks of a file, or of its `size` bytes at `offset`; stops beyond `max_bytes`.

    Raises: UnreachableError if the file is unavailable, or all attempts failed.
    """
    failures, most, version = 0, stream.seek(0, io.SEEK_END), ""
    for _ in range(MAX_BREAKS):
        have = stream.seek(0, io.SEEK_END)
        if have == size:
            return
        try:
            with _opened(url, offset + have, offset + size if size >= 0 else None, version) as opened:
                if opened.start != offset + have:
                    if opened.start > offset:
                        raise _Gone("the server sends another part than the one requested")
                    stream.truncate(stream.seek(0))
                version = opened.version
                for chunk in opened.chunks:
                    stream.write(chunk)
                    if stream.tell() > max_bytes:
                        return
            expected = size if size >= 0 else opened.size
            if expected is None or stream.tell() >= expected:
                return
            raise ConnectionError(f"{stream.tell()} of {expected} bytes came")
        except (_Gone, FileNotFoundError, PermissionError, ImportError) as error:
            raise UnreachableError(f"{url}: cannot be fetched ({reason(error)})") from None
        except Exception as error:
            # Stores raise errors of their own kinds
            failures = 1 if stream.tell() > most else failures + 1
            most = max(most, stream.tell())
            if failures == attempts:
                why = reason(error)[:200]
                raise UnreachableError(f"{url}: cannot be fetched after {failures} attempts ({why})") from None
            pause = min(FIRST_RETRY_S * 2 ** (failures - 1), MAX_RETRY_S)
            time.sleep(pause * (1 + random.random() / 2))
    raise UnreachableError(f"{url}: cannot be fetched: the connection broke {MAX_BREAKS} times")


@contextmanager
def _opened(url: str, start: int, end: int | None, version: str) -> Iterator[_Opened]:
    if url.startswith(("http://", "https://")):
        with _http(url, start, end, version) as opened:
            yield opened
        return
    try:
        fs, path = open_remote(url)
    except ValueError as error:
        # An unknown protocol
        raise _Gone(reason(error)) from None
    with fs.open(path, "rb", block_size=CHUNK) as file:
        file.seek(start)
        size = fs.size(path)
        yield _Opened(start, size, version, _chunks(file, None if end is None else end - start))


def _chunks(file: BinaryIO, left: int | None) -> Iterator[bytes]:
    while chunk := file.read(CHUNK if left is None else min(CHUNK, left)):
        left = None if left is None else left - len(chunk)
        yield chunk


@contextmanager
def _http(url: str, start: int, end: int | None, version: str) -> Iterator[_Opened]:
    import requests
    from requests.exceptions import InvalidSchema, InvalidURL, TooManyRedirects

    headers = {"Accept-Encoding": "identity"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
        if version:
            headers["If-Range"] = version
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except InvalidSchema:
        # Requests follows redirects to http and https alone
        raise _Gone("the server redirects to another protocol than http and https") from None
    except (InvalidURL, TooManyRedirects) as error:
        raise _Gone(reason(error)) from None
    with response as answer:
        if answer.status_code in PERMANENT_STATUS:
            raise _Gone(f"the server answers {answer.status_code} {answer.reason}")
        # Nothing there: the file is no longer than what we have
        if answer.status_code == 416:
            yield _Opened(start, start, version, iter(()))
            return
        answer.raise_for_status()
        whole = answer.status_code != 206
        if whole and end is not None:
            raise _Gone("the server cannot send parts of a file, which reading an archive over HTTP needs")
        total = answer.headers.get("Content-Length" if whole else "Content-Range", "").rpartition("/")[2]
        tag = answer.headers.get("ETag", "")
        version = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
        size = int(total) if total.isdigit() else None
        yield _Opened(0 if whole else start, size, version, _received(answer))


def _received(answer: "requests.Response") -> Iterator[bytes]:
    """What comes, as it comes: reading in fixed pieces would lose a piece that a broken connection cannot fill."""
    from urllib3.exceptions import HTTPError

    try:
        while chunk := answer.raw.read1(CHUNK):
            yield chunk
    except HTTPError as error:
        raise ConnectionError(str(error)) from error
