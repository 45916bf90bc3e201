"""Runs, parameters and metrics in MLflow. With registry.py, the only files that import mlflow."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts, config
from pipeline.artifacts import Artifact
from pipeline.errors import Preempted, TrackingError
from pipeline.journal import RECORDS, Away, Journal, Record, undelivered
from pipeline.runs import Inputs

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_ID_FILE = "mlflow-run-id"
# Seconds to wait at the end of a run for a store that is away or slow; a stopped one has to leave
PATIENCE = {"FINISHED": 60.0, "KILLED": 3.0, "FAILED": 3.0}
DIGEST_LENGTH = 36  # characters of a data set's digest that MLflow keeps
MOST_METRICS = 1000  # in one call, by MLflow's rules
REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "BAD_REQUEST",
    "INVALID_STATE",
)
HOME = Path("runs")  # of the default store: runs/mlflow.db and runs/mlflow-artifacts


def uri() -> str:
    """$MLFLOW_TRACKING_URI, or a SQLite file under runs/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(HOME / 'mlflow.db').resolve()}"


def client() -> "MlflowClient":
    """A client of the store at `uri()`, created if it is the default and not there yet."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the journal tries again for as long as it takes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints what it raises, with a traceback
    if uri().startswith("sqlite:///"):
        Path(uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri())
    mlflow.set_registry_uri(uri())
    if given is None:  # mlflow writes it for processes it starts; another folder of ours has another store
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return mlflow.MlflowClient()


def page_command() -> str:
    """What a user types to look at the runs."""
    if uri().startswith("sqlite:///"):
        return f"mlflow ui --backend-store-uri {uri()}"
    return f"the tracking server's page at {uri()}"


class Tracker:
    """One stage's MLflow run; without a journal (ranks other than the main one) it does nothing.

    It never waits for the store: the journal delivers.
    """

    def __init__(self, journal: Journal | None):
        self._journal = journal
        self.run_id = journal.run_id if journal else ""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics at `step`; values that this run recorded before, up to that step, stay as they are."""
        if self._journal is not None:
            self._journal.metrics(step, {k: float(v) for k, v in metrics.items()}, time_ms=int(time.time() * 1000))

    def tag(self, name: str, value: str) -> None:
        if self._journal is not None:
            self._journal.add({"kind": "tag", "name": name, "value": value})

    def artifact(self, artifact: Artifact) -> None:
        """Records an artifact: its files (of shards, the index only) and its digest as a tag."""
        if self._journal is not None:
            self._journal.add({"kind": "artifact", "path": str(artifact.path.resolve())})
            self.tag("artifact.digest", artifact.digest)

    def dataset(self, name: str, shards: Artifact, context: str) -> None:
        """Records shards as a data set of the run. context: what the run did with it, as MLflow shows it."""
        if self._journal is not None:
            about = {"name": name, "digest": shards.digest, "source": shards.origin or str(shards.path.resolve())}
            self._journal.add({"kind": "dataset", "context": context, "profile": shards.manifest.metrics, **about})


@contextmanager
def run(stage: str, folder: Path, cfg: config.Config, given: Inputs, enabled: bool = True) -> Iterator[Tracker]:
    """The stage's MLflow run, opened again if the stage was interrupted; its end says how the stage ended."""
    if not enabled:
        yield Tracker(None)
        return
    with _told():
        store = client()
        run_id = _open(store, stage, folder, cfg, given)
    journal = Journal(folder, run_id, uri(), partial(_send, store, run_id))
    journal.add({"kind": "status", "status": "RUNNING"})
    status = "FAILED"
    try:
        yield Tracker(journal)
        status = "FINISHED"
    except (KeyboardInterrupt, Preempted):
        status = "KILLED"
        raise
    finally:
        journal.add({"kind": "status", "status": status})
        _close(journal, folder, status)


def deliver_rest(folder: Path) -> None:
    """Delivers what a finished run still holds for its store."""
    record = folder / RUN_ID_FILE
    if record.is_file() and undelivered(folder):
        run_id = record.read_text().strip()
        _close(Journal(folder, run_id, uri(), partial(_send, client(), run_id)), folder, "FINISHED")


def _close(journal: Journal, folder: Path, status: str) -> None:
    if left := journal.close(PATIENCE[status]):
        print(
            f"{left} records for {uri()} are not delivered yet; they are kept in {folder}, and the same command delivers them",
            file=sys.stderr,
        )


def _send(store: "MlflowClient", run_id: str, records: list[Record]) -> None:
    """Delivers records to MLflow, whose store ignores a metric that it has already, time and all.

    Raises: Away if it is to be tried again.
    """
    from mlflow.exceptions import MlflowException

    for kind, group in groupby(records, key=lambda record: record["kind"]):
        for part in [list(group)] if kind == "metrics" else ([record] for record in group):
            try:
                _send_alike(store, run_id, kind, part)
            except MlflowException as error:
                reason = str(error).strip().splitlines()[0][:200]
                if error.error_code not in REFUSALS:
                    raise Away(reason) from error
                print(f"{uri()} refused a record of run {run_id} ({reason}); it stays in {RECORDS}", file=sys.stderr)
            except OSError as error:  # an artifact store that is away
                raise Away(str(error)) from error


def _send_alike(store: "MlflowClient", run_id: str, kind: str, records: list[Record]) -> None:
    """Delivers several records of metrics, or one of another kind."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    if kind == "metrics":
        points = [Metric(n, v, r["time_ms"], r["step"]) for r in records for n, v in r["metrics"].items()]
        for start in range(0, len(points), MOST_METRICS):
            store.log_batch(run_id, metrics=points[start : start + MOST_METRICS])
        return
    (record,) = records
    if kind == "tag":
        store.set_tag(run_id, record["name"], record["value"])
    elif kind == "dataset":
        profile = json.dumps(record["profile"])
        source = json.dumps({"uri": record["source"]})
        found = Dataset(record["name"], record["digest"][:DIGEST_LENGTH], "illm-shards", source, profile=profile)
        store.log_inputs(run_id, datasets=[DatasetInput(found, [InputTag("mlflow.data.context", record["context"])])])
    elif kind == "artifact":
        _upload(store, run_id, Path(record["path"]))
    elif record["status"] == "RUNNING":
        store.update_run(run_id, status="RUNNING")
    else:
        store.set_terminated(run_id, record["status"])


def _upload(store: "MlflowClient", run_id: str, path: Path) -> None:
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix not in artifacts.INDEXED:
            below = file.parent.relative_to(path)
            store.log_artifact(run_id, str(file), (Path("artifact") / below).as_posix())


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
            store.get_run(run_id)
            return run_id
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                return run_id  # the store is away: it hears of this later
        # the store was removed or changed: begin a new run
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
