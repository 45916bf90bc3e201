"""Trials that share what they have in common, with real stages."""

import fcntl
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import config
from pipeline.stages import gan
from pipeline.storage import disk
from pipeline.sweep import space, trial
from tests.conftest import ROOT


@pytest.fixture
def searched(smoke: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> space.Space:
    """Of the smoke codec, whose discriminator learns by itself for 3 of 6 steps."""
    monkeypatch.chdir(smoke)
    base = {
        "extends": f"{ROOT}/configs/smoke/gan.yaml",
        "discriminator_warmup_steps": 3,
        "engine": {"precision": "auto"},
        "fit": {"steps": 6, "log_every": 1, "checkpoint_every": 3, "keep_every": 3, "validate_every": 6},
    }
    (tmp_path / "gan.yaml").write_text(json.dumps(base))
    values = {
        "shards": "runs/smoke/shard",
        "labeler": "runs/smoke/vqvae",
        "codec": "runs/smoke/pretrain",
        "gan": str(tmp_path / "gan.yaml"),
        "evaluate": f"{ROOT}/configs/smoke/evaluate.yaml",
        "search": {key: {"kind": "grid", "values": [0, 1]} for key in ("gan.gan_weight", "gan.seed")},
    }
    return config.parse(space.Space, values, [], "test")


def begun(searched: space.Space, sweep: Path, values: space.Values) -> tuple[Path, gan.StageConfig]:
    """A trial that may share a warm-up, and its configuration."""
    place = trial.place_of(sweep, values)
    trial.prepare(place, values)
    words = space.overrides("gan", values)
    trial._share_warmup(searched, sweep, place, words)
    return place, config.load(gan.StageConfig, searched.gan, words)


def trained(place: Path, cfg: gan.StageConfig) -> dict[str, torch.Tensor]:
    return load_file(gan.run(cfg, place / "gan") / "weights.safetensors")


def first_step(place: Path) -> int:
    lines = map(json.loads, (place / "gan/tracking.jsonl").read_text().splitlines())
    return min(line["step"] for line in lines if any(name.startswith("train/") for name in line.get("metrics", ())))


def test_gan_weights_share_the_warm_up_and_train_to_the_same_bits(searched, tmp_path):
    heavy, light = ({"gan.gan_weight": weight, "gan.seed": 0} for weight in (0.5, 0.1))
    alone, cfg = begun(searched, tmp_path / "alone", heavy)
    expected = trained(alone, cfg)
    trained(*begun(searched, tmp_path / "sweep", light))
    place, cfg = begun(searched, tmp_path / "sweep", heavy)
    assert [p.name for p in (place / "gan/checkpoints").iterdir()] == ["step-000000003"]
    shared = trained(place, cfg)
    assert all(torch.equal(shared[name], value) for name, value in expected.items())
    assert (first_step(alone), first_step(place)) == (1, 4)


def test_what_differs_before_is_not_shared(searched, tmp_path):
    values = {"gan.gan_weight": 0.1, "gan.seed": 0}
    trained(*begun(searched, tmp_path, values))
    trained(*begun(searched, tmp_path, values | {"gan.gan_weight": 0}))
    # a trial that was killed before it was prepared
    (tmp_path / "trials/0/gan").mkdir(parents=True)

    def shares(**other: object) -> bool:
        place, _ = begun(searched, tmp_path, values | {f"gan.{key}": value for key, value in other.items()})
        return (place / "gan/checkpoints").is_dir()

    assert not shares(seed=1)
    assert not shares(discriminator={"kind": "patch", "channels": [4, 4, 4, 4], "context_channels": 2})
    assert not shares(**{"discriminator_optimizer.lr": 0.1})
    assert not shares(**{"fit.keep_every": 2, "gan_weight": 0.3})
    assert shares(gan_weight=0.2)
    assert shares(gan_weight=None)
    # of the files that the sweep names
    path = Path(searched.gan)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"distortion": {"mse": 100}}))
    assert not shares(gan_weight=0.4)


def test_a_trial_that_waits_for_anothers_pretraining_stops_when_asked(tmp_path):
    lock, before = tmp_path / "lock", signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    asked = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2))
    try:
        with disk.exclusive_lock(lock):
            asked.start()
            began = time.monotonic()
            with pytest.raises(trial.Interrupted), trial._locked(lock):
                pytest.fail("it has a lock that another holds")
            assert time.monotonic() - began < 60
        with trial._locked(lock), pytest.raises(BlockingIOError), lock.open() as ours:
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        asked.cancel()
        signal.signal(signal.SIGUSR2, before)
