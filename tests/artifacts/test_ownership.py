"""Two processes and one run folder."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import config, stages
from pipeline.artifacts import ownership, run_folder
from pipeline.errors import ArtifactError, TakenOver
from pipeline.tracking import store
from pipeline.tracking.run import tracked_run
from tests.conftest import CONFIGS, ROOT, assert_one_clear_line, illm_here

RUNS = "runs/smoke"
HOLDING = """
import sys
from pathlib import Path
from pipeline.artifacts import ownership
with ownership.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until its standard input is closed."""
    command = [sys.executable, "-c", HOLDING, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_live_process_keeps_its_folder_and_a_dead_one_loses_it(tmp_path, monkeypatch, capsys, cli_log):
    monkeypatch.setenv(ownership.WAIT_ENV, "1")
    with holder(tmp_path) as process:
        before = contents(tmp_path)
        with (
            pytest.raises(ArtifactError, match=rf"in use by process {process.pid} on .*; wait for it or stop it"),
            ownership.held(tmp_path),
        ):
            pass
        assert contents(tmp_path) == before
        assert "waiting up to 1 s for process" in capsys.readouterr().err
        process.kill()
        process.wait()
        with ownership.held(tmp_path) as still_ours:
            still_ours()


def test_a_process_that_leaves_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv(ownership.WAIT_ENV, "60")
    with holder(tmp_path) as process:
        assert process.stdin is not None
        leaving = threading.Timer(0.5, process.stdin.close)
        leaving.start()
        with ownership.held(tmp_path) as still_ours:
            still_ours()
        leaving.join()


def test_another_machine_takes_the_folder_and_the_earlier_one_is_told(tmp_path):
    with ownership.held(tmp_path) as still_ours:
        ownership.acquire(tmp_path)  # as a process of another machine, which sees no lock
        with pytest.raises(TakenOver, match="taken over by process"):
            still_ours()


def test_a_folder_that_is_removed_is_told(tmp_path):
    def work() -> None:
        with ownership.held(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run" / "anything").write_text("x")

    with pytest.raises(ArtifactError, match=r"run: was removed while process .* worked in it"):
        work()


def test_who_was_taken_over_does_not_call_the_run_failed(smoke, tmp_path, monkeypatch):
    """It goes on elsewhere, and how it ends is told there."""
    monkeypatch.chdir(smoke)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri())  # put back afterwards: the store sets it
    cfg = config.load(stages.get("pretrain").StageConfig, CONFIGS / "pretrain.yaml")

    def work() -> None:
        with tracked_run("pretrain", tmp_path, cfg, run_folder.NO_INPUTS):
            raise TakenOver("by somebody else")

    with pytest.raises(TakenOver):
        work()
    records = [json.loads(line) for line in (tmp_path / "tracking.jsonl").read_text().splitlines()]
    assert [record["status"] for record in records if record["kind"] == "status"] == ["RUNNING"]


def test_every_stage_refuses_a_folder_in_which_another_process_works(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv(ownership.WAIT_ENV, "0")
    more = {
        "gan": [f"codec={RUNS}/pretrain", f"labeler={RUNS}/vqvae"],
        "evaluate": [f"images={RUNS}/shard", f"codecs={{pretrained: {RUNS}/pretrain, fine-tuned: {RUNS}/gan}}"],
        "promote": [f"evaluation={RUNS}/evaluate", "name=nobody"],
    }
    for stage in ("vqvae", "pretrain", "gan", "evaluate", "promote"):
        folder = tmp_path / stage
        with ownership.held(folder):
            before = contents(folder)
            words = more.get(stage) or []
            ended = illm_here(stage, CONFIGS / f"{stage}.yaml", f"run={folder}", *words, cwd=smoke)
            assert_one_clear_line(ended, f"{folder}: in use by process")
            assert contents(folder) == before
            assert not (folder / run_folder.RUN_ID_FILE).exists()
