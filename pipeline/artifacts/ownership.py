"""A run folder has one writer.

On one machine a lock decides: a second start while a process is alive is refused, and the kernel frees the lock of a dead one.
Between machines the latest start decides: an earlier one, for instance on a node that the cluster considers dead and has
replaced, finds out before it writes a checkpoint or an artifact, and stops.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from pipeline.errors import ArtifactError, TakenOver
from pipeline.log import logger
from pipeline.storage import disk
from pipeline.text import timestamp

FILE = "owner"
# Environment: how long a start waits for an earlier process of the same run to end
WAIT_ENV = "ILLM_FOLDER_WAIT_S"
# Seconds, unless the environment sets it
DEFAULT_WAIT_S = 10.0
# Seconds
POLL_INTERVAL_S = 0.1


@contextmanager
def held(folder: Path) -> Iterator[Callable[[], None]]:
    """Makes this process the folder's only writer until the end of the block; yields a function that verifies it.

    Raises: ArtifactError if a live process of this machine holds the folder, which is left as it is then; or if the folder
    was removed within the block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = _name()
    # One file per machine: a lock that a file system passes on to other machines could be held by a node considered dead.
    with (folder / f"lock.{os.uname().nodename}").open("a+", encoding="utf-8") as lock:
        _wait_for(lock, folder)
        lock.truncate(0)
        lock.write(owner)
        lock.flush()
        acquire(folder, owner)
        try:
            yield partial(verify, folder, owner)
        except OSError:
            verify(folder, owner)
            raise


def acquire(folder: Path, owner: str = "") -> str:
    """Makes this process the folder's writer for all machines; returns the owner that `verify` takes."""
    owner = owner or _name()
    disk.write_atomic(folder / FILE, owner.encode())
    return owner


def verify(folder: Path, owner: str) -> None:
    """Raises: TakenOver if another process started later; ArtifactError if the folder is gone."""
    try:
        found = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder}: was removed while {owner} worked in it; nothing more is saved, and the same command starts over"
        ) from None
    if found != owner:
        raise TakenOver(f"{folder}: taken over by {found}; this one, {owner}, stops and writes nothing more")


def _name() -> str:
    job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    when = timestamp()
    return f"process {os.getpid()} on {os.uname().nodename}{job}, since {when} ({uuid.uuid4().hex[:8]})"


def _wait_for(lock: TextIO, folder: Path) -> None:
    """Takes the lock; a process that is about to end gets some time to do so."""
    patience, started, told = float(os.environ.get(WAIT_ENV) or DEFAULT_WAIT_S), time.monotonic(), False
    while not disk.lock(lock.fileno()):
        lock.seek(0)
        holder = lock.read() or "another process of this machine"
        if time.monotonic() - started >= patience:
            raise ArtifactError(
                f"{folder}: in use by {holder}; wait for it or stop it, then the same command continues, "
                "or choose another run="
            )
        if not told:
            logger.info(f"{folder}: waiting up to {patience:g} s for {holder} to end")
        told = True
        time.sleep(min(POLL_INTERVAL_S, patience))
