"""What a run of the smoke pipeline tells whoever looks at it."""

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking import provenance
from tests.conftest import ROOT
from tests.system.test_pipeline import RUNS, run_id


def tags(folder: Path, run: str) -> dict[str, str]:
    with sqlite3.connect(folder / "runs/mlflow.db") as db:
        return dict(db.execute("select key, value from tags where run_uuid = ?", (run,)))


def test_a_run_tells_code_command_machine_packages_parents_and_how_it_ended(smoke):
    found = tags(smoke, run_id(smoke, "gan"))
    assert found["stage"] == "gan"
    assert found["command"].startswith("illm gan ")
    assert "run=runs/smoke/gan" in found["command"]
    assert re.search(r"core\(s\), \d+ GiB, ", found["machine"])
    assert "torch 2." in found["packages"]
    assert found["code"].startswith("illm-pipeline ")
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert found["mlflow.source.git.commit"] == head.stdout.strip()
    assert found["status"] == "finished"
    assert found["attempt.001"].endswith(": finished")
    assert "reads codec: `runs/smoke/pretrain`" in found["mlflow.note.content"]
    assert found["parent.codec.run_id"] == run_id(smoke, "pretrain")


def test_stages_of_a_pipeline_hang_below_its_run(smoke):
    parent = (smoke / RUNS / "mlflow-run-id").read_text()
    for stage in ("shard", "vqvae", "pretrain", "gan", "evaluate", "promote"):
        assert tags(smoke, run_id(smoke, stage))["mlflow.parentRunId"] == parent
    with sqlite3.connect(smoke / "runs/mlflow.db") as db:
        names = {name for (name,) in db.execute("select name from runs")}
        assert {"smoke (demo)", "smoke/gan", "smoke/promote-pretrained"} <= names
        (about,) = db.execute("select value from experiment_tags where key = 'mlflow.note.content'").fetchone()
    assert "illm" in about


def test_config_packages_and_command_are_kept_with_the_run(smoke):
    kept = smoke / "runs/mlflow-artifacts" / run_id(smoke, "gan") / "artifacts/provenance/attempt-001"
    assert "gan_weight: 0.008" in (kept / "config.yaml").read_text()
    assert "\nmlflow==" in (kept / "packages.txt").read_text()
    assert (kept / "command.txt").read_text().startswith("illm gan")


def test_seeds_inputs_and_every_metric_are_recorded(smoke):
    with sqlite3.connect(smoke / "runs/mlflow.db") as db:
        run = (run_id(smoke, "gan"),)
        assert db.execute("select value from params where key = 'seed' and run_uuid = ?", run).fetchone() == ("0",)
        assert db.execute("select count(*) from inputs where destination_id = ?", run).fetchone() == (1,)


@pytest.fixture
def repository(tmp_path):
    """A git repository with a package in it that has changes."""
    run = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    (tmp_path / "pipeline/tracking").mkdir(parents=True)
    for name in (
        "__init__.py",
        "tracking/__init__.py",
        "tracking/provenance.py",
        "redaction.py",
        "renamed_keys.py",
        "config.py",
        "errors.py",
    ):
        (tmp_path / "pipeline" / name).write_text((ROOT / "pipeline" / name).read_text())
    run("init", "-q")
    run("add", ".")
    run("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    with (tmp_path / "pipeline/errors.py").open("a") as stream:
        stream.write("# a change: https://me:hunter2@example.org\n")
    return tmp_path


def test_changes_of_the_code_are_kept_without_passwords(repository):
    code = "from pipeline import config; from pipeline.tracking import provenance as p; from pathlib import Path; import json\n"
    code += "class C(config.Config): a: int = 1\n"
    code += "p.write(Path('out'), C()); print(p.tags()['code'])"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "with changes" in ended.stdout
    diff = (repository / "out/changes.diff").read_text()
    assert "+# a change: https://me:***@example.org" in diff


def test_the_load_of_the_machine_is_sampled(monkeypatch, tmp_path):
    from pipeline.tracking import system_metrics
    from pipeline.tracking.journal import Journal
    from tests.support.ranks import wait_until

    got: list[dict] = []
    monkeypatch.setattr(system_metrics, "SAMPLE_EVERY", 0.05)
    journal = Journal(tmp_path, "r", "store", got.extend)
    machine = system_metrics.SystemMetrics(journal, began=0.0)
    wait_until(lambda: got, "no sample", 30)
    machine.stop()
    journal.close(5)
    names = {name for record in got for name in record["metrics"]}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names


def test_what_mlflow_reads_gpus_with_is_installed():
    from contextlib import suppress

    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    with suppress(RuntimeError):  # no GPU or no driver here; an ImportError is our mistake
        GPUMonitor()
    for path in ("pyproject.toml", "requirements/pins.txt"):
        assert "nvidia-ml-py" in (ROOT / path).read_text()


def test_who_can_be_told_by_the_environment(monkeypatch):
    monkeypatch.setenv("ILLM_USER", "release robot")
    assert provenance.who() == "release robot"


def test_two_who_write_the_same_row_at_once_are_not_refused_but_try_again():
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE

    from pipeline.tracking import store

    collision = "(psycopg.errors.UniqueViolation) duplicate key value violates unique constraint"
    assert store.is_unavailable(MlflowException(collision, BAD_REQUEST))
    assert store.is_unavailable(
        MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name", BAD_REQUEST)
    )
    assert store.is_unavailable(ConnectionError("refused"))
    assert not store.is_unavailable(MlflowException("Changing param values is not allowed", INVALID_PARAMETER_VALUE))
