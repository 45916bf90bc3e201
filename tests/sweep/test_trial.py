"""Trials that share what they have in common, with real stages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import config
from pipeline.stages import gan
from pipeline.sweep import space, trial
from tests.conftest import ROOT


@pytest.fixture
def searched(smoke: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> space.Space:
    """Of the smoke codec, whose discriminator learns by itself for 3 of 6 steps."""
    monkeypatch.chdir(smoke)
    base = {
        "extends": f"{ROOT}/configs/smoke/gan.yaml",
        "discriminator_warmup_steps": 3,
        "fit": {"steps": 6, "checkpoint_every": 3, "keep_every": 3, "validate_every": 6},
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


def begun(searched: space.Space, sweep: Path, values: space.Values) -> Path:
    place = trial.place_of(sweep, values)
    trial.prepare(place, values)
    trial._share_warmup(searched, sweep, place, values)
    return place


def trained(searched: space.Space, place: Path, values: space.Values) -> dict[str, torch.Tensor]:
    cfg = config.load(gan.StageConfig, searched.gan, space.overrides("gan", values))
    return load_file(gan.run(cfg, place / "gan") / "weights.safetensors")


def test_gan_weights_share_the_warm_up_and_train_to_the_same_bits(searched, tmp_path):
    heavy, light = ({"gan.gan_weight": weight, "gan.seed": 0} for weight in (0.5, 0.1))
    alone = trained(searched, begun(searched, tmp_path / "alone", heavy), heavy)
    trained(searched, begun(searched, tmp_path / "sweep", light), light)
    place = begun(searched, tmp_path / "sweep", heavy)
    assert [p.name for p in (place / "gan/checkpoints").iterdir()] == ["step-000000003"]
    shared = trained(searched, place, heavy)
    assert all(torch.equal(shared[name], value) for name, value in alone.items())


@pytest.mark.parametrize("unlike", [{"gan.seed": 1}, {"gan.gan_weight": 0}])
def test_trials_that_differ_before_do_not_share(searched, tmp_path, unlike):
    values = {"gan.gan_weight": 0.1, "gan.seed": 0}
    (trial.place_of(tmp_path, values) / "gan/checkpoints/step-000000003").mkdir(parents=True)
    trial.prepare(trial.place_of(tmp_path, values), values)
    assert not (begun(searched, tmp_path, values | unlike) / "gan").exists()
    # as the same with another weight does
    assert (begun(searched, tmp_path, values | {"gan.gan_weight": 0.2}) / "gan/checkpoints/step-000000003").is_dir()
