"""Ties a process to the one that started it, so that nothing trains on when a worker of a cluster was killed."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_FOLLOWS = "ILLM_FOLLOWS"  # environment: the process whose end this one must not outlive
_PR_SET_PDEATHSIG = 1
STOP = (signal.SIGTERM, signal.SIGUSR2)  # what asks a stage to save and leave


@contextmanager
def passing_on(pids: Callable[[], Iterable[int]]) -> Iterator[list[int]]:
    """Within it, the signals that ask to stop go to the processes that are there then; gives the signals that came."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for pid in pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in STOP}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
