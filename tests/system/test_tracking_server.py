"""Runs on a real tracking server that goes away in the middle."""

import json
import re
import shutil
import signal

import pytest

from pipeline.tracking.journal import undelivered
from pipeline.tracking.run import DELIVERY_TIMEOUT_S, deliver_rest
from tests.conftest import CONFIGS
from tests.support.ranks import wait_until
from tests.support.services import Server

pytestmark = [pytest.mark.slow, pytest.mark.mlflow_server]


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


def history(server: Server, run_id: str, name: str) -> list[int]:
    """Steps in the order of their arrival in the server's own database."""
    from mlflow import MlflowClient

    return [metric.step for metric in MlflowClient(server.database).get_metric_history(run_id, name)]


def test_a_server_that_goes_away_and_comes_back_has_everything_once_and_in_order(server, zygote, smoke, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(smoke / "runs/smoke/shard", folder / "runs/smoke/shard")
    words = ("pretrain", CONFIGS / "pretrain.yaml", "run=runs/p", "fit.steps=500", "fit.log_every=2")
    words = (*words, "fit.validate_every=100", "fit.checkpoint_every=100")
    job = zygote.start(folder, *words, MLFLOW_TRACKING_URI=server.uri)
    records = folder / "runs/p/tracking.jsonl"
    lines = lambda: len(records.read_bytes().splitlines()) if records.exists() else 0
    wait_until(lambda: lines() > 20 or not job.running(), "no metrics")
    server.kill()
    at_kill = lines()
    wait_until(lambda: lines() > at_kill + 60 or not job.running(), "training waits for the server")
    assert job.running(), job.told()
    assert undelivered(folder / "runs/p") > 50
    server.start()
    assert job.wait() == [0], job.told()[-3000:]
    assert undelivered(folder / "runs/p") == 0
    assert "is unavailable" in job.told()
    run_id = (folder / "runs/p/mlflow-run-id").read_text()
    assert history(server, run_id, "train/loss") == list(range(2, 502, 2))
    assert history(server, run_id, "val/bpp") == [100, 200, 300, 400, 500]
    from mlflow import MlflowClient

    run = MlflowClient(server.database).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["artifact.digest"]
    assert list((tmp_path / "bucket").rglob("weights.safetensors"))


def test_a_run_that_ends_while_the_server_is_away_delivers_when_called_again(
    server, zygote, smoke, tmp_path, monkeypatch
):
    folder = tmp_path / "work"
    shutil.copytree(smoke / "runs/smoke/shard", folder / "runs/smoke/shard")
    words = ("vqvae", CONFIGS / "vqvae.yaml", "run=runs/v", "fit.steps=100000", "fit.log_every=1")
    job = zygote.start(folder, *words, MLFLOW_TRACKING_URI=server.uri)
    records = folder / "runs/v/tracking.jsonl"
    wait_until(
        lambda: (records.exists() and len(records.read_bytes().splitlines()) > 20) or not job.running(), "no metrics"
    )
    server.kill()
    wait_until(lambda: undelivered(folder / "runs/v") or not job.running(), "everything is delivered")
    job.kill(signal.SIGTERM)
    assert job.wait() == [75], job.told()[-2000:]
    # it has given up; SLURM's KillWait, the least that a cluster leaves a preempted job, is 30 seconds
    assert "are not delivered yet" in job.told()
    assert DELIVERY_TIMEOUT_S["KILLED"] < 10
    last = json.loads(records.read_text().splitlines()[-1])
    assert last == {"kind": "status", "status": "KILLED"}
    words = (*words[:3], "fit.steps=100000", "fit.log_every=1")
    resumed = zygote.start(folder, *words, MLFLOW_TRACKING_URI=server.uri)  # the server is still away: it goes on
    wait_until(lambda: "resumed at step" in resumed.told() or not resumed.running(), "it does not resume", 60)
    server.start()
    wait_until(lambda: undelivered(folder / "runs/v") < 5 or not resumed.running(), "nothing is delivered")
    resumed.kill(signal.SIGTERM)
    assert resumed.wait() == [75], resumed.told()[-2000:]
    # What a slow server did not take within its last three seconds
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    deliver_rest(folder / "runs/v")
    run_id = (folder / "runs/v/mlflow-run-id").read_text()
    steps = history(server, run_id, "train/loss")
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 20
    from mlflow import MlflowClient

    run = MlflowClient(server.database).get_run(run_id)
    assert run.info.status == "KILLED"
    assert re.fullmatch(r"preempted at step \d+ \(attempt 2\)", run.data.tags["status"])
    assert re.search(r": preempted at step \d+$", run.data.tags["attempt.001"])
    assert re.search(r": preempted at step \d+$", run.data.tags["attempt.002"])
    assert {p.parent.name for p in (tmp_path / "bucket").rglob("packages.txt")} == {"attempt-001", "attempt-002"}
