"""A killed run ends like an uninterrupted one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import artifacts
from tests.conftest import CONFIGS, ROOT, illm
from tests.test_pipeline import RUNS

INPUTS = {"vqvae": ["shard"], "pretrain": ["shard"], "gan": ["shard", "vqvae", "pretrain"]}


def start(stage: str, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", stage, str(CONFIGS / f"{stage}.yaml"), f"run={RUNS}/{stage}", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def weights_digest(folder: Path, stage: str) -> str:
    kind = artifacts.kind_of(str(folder / RUNS / stage))
    return artifacts.read(str(folder / RUNS / stage), kind).manifest.files["weights.safetensors"].sha256


def wait_for_checkpoint(folder: Path, stage: str, process: subprocess.Popen[bytes]) -> None:
    root, limit = folder / RUNS / stage / "checkpoints", time.monotonic() + 120
    while not list(root.glob("step-*")) and process.poll() is None:
        assert time.monotonic() < limit, "no checkpoint within two minutes"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqvae", "pretrain", "gan"])
def test_killed_at_random_moments_it_ends_with_the_same_weights(smoke, smoke_copy, stage):
    folder = smoke_copy(*INPUTS[stage])
    moments = random.Random(stage)
    for _ in range(2):
        process = start(stage, folder)
        wait_for_checkpoint(folder, stage, process)
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.communicate()
    finished = start(stage, folder)
    _, told = finished.communicate(timeout=300)
    assert finished.returncode == 0, told.decode()
    assert b"resumed at step" in told or (folder / RUNS / stage / "artifact").exists()
    assert weights_digest(folder, stage) == weights_digest(smoke, stage)


def test_a_signal_saves_and_leaves_with_the_documented_code(smoke, smoke_copy):
    folder = smoke_copy("shard")
    process = start("pretrain", folder, "fit.steps=100000", "fit.checkpoint_every=10")
    wait_for_checkpoint(folder, "pretrain", process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told.decode()
    assert b"preempted at step" in told
    step = int(told.decode().rsplit("preempted at step ", 1)[1].split(";")[0])
    assert (folder / RUNS / "pretrain" / "checkpoints" / f"step-{step:09d}" / "manifest.json").is_file()


def test_interrupted_sharding_starts_over_and_ends_the_same(smoke, images, tmp_path):
    words = ("shard", CONFIGS / "shard.yaml", f"run={RUNS}/shard", f"source={images}")
    (tmp_path / RUNS / "shard" / ".artifact.abc").mkdir(parents=True)
    (tmp_path / RUNS / "shard" / ".artifact.abc" / "train-000000.tar").write_bytes(b"half")
    assert illm(*words, cwd=tmp_path).code == 0
    ours, theirs = (artifacts.read(str(f / RUNS / "shard"), "shards") for f in (tmp_path, smoke))
    assert ours.digest == theirs.digest
    assert not list((tmp_path / RUNS / "shard").glob(".artifact*"))
