"""The package's log. Libraries write to `logger`; only the command line, through `install`, decides where the messages go.

Without `install` nothing is printed unless the host program configures Python's `logging` for the name "illm".
Results of commands are not log messages: they are printed on standard output.
"""

import logging
import os
import sys
from enum import StrEnum

logger = logging.getLogger("illm")
# without it, Python prints the warnings of a logger that is not configured
logger.addHandler(logging.NullHandler())

LEVEL_ENV = "ILLM_LOG_LEVEL"
# logger.warning(text, extra=ANY_RANK): a message that differs from rank to rank and so is printed by all of them
ANY_RANK = {"any_rank": True}


class Level(StrEnum):
    """The least severe messages that are printed."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


def is_rank_zero() -> bool:
    """Whether this process speaks for its run: rank 0 of a distributed one, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def install(level: str = Level.INFO) -> None:
    """Prints messages of `level` and above on standard error, as plain lines; a second call only changes the level.

    Of a distributed run, rank 0 prints; the other ranks print only CRITICAL messages and those marked with `ANY_RANK`.
    Raises: ValueError if `level` is not a `Level`.
    """
    logger.setLevel(level.upper())
    # libraries configure the root logger, which would print each message again
    logger.propagate = False
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.ERROR:
            return f"illm: {super().format(record)}"
        if record.levelno >= logging.WARNING:
            return f"warning: {super().format(record)}"
        return super().format(record)


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: progress bars and tests replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Formatter())
        self.addFilter(_is_for_this_rank)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except OSError:
            # a closed pipe or a full disk costs the message, not the run
            pass
        except Exception:
            self.handleError(record)


def _is_for_this_rank(record: logging.LogRecord) -> bool:
    return is_rank_zero() or record.levelno >= logging.CRITICAL or getattr(record, "any_rank", False)
