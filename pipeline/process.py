"""Ties a process to the one that started it, so that nothing trains on when a worker of a cluster was killed."""

import ctypes
import os
import signal
from contextlib import suppress

_FOLLOWS = "ILLM_FOLLOWS"  # environment: the process whose end this one must not outlive
_PR_SET_PDEATHSIG = 1


def tied() -> dict[str, str]:
    """Environment of a process that gets SIGTERM when this one is gone."""
    return {_FOLLOWS: str(os.getpid())}


def follow_parent() -> None:
    """Does what `tied` asked for; on Linux."""
    parent = os.environ.pop(_FOLLOWS, "")
    if parent:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != int(parent):  # it ended before
                os.kill(os.getpid(), signal.SIGTERM)
