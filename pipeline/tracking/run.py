"""One MLflow run per stage: parameters, metrics, inputs, artifacts, and every attempt at it."""

import io
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import config, redaction
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.run_folder import RUN_ID_FILE, Inputs
from pipeline.errors import Preempted, TakenOver
from pipeline.log import logger
from pipeline.storage import disk
from pipeline.tracking import provenance, store
from pipeline.tracking.delivery import send, send_params
from pipeline.tracking.journal import Journal, attempts, undelivered
from pipeline.tracking.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Environment: the run below which this process's run hangs
PARENT = "ILLM_PARENT_RUN"
# Folder of pictures in a run folder
IMAGES = "images"
# Seconds to wait at the end of a run for a store that is unavailable or slow; a stopped run has to exit
DELIVERY_TIMEOUT_S = {"FINISHED": 60.0, "KILLED": 3.0, "FAILED": 3.0}
# Characters
MAX_PARAM, MAX_TAG = 6000, 5000


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
            self._journal.add({"kind": "tag", "name": name, "value": value[:MAX_TAG]})

    def artifact(self, artifact: Artifact) -> None:
        """Records an artifact: its files (of shards, the index only) and its digest as a tag."""
        if self._journal is not None:
            self.files(artifact.path, "artifact")
            self.tag("artifact.digest", artifact.digest)

    def files(self, folder: Path, to: str) -> None:
        """Records a folder's files, which have to stay where they are until they are delivered."""
        if self._journal is not None:
            self._journal.add({"kind": "artifact", "path": str(folder.resolve()), "to": to})

    def image(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Records a picture (H, W, 3) at `step`: MLflow shows the pictures of a name as one that changes with the steps."""
        if self._journal is None:
            return
        path = self._journal.folder / IMAGES / name / f"step-{step:08d}.png"
        # a resumed run repeats some
        if not path.is_file():
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.write_atomic(path, stream.getvalue())
            time_ms = int(time.time() * 1000)
            self._journal.add(
                {"kind": "image", "path": str(path.resolve()), "name": name, "step": step, "time_ms": time_ms}
            )

    def dataset(self, name: str, shards: Artifact, context: str) -> None:
        """Records shards as a data set of the run. context: what the run did with it, as MLflow shows it."""
        if self._journal is not None:
            about = {"name": name, "digest": shards.digest, "source": shards.origin or str(shards.path.resolve())}
            self._journal.add({"kind": "dataset", "context": context, "profile": shards.manifest.metrics, **about})


@contextmanager
def tracked_run(stage: str, folder: Path, cfg: config.Config, given: Inputs, enabled: bool = True) -> Iterator[Tracker]:
    """The stage's MLflow run, opened again if the stage was interrupted; its end says how the stage ended."""
    if not enabled:
        yield Tracker(None)
        return
    client, run_id = _begun(stage, folder, given)
    journal = Journal(folder, run_id, store.masked_uri(), partial(send, client, run_id))
    tracker = Tracker(journal)
    number = attempts(folder) + 1
    began = f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} on {socket.gethostname()}"
    attempt = f"attempt {number}"

    def tell(state: str) -> None:
        tracker.tag("status", f"{state} ({attempt})" if number > 1 else state)
        tracker.tag(f"attempt.{number:03d}", f"{began}: {state}")

    provenance.write(folder / "provenance" / f"attempt-{number:03d}", cfg)
    tracker.files(folder / "provenance", "provenance")
    if number == 1:
        journal.add({"kind": "params", "params": _params(cfg)})
    journal.add({"kind": "status", "status": "RUNNING"})
    tell("resumed" if number > 1 else "running")
    status, state = "FAILED", "failed"
    machine = SystemMetrics(journal, (folder / RUN_ID_FILE).stat().st_mtime)
    try:
        yield tracker
        status, state = "FINISHED", "finished"
    except Preempted as stop:
        status, state = "KILLED", f"preempted at step {stop.step}"
        raise
    except KeyboardInterrupt:
        status, state = "KILLED", "interrupted"
        raise
    except TakenOver as error:
        # The run continues elsewhere, where its end is recorded
        status, state = "", str(error)
        raise
    except Exception as error:
        state = f"failed: {redaction.masked(str(error) or type(error).__name__).splitlines()[0][:300]}"
        raise
    finally:
        machine.stop()
        if status:
            tell(state)
            journal.add({"kind": "status", "status": status})
        _close(journal, folder, status or "FAILED")


class Group:
    """A run that holds other runs: those of processes that get `environment`."""

    def __init__(self, client: "MlflowClient", run_id: str):
        self._client, self.environment = client, {PARENT: run_id}

    def log(self, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        points = [Metric(name, value, int(time.time() * 1000), 0) for name, value in metrics.items()]
        with store.mlflow_errors("record"):
            self._client.log_batch(self.environment[PARENT], metrics=points)


@contextmanager
def run_group(
    kind: str, folder: Path, about: str, parameters: Mapping[str, object] | None = None, name: str = ""
) -> Iterator[Group]:
    """A pipeline's run, or a trial's, opened again if it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    client = store.client()
    tags = provenance.tags() | {"mlflow.note.content": about, "stage": kind, "mlflow.source.name": kind}
    with store.mlflow_errors("record"):
        run_id = _open(client, kind, folder, tags, name)
        client.update_run(run_id, status="RUNNING")
        send_params(client, run_id, [{"params": {name: str(value) for name, value in (parameters or {}).items()}}])
    status = "FAILED"
    try:
        yield Group(client, run_id)
        status = "FINISHED"
    finally:
        # The store may be unavailable; the stages' outcome matters more
        with suppress(Exception):
            client.set_terminated(run_id, status)


def deliver_rest(folder: Path) -> None:
    """Delivers the records of a finished run that its store does not have yet."""
    record = folder / RUN_ID_FILE
    left = undelivered(folder) if record.is_file() else 0
    if not left:
        return
    run_id = record.read_text().strip()
    try:
        client = store.client()
    except store.NoAnswer as error:
        logger.warning(f"{error.reason}: {_kept(left, folder)}")
        return
    _close(Journal(folder, run_id, store.masked_uri(), partial(send, client, run_id)), folder, "FINISHED")


def _close(journal: Journal, folder: Path, status: str) -> None:
    if left := journal.close(DELIVERY_TIMEOUT_S[status]):
        logger.warning(_kept(left, folder))


def _kept(left: int, folder: Path) -> str:
    return (
        f"{left} records for {store.masked_uri()} are not delivered yet; they are kept in {folder}, and the same command "
        "delivers them"
    )


def _tags(stage: str, folder: Path, given: Inputs) -> dict[str, str]:
    parents = given.parents().items()
    reads = "".join(f"- reads {role}: `{parent.source}` ({parent.digest[:12]})\n" for role, parent in parents)
    note = f"Stage **{stage}** in `{folder}`.\n\n{reads}\nStarted by `{provenance.command()}`; the same command resumes it. "
    tags = {"stage": stage, "mlflow.source.name": stage, "folder": str(folder.resolve()), **provenance.tags()}
    tags["mlflow.note.content"] = f"{note}Where it comes from: `illm lineage {folder}`."
    tags |= {f"parent.{role}.digest": parent.digest for role, parent in parents}
    return tags | {f"parent.{role}.run_id": parent.run_id for role, parent in parents if parent.run_id}


def _params(cfg: config.Config) -> dict[str, str]:
    flat = config.flatten(cfg).items()
    return {re.sub(r"[^\w\-./ ]", "_", name): redaction.masked(str(value))[:MAX_PARAM] for name, value in flat}


def _name(stage: str, folder: Path) -> str:
    """The folder below runs/, its last two parts at most, and the stage if the folder's name does not tell it."""
    place, home = folder.resolve(), store.HOME.resolve()
    name = "/".join(place.relative_to(home).parts[-2:]) if place.is_relative_to(home) else place.name
    return name if stage in folder.name else f"{name} ({stage})"


def _begun(stage: str, folder: Path, given: Inputs) -> tuple["MlflowClient", str]:
    """The store's client, and the id of the folder's run. A run that is resumed does not wait for an unavailable server."""
    record = folder / RUN_ID_FILE
    try:
        client = store.client()
    except store.NoAnswer:
        if not record.is_file() or not store.is_server():
            raise
        # It gets the records later
        return store.unasked(), record.read_text().strip()
    with store.mlflow_errors("record"):
        return client, _open(client, stage, folder, _tags(stage, folder, given))


def _open(client: "MlflowClient", stage: str, folder: Path, tags: dict[str, str], name: str = "") -> str:
    """The id of the folder's run, made if the store has none."""
    from mlflow.exceptions import MlflowException

    record = folder / RUN_ID_FILE
    if record.is_file():
        run_id = record.read_text().strip()
        try:
            client.get_run(run_id)
            return run_id
        except MlflowException as error:
            if store.is_unavailable(error):
                # It gets the records later
                return run_id
        # the store was removed or changed: begin a new run
    if parent := os.environ.get(PARENT):
        tags["mlflow.parentRunId"] = parent
    short = {name: value[:MAX_TAG] for name, value in tags.items()}
    run_id = client.create_run(store.experiment(client), run_name=name or _name(stage, folder), tags=short).info.run_id
    disk.write_atomic(record, run_id.encode())
    return run_id
