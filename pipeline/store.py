"""Where runs and registered models are kept: the MLflow store, its address and its errors."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import redaction
from pipeline.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOME = Path("runs")  # of the default store: runs/mlflow.db and runs/mlflow-artifacts
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

- A run is named after its folder below `runs/`. Preempted and resumed, it stays one run: the tag `status` and a tag per
  attempt tell.
- **Parameters** are the stage's whole configuration; **tags** name the code, the machine, the command and the parents.
- **Datasets** are the shards, by digest. **Artifacts**: `artifact/` is what the stage handed on, `provenance/` what made it.
- Runs of one pipeline or sweep hang below its run: open the + before its name.
- Columns worth showing: metrics `val/bpp`, `val/psnr_db`; parameters `seed`, `rate.bpp`, `gan_weight`; tags `stage`, `status`.
"""
ABOUT_HISTORY = (
    "One run per registered model: a write-once record of every change of its aliases. `illm history` prints it."
)


def uri() -> str:
    """$MLFLOW_TRACKING_URI, or a SQLite file under runs/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(HOME / 'mlflow.db').resolve()}"


def shown() -> str:
    """`uri()` without the password that it may hold."""
    return redaction.masked(uri())


def page_command() -> str:
    """What a user types to look at the runs."""
    if uri().startswith("sqlite:///"):
        return f"mlflow ui --backend-store-uri {uri()}"
    return f"the tracking server's page at {shown()}"


def client() -> "MlflowClient":
    """A client of the store at `uri()`, created if it is a SQLite file and not there yet."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the journal tries again for as long as it takes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints what it raises, with a traceback
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri())
    mlflow.set_registry_uri(uri())
    if given is None:  # mlflow writes it for processes it starts; another folder of ours has another store
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    if not uri().startswith("sqlite:///"):
        return mlflow.MlflowClient()
    database = Path(uri().removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with _locked(database.with_name(f".{database.name}.lock")):  # two that make the tables at once break each other
        made = mlflow.MlflowClient()
        if not database.exists() or not database.stat().st_size:
            made.search_experiments(max_results=1)
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
        tags = {"mlflow.note.content": about, "mlflow.experimentKind": "custom_model_development"}  # not "GenAI"
        return store.create_experiment(name, artifact_location=location, tags=tags)
    except MlflowException:
        found = store.get_experiment_by_name(name)  # another process was faster
        if found is None:
            raise
        return str(found.experiment_id)


@contextmanager
def told(doing: str) -> Iterator[None]:
    """Turns the store's errors into one line for the user. doing: for instance "record"."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise TrackingError(
            f"cannot {doing} in {shown()}: {first_line(error)}; mend that and run the same command"
        ) from error


def first_line(error: Exception) -> str:
    """An error of the store, shortened, without addresses that hold passwords."""
    return redaction.masked((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def is_away(error: Exception) -> bool:
    """Whether an error means that the store cannot be reached or is busy, and not that it refuses."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or error.error_code not in REFUSALS:
        return True
    return any(word in str(error) for word in COLLISIONS)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(OSError):  # who may only read makes no tables either
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield
