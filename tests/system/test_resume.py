"""Stopped by a signal, or while sharding. Kills of trainers are in test_engines.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.registry import resolve
from tests.conftest import CONFIGS, ROOT, illm
from tests.system.test_pipeline import RUNS


def start(stage: str, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", stage, str(CONFIGS / f"{stage}.yaml"), f"run={RUNS}/{stage}", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for_checkpoint(folder: Path, stage: str, process: subprocess.Popen[bytes]) -> None:
    root, limit = folder / RUNS / stage / "checkpoints", time.monotonic() + 120
    while not list(root.glob("step-*")) and process.poll() is None:
        assert time.monotonic() < limit, "no checkpoint within two minutes"
        time.sleep(0.02)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT)])
def test_a_signal_saves_and_leaves_with_the_documented_code(smoke, smoke_copy, numbers):
    folder = smoke_copy("shard")
    process = start("pretrain", folder, "fit.steps=100000", "fit.checkpoint_every=10")
    wait_for_checkpoint(folder, "pretrain", process)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told.decode()
    assert b"preempted at step" in told
    step = int(told.decode().rsplit("preempted at step ", 1)[1].split(";")[0])
    assert (folder / RUNS / "pretrain" / "checkpoints" / f"step-{step:09d}" / "manifest.json").is_file()
    records = map(json.loads, (folder / RUNS / "pretrain" / "tracking.jsonl").read_text().splitlines())
    assert [record["status"] for record in records if record["kind"] == "status"] == ["RUNNING", "KILLED"]


def test_interrupted_sharding_starts_over_and_ends_the_same(smoke, images, tmp_path):
    words = ("shard", CONFIGS / "shard.yaml", f"run={RUNS}/shard", f"source={images}")
    (tmp_path / RUNS / "shard" / ".artifact.abc").mkdir(parents=True)
    (tmp_path / RUNS / "shard" / ".artifact.abc" / "train-000000.tar").write_bytes(b"half")
    assert illm(*words, cwd=tmp_path).code == 0
    ours, theirs = (resolve.read(str(f / RUNS / "shard"), "shards") for f in (tmp_path, smoke))
    assert ours.digest == theirs.digest
    assert not list((tmp_path / RUNS / "shard").glob(".artifact*"))
