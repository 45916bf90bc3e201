"""The reference configurations at full size, for two steps each, on the smoke images."""

import shutil
from pathlib import Path

import pytest

from pipeline.bitstream.codec import ImageCodec
from pipeline.registry import resolve
from tests.conftest import ROOT, illm, picture
from tests.system.test_pipeline import RUNS

pytestmark = [pytest.mark.slow, pytest.mark.long]
SMALL_DATA = (
    f"data.shards={RUNS}/shard",
    "data.batch_size=2",
    "data.crop_size=64",
    "data.num_validation_crops=2",
    "data.num_workers=0",
)
SHORT = ("fit.steps=2", "fit.log_every=1")
NO_LPIPS = "distortion.if_lpips_missing=skip"


def test_every_stage_trains_at_full_size(smoke: Path, tmp_path: Path, monkeypatch):
    configs = ROOT / "configs"
    for stage, words in {
        "vqvae": ["quantize_after=1"],
        "pretrain": [NO_LPIPS],
        "gan": [NO_LPIPS, f"codec={tmp_path}/pretrain", f"labeler={tmp_path}/vqvae"],
    }.items():
        ended = illm(
            stage, configs / f"{stage}.yaml", f"run={tmp_path / stage}", *SMALL_DATA, *SHORT, *words, cwd=smoke
        )
        assert ended.code == 0, ended.err
        shutil.rmtree(tmp_path / stage / "checkpoints")  # two gigabytes each
    pretrained, tuned = (ImageCodec.load(str(tmp_path / stage)) for stage in ("pretrain", "gan"))
    assert tuned.codec.synthesis.residual[8].layers[0].weight.shape == (960, 960, 3, 3)
    content = pretrained.compress(picture(1, 70, 60))
    assert tuned.compress(picture(1, 70, 60)) == content
    assert tuned.decompress(content).shape == (70, 60, 3)
    names = {role: p.source for role, p in resolve.read(str(tmp_path / "gan"), "codec").manifest.parents.items()}
    assert names.keys() == {"shards", "codec", "labeler"}
