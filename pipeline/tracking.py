"""Runs, parameters and metrics in MLflow. With registry.py, the only files that import mlflow."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts, config
from pipeline.artifacts import Artifact
from pipeline.errors import Preempted, TrackingError
from pipeline.runs import Inputs

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_ID_FILE = "mlflow-run-id"
HOME = Path("runs")  # of the default store: runs/mlflow.db and runs/mlflow-artifacts


def uri() -> str:
    """$MLFLOW_TRACKING_URI, or a SQLite file under runs/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(HOME / 'mlflow.db').resolve()}"


def client() -> "MlflowClient":
    """A client of the store at `uri()`, created if it is the default and not there yet."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints what it raises, with a traceback
    if uri().startswith("sqlite:///"):
        Path(uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri())
    mlflow.set_registry_uri(uri())
    return mlflow.MlflowClient()


def page_command() -> str:
    """What a user types to look at the runs."""
    if uri().startswith("sqlite:///"):
        return f"mlflow ui --backend-store-uri {uri()}"
    return f"the tracking server's page at {uri()}"


class Tracker:
    """One stage's MLflow run; without a client (ranks other than the main one) it does nothing."""

    def __init__(self, client: "MlflowClient | None", run_id: str | None):
        self._client, self.run_id = client, run_id or ""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics at `step`."""
        if self._client is not None and metrics:
            from mlflow.entities import Metric
            from mlflow.utils.time import get_current_time_millis

            now = get_current_time_millis()
            points = [Metric(name, float(value), now, step) for name, value in metrics.items()]
            with _told():
                self._client.log_batch(self.run_id, metrics=points)

    def tag(self, name: str, value: str) -> None:
        if self._client is not None:
            with _told():
                self._client.set_tag(self.run_id, name, value)

    def artifact(self, artifact: Artifact) -> None:
        """Records an artifact: its files (of shards, tables and index only) and its digest as a tag."""
        if self._client is not None:
            for path in sorted(artifact.path.rglob("*")):
                if path.is_file() and path.suffix != ".tar":
                    below = path.parent.relative_to(artifact.path)
                    self._client.log_artifact(self.run_id, str(path), (Path("artifact") / below).as_posix())
            self.tag("artifact.digest", artifact.digest)


@contextmanager
def run(stage: str, folder: Path, cfg: config.Config, given: Inputs, enabled: bool = True) -> Iterator[Tracker]:
    """The stage's MLflow run, opened again if the stage was interrupted; its end says how the stage ended."""
    if not enabled:
        yield Tracker(None, None)
        return
    with _told():
        store = client()
        run_id = _open(store, stage, folder, cfg, given)
    status = "FAILED"
    try:
        yield Tracker(store, run_id)
        status = "FINISHED"
    except (KeyboardInterrupt, Preempted):
        status = "KILLED"
        raise
    finally:
        store.set_terminated(run_id, status)


@contextmanager
def _told() -> Iterator[None]:
    """Turns the tracking store's errors into one line for the user."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0]
        raise TrackingError(f"cannot record in {uri()}: {reason}; mend that and run the same command") from error


def _open(store: "MlflowClient", stage: str, folder: Path, cfg: config.Config, given: Inputs) -> str:
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    record = folder / RUN_ID_FILE
    if record.is_file():
        run_id = record.read_text().strip()
        try:
            store.update_run(run_id, status="RUNNING")
            return run_id
        except MlflowException:  # the store was removed or changed: begin a new run
            pass
    run_id = store.create_run(_experiment(store), run_name=f"{stage} {folder.name}").info.run_id
    artifacts.write_durably(record, run_id.encode())
    parents = given.parents().items()
    tags = {"stage": stage, "folder": str(folder.resolve())}
    tags |= {f"parent.{role}.digest": parent.digest for role, parent in parents}
    tags |= {f"parent.{role}.run_id": parent.run_id for role, parent in parents if parent.run_id}
    params = [Param(name, str(value)) for name, value in config.flatten(cfg).items()]
    store.log_batch(run_id, params=params, tags=[RunTag(name, value) for name, value in tags.items()])
    return run_id


def _experiment(store: "MlflowClient") -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "illm")
    found = store.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    location = str((HOME / "mlflow-artifacts").resolve()) if uri().startswith("sqlite:///") else None
    return store.create_experiment(name, artifact_location=location)
