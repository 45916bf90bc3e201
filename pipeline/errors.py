"""Errors that a user can fix: one clear line and exit code 2. Everything else is a bug: a traceback and exit code 1."""

import errno
import re

# how torch says it: on the CPU in a RuntimeError, on a GPU in an OutOfMemoryError
_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)
# What a write fails with when the disk is full
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input. The message says what was found, what was expected and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """An invalid config file or override."""


class ArtifactError(UserError):
    """A missing, damaged or mismatched artifact, run folder or checkpoint."""


class StageFailed(UserError):
    """The command of a stage ended with an error that it has printed already."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


class TakenOver(ArtifactError):
    """Another process has become the run folder's writer: the run continues there, and not here."""


class DataError(UserError):
    """Images or shards that cannot be used."""


class UnreachableError(DataError):
    """Data that may be intact but is unavailable now: to be retried, never to be replaced by other data."""


class BitstreamError(UserError):
    """A compressed file that is damaged, foreign or made by another model."""


class MetricError(UserError):
    """A metric does not have the value that it must have for known images: it would not mean what its name says."""


class GatesNotMet(UserError):
    """A promotion was refused by its gates; nothing was registered."""

    exit_code = 3


class Preempted(Exception):
    """Training stopped on a signal after saving a checkpoint; the same command resumes it."""

    # EX_TEMPFAIL: "try again", what a job script tests for before it requeues
    exit_code = 75

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"preempted at step {step}; a checkpoint was saved, the same command continues")


class TrainingError(UserError):
    """Training cannot continue with this configuration, for instance because the loss is no longer a number."""


class TrackingError(UserError):
    """The tracking store cannot be reached or written."""


class RegistryChanged(UserError):
    """An alias was moved by somebody else in the meantime; nothing was changed."""

    exit_code = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on the CPU or on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )
