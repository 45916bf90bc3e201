"""Signals: what stops a stage, how it reaches the processes that do the work, and what ends with what started it."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

# Environment: the parent process, which this one must not outlive
_PARENT_ENV = "ILLM_PARENT_PID"
_PR_SET_PDEATHSIG = 1
# On these a stage saves and exits: from a cluster, a closing terminal, Ctrl-C. Not SIGUSR1, whose default stays: libraries
# and launchers have uses of their own for it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
# Seconds within which SIGINTs are one Ctrl-C: a terminal sends one, and the launcher passes another on
_TOGETHER = 0.3


def handled_signals() -> list[int]:
    """`STOP_SIGNALS` without those that this process was started to ignore, as under nohup.

    SIGUSR2 is always included: job scripts ignore it until the stage handles it.
    """
    ignorable = (signal.SIGHUP, signal.SIGINT)
    return [number for number in STOP_SIGNALS if number not in ignorable or signal.getsignal(number) != signal.SIG_IGN]


class Interrupts:
    """Counts how often somebody pressed Ctrl-C."""

    def __init__(self) -> None:
        self.count, self._last = 0, -_TOGETHER

    def another(self) -> int:
        """To be called for each SIGINT; returns the count."""
        now = time.monotonic()
        if now - self._last >= _TOGETHER:
            self.count, self._last = self.count + 1, now
        return self.count


def clean_up_when_interrupted() -> None:
    """Ctrl-C interrupts once; a second one changes nothing, so that what was begun is cleaned up; the third interrupts again."""
    interrupts = Interrupts()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        count = interrupts.count
        if interrupts.another() > count and interrupts.count != 2:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def forward_signals(pids: Callable[[], Iterable[int]]) -> Iterator[list[int]]:
    """Within it, stop signals are forwarded to the processes that `pids` returns; yields the signals that were received."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for pid in pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in handled_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: Sequence[str], environment: Mapping[str, str], log: IO[str] | None = None) -> tuple[int, list[int]]:
    """Runs a command in this process's environment plus `environment`; returns its exit code and the signals forwarded to it.

    log: gets its output. Unlike `subprocess.run`, this lets it save when Ctrl-C is pressed.
    """
    child = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    with forward_signals(lambda: [child.pid]) as received:
        return child.wait(), received


def die_with_parent_env() -> dict[str, str]:
    """Environment of a child process that gets SIGTERM when this one ends."""
    return {_PARENT_ENV: str(os.getpid())}


def die_with_parent() -> None:
    """Has the kernel send SIGTERM when the parent ends, if `die_with_parent_env` asked for it; on Linux."""
    parent = os.environ.pop(_PARENT_ENV, "")
    if parent:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            # It has ended already
            if os.getppid() != int(parent):
                os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, `STOP_SIGNALS` only set a flag; yields a function that reads it.

    A second one changes nothing; the third Ctrl-C raises KeyboardInterrupt, and what was not saved is lost.
    """
    received: list[int] = []
    interrupts = Interrupts()

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT and interrupts.another() > 2:
            raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, remember) for number in handled_signals()}
    except ValueError:
        # Not in the main thread, for instance in a Ray trial: the host handles signals
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            # A second signal must not end the process between saving and the documented exit code.
            signal.signal(number, signal.SIG_IGN if received else handler)
