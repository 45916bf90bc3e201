"""Files that commands write for a user: nothing is replaced unless that is requested, and a place is checked before the work."""

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from pipeline.errors import UserError
from pipeline.storage import disk

# Exit code of a program that SIGPIPE ended, which is what a shell expects of a closed pipe
CLOSED_PIPE = 128 + 13
_STDOUT = ("-", "/dev/stdout", "/dev/fd/1")


class OutputError(UserError):
    """An output that cannot be written, or that would replace something."""


def named(name: str) -> Path | None:
    """The path of an output that the user calls `name`; None is standard output."""
    return None if name in _STDOUT else Path(name)


def identity(path: Path) -> tuple[int, int]:
    """Device and inode: the same for all names and links of a file."""
    found = path.stat()
    return found.st_dev, found.st_ino


def is_folder(path: Path) -> bool:
    """Whether a folder is there; any name is accepted, even one that is too long."""
    return stat.S_ISDIR(_mode(path))


def is_special(path: Path) -> bool:
    """Whether a pipe, a device or the like is there, which is written into and never replaced."""
    mode = _mode(path)
    return bool(mode) and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check(path: Path | None, force: bool, inputs: Collection[tuple[int, int]] = ()) -> None:
    """Whether `path` can be written, without leaving anything there.

    force: what is there may be replaced. inputs: identities of files that may not be, even so.
    Raises: OutputError.
    """
    if path is None:
        if sys.stdout.isatty():
            raise OutputError("binary data does not go to a terminal; name a file, or a pipe after it")
        return
    refuse_to_replace(path, force, inputs)
    if not is_special(path):
        _check_folder(path)
    elif not os.access(path, os.W_OK):
        _cannot(path, os.strerror(errno.EACCES))


def refuse_to_replace(path: Path, force: bool, inputs: Collection[tuple[int, int]] = ()) -> None:
    """Raises: OutputError if something is at `path`, or where it links to, that must stay."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        _cannot(path, error.strerror)
    if stat.S_ISDIR(mode) or stat.S_ISSOCK(mode):
        raise OutputError(f"{path}: is a {'folder' if stat.S_ISDIR(mode) else 'socket'}; name a file")
    if identity(path) in inputs:
        raise OutputError(f"{path}: is an input, which is never overwritten; name another output")
    # pipes and character devices hold nothing that could be lost
    if not force and not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        raise OutputError(f"{path}: exists already; --force replaces it, or name another output")


def write(path: Path | None, content: bytes, force: bool = False) -> None:
    """Writes an output. A file is replaced at once and whole, where a link leads; pipes and devices are written into.

    Raises: OutputError if it came to be there since it was checked; OSError that names it; SystemExit if the pipe is closed.
    """
    try:
        if path is None:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        elif is_special(path):
            with os.fdopen(os.open(path, os.O_WRONLY), "wb") as stream:
                stream.write(content)
        else:
            refuse_to_replace(path, force)
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            disk.write_atomic(target, content)
    except BrokenPipeError:
        raise SystemExit(CLOSED_PIPE) from None
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path or "standard output")) from None


def _mode(path: Path) -> int:
    """What is there, as in os.stat; 0 for nothing."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _check_folder(path: Path) -> None:
    """Raises: OutputError if no file of that name can be made in its folder, or in the nearest one that is there."""
    target = Path(os.path.realpath(path))
    folder = next(parent for parent in target.parents if parent.exists())
    try:
        if any(len(os.fsencode(part)) > os.statvfs(folder).f_namemax for part in target.parts):
            _cannot(path, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _cannot(path, error.strerror)


def _cannot(path: Path, why: str | None) -> NoReturn:
    raise OutputError(f"cannot write {path}: {why}; choose a place that can be written") from None
