"""Files on disk: written so that a crash leaves the old or the new one, read without waiting or filling the memory."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

# Largest file that is read into memory, in bytes
MAX_BYTES = 2**30


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file, whatever its name looks like, opened for reading; never waits for a pipe.

    Raises: OSError if it cannot be opened or is something else, such as a FIFO, which nobody may ever write to.
    """
    try:
        # Opening a device may do something
        _refuse_special(Path(path).stat().st_mode, path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            # It may have been replaced meanwhile
            _refuse_special(os.fstat(descriptor).st_mode, path)
        except OSError:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")
    except ValueError as error:
        # A NUL byte in the name
        raise OSError(errno.EINVAL, str(error)) from None


def _refuse_special(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "a FIFO, socket or device", str(path))


def content_of(path: Path, most: int = MAX_BYTES) -> bytes:
    """A whole file. Raises: OSError if it has more than `most` bytes or is not a regular file."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size} bytes, expected {most} at most", str(path))
        return stream.read(most)


def write_atomic(path: Path, content: bytes, private: bool = False) -> None:
    """Replaces `path` by `content`, as `atomic_writer` does."""
    with atomic_writer(path, private) as stream:
        stream.write(content)


@contextmanager
def atomic_writer(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """Replaces `path` by what is written, so that a reader or a crash sees the old or the new content and nothing between.

    private: only its owner may read it, from the first moment on. Several threads or processes may write the same file at
    the same time; one of them wins.
    Raises: OSError that names `path`.
    """
    # 50 letters of the name: a whole one may be as long as a file system allows
    scratch = path.with_name(f".{path.name[:50]}.{os.getpid()}.{threading.get_ident()}.tmp")
    with naming(path, scratch):
        try:
            mode = 0o600 if private else 0o666
            with open(scratch, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            scratch.rename(path)
        except BaseException:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


@contextmanager
def naming(path: Path, instead: Path | None = None) -> Iterator[None]:
    """Errors of the system that name no file, as those of a full disk, or the scratch file `instead`, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(instead)):
            error.filename, error.filename2 = str(path), None
        raise


def fsync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file or folder against others until it is closed; whether that succeeded.

    wait: until the others are done. The kernel frees the lock when the process dies. A file system without locks locks
    nothing, and everybody succeeds.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def can_lock(folder: Path) -> bool:
    """Whether the file system that holds a folder has locks."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@contextmanager
def exclusive_lock(path: Path, while_waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Others who ask for the lock on the same file or folder wait until the end of the block. A file is made, and stays.

    while_waiting: called four times a second while others hold it; what it raises ends the wait. A file system without locks
    locks nothing.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        while not lock(descriptor, wait=while_waiting is None):
            assert while_waiting is not None
            while_waiting()
            time.sleep(0.25)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder(target: Path, private: bool = False) -> Iterator[Path]:
    """A new folder beside `target`, locked while it is written; it is gone afterwards unless it was renamed.

    private: only its owner may read it. What killed processes left there is removed, but not what a live one writes; on a
    file system without locks, which cannot tell them apart, nothing is.
    """
    _remove_leftovers(target)
    scratch, descriptor = _new_locked(target, 0o700 if private else 0o777)
    try:
        yield scratch
    finally:
        os.close(descriptor)
        shutil.rmtree(scratch, ignore_errors=True)


def _new_locked(target: Path, mode: int) -> tuple[Path, int]:
    """A new folder beside `target`, and its descriptor, which holds its lock."""
    while True:
        scratch = beside(target)
        scratch.mkdir(mode)
        # Before it is locked, others take it for a leftover
        with suppress(FileNotFoundError):
            descriptor = os.open(scratch, os.O_RDONLY)
            if lock(descriptor) and scratch.is_dir():
                return scratch, descriptor
            os.close(descriptor)


def beside(target: Path) -> Path:
    """A hidden name that nothing has, in the folder of `target`."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"


def _remove_leftovers(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.*"):
        # Somebody else removed it or writes it, or there are no locks
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover)
            finally:
                os.close(descriptor)


# Environment: how long to wait for a file that has to be there; the job scripts set it
WAIT_ENV = "ILLM_FILE_WAIT_S"


def wait_for_file(*paths: Path) -> bool:
    """Whether one of the files is there, now or within the timeout."""
    deadline = time.monotonic() + float(os.environ.get(WAIT_ENV) or 0)
    while not any(path.is_file() for path in paths):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
        for folder in {folder for path in paths for folder in (path.parent.parent, path.parent)}:
            if folder.is_dir():
                # Listing a folder makes NFS refresh its cache
                list(folder.iterdir())
    return True
