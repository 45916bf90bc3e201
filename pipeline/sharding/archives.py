"""The members of tar and zip archives, as places that can be read without unpacking. Archives may be hostile.

Names are only ever labels: nothing is written under them. Links, devices and folders are not images.
"""

import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import DataError, UnreachableError
from pipeline.storage import fetch
from pipeline.text import reason

# What a retry would not change
_FINAL = (
    tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, ImportError, FileNotFoundError,
    PermissionError,
)  # fmt: skip
SUFFIXES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Member:
    """`size` stored bytes at `offset` of an archive; `problem` says why it cannot be taken, if it cannot."""

    name: str
    offset: int
    size: int
    deflated: bool = False
    problem: str = ""


def members(archive: str) -> Iterator[Member]:
    """What is in an archive, in its order; where it is damaged, one last member says so.

    Raises: DataError if it is not an archive, or one that has to be unpacked to be read; UnreachableError if it is
    remote and unavailable now.
    """
    try:
        with fetch.opened(archive) as stream:
            if archive.lower().endswith(".zip"):
                yield from _zip(stream)
            elif archive.lower().endswith(".tar"):
                yield from _tar(stream)
            else:
                raise DataError(
                    f"{archive}: a compressed tar has to be read from its start for every image; unpack it to .tar first"
                )
    except DataError:
        raise
    except Exception as error:
        # Of the archive, or of the store that it is in
        if fetch.is_url(archive) and not _is_final(error):
            raise UnreachableError(f"{archive}: cannot be reached now ({reason(error)}); try again") from None
        raise DataError(f"{archive}: not a readable archive ({reason(error)})") from None


def _is_final(error: BaseException) -> bool:
    """Whether a retry of opening a remote archive would fail in the same way."""
    # fsspec says "not found" of a server that does not answer, too
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    # Only aiohttp's errors have one
    status = getattr(cause, "status", None)
    return isinstance(cause, _FINAL) or status in fetch.PERMANENT_STATUS


def _tar(stream: BinaryIO) -> Iterator[Member]:
    size = stream.seek(0, 2)
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        try:
            for entry in tar:
                if entry.isdir():
                    continue
                problem = "" if entry.isreg() and not entry.issparse() else "a link or device in an archive"
                if problem == "" and entry.offset_data + entry.size > size:
                    problem = "goes beyond the end of the archive"
                yield Member(entry.name, entry.offset_data, entry.size, problem=problem or _bad_name(entry.name))
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            yield Member(
                "(rest of the archive)", 0, 0, problem=f"the archive is damaged from here on ({reason(error)})"
            )


def _zip(stream: BinaryIO) -> Iterator[Member]:
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            problem = _bad_name(entry.filename)
            if entry.flag_bits & 1:
                problem = "encrypted"
            elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                problem = "compressed in an unusual way; expected stored or deflated"
            offset = 0
            if not problem:
                try:
                    offset = _zip_data_offset(stream, entry)
                except ValueError as error:
                    problem = reason(error)
            yield Member(entry.filename, offset, entry.compress_size, entry.compress_type != 0, problem)


def _zip_data_offset(stream: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its own header, whose length the directory does not hold."""
    stream.seek(entry.header_offset)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("its header in the archive is damaged")
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _bad_name(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    return "its name leads out of the archive" if name.startswith("/") or ".." in parts else ""
