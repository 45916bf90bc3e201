"""Where runs and registered models are kept: the MLflow store, its address and its errors."""

import fcntl
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar, cast

from pipeline import redaction
from pipeline.errors import RegistryChanged, TrackingError
from pipeline.log import logger
from pipeline.text import printable

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Folder of the default store: runs/mlflow.db and runs/mlflow-artifacts
HOME = Path("runs")
# Seconds that a server has for its first answer, with all retries
ANSWER_TIMEOUT_S = 45.0
# Seconds of waiting for it after which a message says so
WARN_AFTER_S = 5.0
T = TypeVar("T")
REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "BAD_REQUEST",
    "INVALID_STATE",
)
# What databases say when two write the same new row at once, for instance a data set: MLflow calls that a bad request
COLLISIONS = ("UniqueViolation", "UNIQUE constraint failed", "duplicate key value", "Duplicate entry", "IntegrityError")
ABOUT_RUNS = """Runs of the image codec's stages, written by `illm` (also through `make` and job scripts).

- A run is named after its folder below `runs/`. Preempted and resumed, it stays one run: see the tag `status` and one tag
  per attempt.
- **Parameters** are the stage's whole configuration; **tags** name the code, the machine, the command and the parents.
- **Datasets** are the shards, by digest. **Artifacts**: `artifact/` is what the stage handed on, `provenance/` what made it.
- Runs of one pipeline or sweep hang below its run: open the + before its name.
- Columns worth showing: metrics `val/bpp`, `val/psnr_db`; parameters `seed`, `rate.bpp`, `gan_weight`; tags `stage`, `status`.
"""
ABOUT_HISTORY = (
    "One run per registered model: a write-once record of every change of its aliases. `illm history` prints it."
)
# Addresses of servers that have answered this process
_answered: set[str] = set()


def uri() -> str:
    """$MLFLOW_TRACKING_URI, or a SQLite file under runs/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(HOME / 'mlflow.db').resolve()}"


def masked_uri() -> str:
    """`uri()` without the password that it may hold."""
    return redaction.masked(uri())


class NoAnswer(TrackingError):
    """The store cannot be reached, or is busy: a retry may succeed."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(f"{reason}; try again, or correct MLFLOW_TRACKING_URI")


class NoStore(TrackingError):
    """The store would be a file here, and there is none."""


def identity() -> str:
    """What tells this store from others, without secrets: its address; of a file, its whole path."""
    database = _database()
    return f"sqlite:///{database.resolve()}" if database else masked_uri().rstrip("/")


def is_server() -> bool:
    """Whether the store is reached over HTTP."""
    return uri().startswith(("http://", "https://"))


def client() -> "MlflowClient":
    """A client of the store at `uri()`, which has answered; created if it is a SQLite file and not there yet.

    Raises: NoAnswer if a server has not answered within ANSWER_TIMEOUT_S; TrackingError if it cannot be used at all.
    """
    database = _database()
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    return _open(database, making=True)


def reader() -> "MlflowClient":
    """Like `client`, for reading only: creates no file and no folder.

    Raises: NoStore if the store would be a SQLite file that is not there.
    """
    database = _database()
    if database is None or (database.is_file() and database.stat().st_size):
        return _open(database, making=False)
    here = "here" if not os.environ.get("MLFLOW_TRACKING_URI") else "where MLFLOW_TRACKING_URI points"
    raise NoStore(
        f"no registry {here}: there is no {database.resolve()}; set MLFLOW_TRACKING_URI to name another, "
        f"or run this in the folder that holds {HOME}/"
    )


def unasked() -> "MlflowClient":
    """A client of a server that has not answered yet."""
    made: MlflowClient = _mlflow().MlflowClient()
    return made


def experiment(store: "MlflowClient", suffix: str = "", about: str = ABOUT_RUNS) -> str:
    """Id of the experiment $MLFLOW_EXPERIMENT_NAME (default "illm") plus `suffix`; made with a description if new."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "illm") + suffix
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = str((HOME / "mlflow-artifacts").resolve()) if uri().startswith("sqlite:///") else None
    try:
        # Not "GenAI"
        tags = {"mlflow.note.content": about, "mlflow.experimentKind": "custom_model_development"}
        return store.create_experiment(name, artifact_location=location, tags=tags)
    except MlflowException:
        # Another process was faster
        found = store.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


@contextmanager
def mlflow_errors(doing: str) -> Iterator[None]:
    """Turns the store's errors into one line for the user. doing: for instance "record".

    Raises: TrackingError; RegistryChanged if another process wrote the same at the same moment.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        reason = first_line(error)
        if collided(error):
            raise RegistryChanged(
                f"cannot {doing} in {masked_uri()}: another process wrote the same at the same moment ({reason}); "
                "run the same command again"
            ) from error
        raise TrackingError(f"cannot {doing} in {masked_uri()}: {reason}; fix that and run the same command") from error


def retried(write: Callable[[], object], tries: int = 5) -> None:
    """Runs an idempotent write, again if another process wrote the same row at the same moment."""
    for left in reversed(range(tries)):
        try:
            write()
            return
        except Exception as error:
            if not left or not collided(error):
                raise


def first_line(error: Exception) -> str:
    """An error of the store, shortened, without addresses that hold passwords."""
    return printable(redaction.masked((str(error).strip() or type(error).__name__).splitlines()[0]))[:200]


def is_unavailable(error: Exception) -> bool:
    """Whether an error means that the store cannot be reached or is busy, and not that it refuses."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or error.error_code not in REFUSALS:
        return True
    return collided(error)


def collided(error: Exception) -> bool:
    """Whether an error means that another process wrote the same row at the same moment."""
    return any(word in str(error) for word in COLLISIONS)


def _database() -> Path | None:
    """The file of a SQLite store."""
    found = re.match(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)", uri())
    return Path(found["path"]) if found else None


def _mlflow() -> ModuleType:
    """The library, quiet, and looking at this store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # The journal retries for as long as it takes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # Seconds
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # Prints what it raises, with a traceback
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri())
    mlflow.set_registry_uri(uri())
    # Mlflow writes it for processes it starts; another folder of ours has another store
    if not given:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return mlflow


def _open(database: Path | None, making: bool) -> "MlflowClient":
    # Importing it takes seconds, which are not the server's
    _mlflow()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _within_answer(_answering) if database is None else _file(database, making)
    except (MlflowException, SQLAlchemyError) as error:
        if is_unavailable(error):
            raise NoAnswer(f"{masked_uri()} cannot be reached ({first_line(error)})") from error
        raise TrackingError(
            f"{masked_uri()} cannot be used: {first_line(error)}; correct MLFLOW_TRACKING_URI"
        ) from error
    except ImportError as error:
        # A database needs its own driver
        raise TrackingError(f"{masked_uri()} cannot be used: {error}; install what it needs") from error


def _answering() -> "MlflowClient":
    """A client of a server, after a first answer; a server that has answered this process is not asked again."""
    made = unasked()
    if uri() not in _answered:
        made.search_experiments(max_results=1)
        _answered.add(uri())
    return made


def _file(database: Path, making: bool) -> "MlflowClient":
    """A client of a SQLite file. making: with its tables, if it has none."""
    # Two that make tables at once break each other
    with _locked(database.with_name(f".{database.name}.lock"), making):
        made = unasked()
        if not database.exists() or not database.stat().st_size:
            made.search_experiments(max_results=1)
    return made


def _within_answer(question: Callable[[], T]) -> T:
    """What a function returns within ANSWER_TIMEOUT_S. A server that drips bytes keeps every shorter timeout waiting."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, name="first answer", daemon=True).start()
    with suppress(queue.Empty):
        return _answer(*answers.get(timeout=WARN_AFTER_S))
    logger.info(f"waiting for {masked_uri()}, {ANSWER_TIMEOUT_S:.0f} s at most")
    with suppress(queue.Empty):
        return _answer(*answers.get(timeout=ANSWER_TIMEOUT_S - WARN_AFTER_S))
    raise NoAnswer(f"{masked_uri()} has not answered within {ANSWER_TIMEOUT_S:.0f} s")


def _answer(value: T | None, error: BaseException | None) -> T:
    if error is not None:
        raise error
    return cast(T, value)


@contextmanager
def _locked(path: Path, making: bool) -> Iterator[None]:
    """Within it no other process makes tables. making: else the lock is only waited for, and no file is made for it."""
    with ExitStack() as stack:
        # Without the permission to write no tables are made either
        with suppress(OSError):
            stream = stack.enter_context(path.open("w" if making else "r"))
            fcntl.flock(stream, fcntl.LOCK_EX if making else fcntl.LOCK_SH)
        yield
