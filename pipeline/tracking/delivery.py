"""Delivers what a run's journal holds to the MLflow store."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts.manifest import INDEXED
from pipeline.artifacts.run_folder import RECORDS
from pipeline.log import logger
from pipeline.tracking import store
from pipeline.tracking.journal import Record, StoreUnavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Characters of a data set's digest that MLflow keeps
DIGEST_LENGTH = 36
# In one call, by MLflow's rules
MAX_METRICS, MAX_PARAMS = 1000, 100


def send(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    """Delivers records to MLflow, whose store ignores an identical metric.

    Raises: StoreUnavailable if it is to be retried.
    """
    for kind, alike in groupby(records, key=lambda record: record["kind"]):
        for part in [list(alike)] if kind == "metrics" else ([record] for record in alike):
            try:
                _DELIVER[kind](client, run_id, part)
            except Exception as error:
                # Artifact stores raise errors of their own kinds
                if store.is_unavailable(error):
                    raise StoreUnavailable(store.first_line(error)) from error
                logger.warning(
                    f"{store.masked_uri()} refused a record of run {run_id} ({store.first_line(error)}); it stays in {RECORDS}"
                )


def _send_metrics(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    from mlflow.entities import Metric

    points = [Metric(n, v, r["time_ms"], r["step"]) for r in records for n, v in r["metrics"].items()]
    for start in range(0, len(points), MAX_METRICS):
        client.log_batch(run_id, metrics=points[start : start + MAX_METRICS])


def send_params(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    from mlflow.entities import Param

    listed = [Param(name, value) for name, value in records[0]["params"].items()]
    for start in range(0, len(listed), MAX_PARAMS):
        client.log_batch(run_id, params=listed[start : start + MAX_PARAMS])


def _send_tag(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    client.set_tag(run_id, records[0]["name"], records[0]["value"])


def _send_dataset(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    (record,) = records
    profile, source = json.dumps(record["profile"]), json.dumps({"uri": record["source"]})
    found = Dataset(record["name"], record["digest"][:DIGEST_LENGTH], "illm-shards", source, profile=profile)
    client.log_inputs(run_id, datasets=[DatasetInput(found, [InputTag("mlflow.data.context", record["context"])])])


def _send_files(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    (record,) = records
    path = Path(record["path"])
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix not in INDEXED:
            below = file.parent.relative_to(path)
            client.log_artifact(run_id, str(file), (Path(record["to"]) / below).as_posix())


def _send_image(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    from PIL import Image

    (record,) = records
    # it may have been removed since, and the rest is to be delivered all the same
    if Path(record["path"]).is_file():
        with Image.open(record["path"]) as image:
            client.log_image(
                run_id, image, key=record["name"], step=record["step"], timestamp=record["time_ms"], synchronous=True
            )


def _send_status(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    if records[0]["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, records[0]["status"])


_DELIVER: dict[str, Callable[["MlflowClient", str, list[Record]], None]] = {
    "params": send_params,
    "metrics": _send_metrics,
    "tag": _send_tag,
    "dataset": _send_dataset,
    "artifact": _send_files,
    "image": _send_image,
    "status": _send_status,
}
