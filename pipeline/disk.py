"""Files on disk: written so that a crash leaves the old or the new one, read without waiting or filling the memory."""

import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from pipeline.errors import ArtifactError

MOST_BYTES = 2**30  # of a file that is read into memory


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading, never waiting for one that is a pipe.

    Raises: ArtifactError if it is a pipe, a socket or a device; OSError if it is not there.
    """
    refusal = ArtifactError(f"{path}: expected a plain file, found a pipe, a socket, a device or a folder")
    if path.exists() and not path.is_file():
        raise refusal
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refusal
    return os.fdopen(descriptor, "rb")


def content_of(path: Path, most: int = MOST_BYTES) -> bytes:
    """A whole file. Raises: ArtifactError if it has more than `most` bytes or is no plain file; OSError."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise ArtifactError(f"{path}: {size} bytes, expected {most} at most; make the artifact again")
        return stream.read(most)


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`, so that a reader or a crash sees the old or the new content and nothing between.

    Several threads or processes may write the same file at the same time; one of them wins.
    Raises: OSError that names `path`.
    """
    # 50 letters of the name: a whole one may be as long as a file system allows
    scratch = path.with_name(f".{path.name[:50]}.{os.getpid()}.{threading.get_ident()}.tmp")
    with naming(path, scratch):
        try:
            with scratch.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            scratch.rename(path)
        except BaseException:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


@contextmanager
def naming(path: Path, instead: Path | None = None) -> Iterator[None]:
    """Errors of the system that name no file, as those of a full disk, or the scratch file `instead`, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(instead)):
            error.filename, error.filename2 = str(path), None
        raise


def flush_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Locks an open file or folder against others until it is closed; whether that succeeded.

    The kernel frees the lock when the process dies. A file system without locks locks nothing, and everybody succeeds.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
