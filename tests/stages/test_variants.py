"""Every configuration loads, and every variant of a training stage trains on the smoke networks."""

import pytest
import torch

from pipeline import config
from pipeline.data.loader import LoaderConfig
from pipeline.losses import PUBLISHED_RATE_WEIGHTS
from pipeline.models import serialization
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.distortion import DistortionConfig
from pipeline.registry import resolve
from pipeline.stages import gan, pretrain
from pipeline.stages.describe import describe
from pipeline.training.engine_config import EngineConfig
from pipeline.training.loop import FitConfig
from pipeline.training.runtime import Runtime
from tests.conftest import CONFIGS, ROOT, assert_one_clear_line, illm_here
from tests.system.test_pipeline import RUNS

FILES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "launch")
VARIANTS = sorted(p for p in CONFIGS.glob("*-*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_loads_and_describes_its_networks(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where none of its inputs exists
    told = describe(path, [])
    stage = path.stem.split("-")[0] if path.parent.name != "sweep" else "sweep"
    assert told["stage"] == stage
    networks = {"vqvae": {"labeler"}, "pretrain": {"encoder", "decoder", "codec"}}
    networks["gan"] = networks["pretrain"] | {"discriminator"} | (set() if "patchgan" in path.stem else {"labeler"})
    assert told["parameters"].keys() == networks.get(stage, set())
    assert all(count > 0 for count in told["parameters"].values())
    assert bool(told["memory_gib"]) == (stage in networks)


def test_every_published_rate_has_its_config_and_weight():
    found = {}
    for path in (ROOT / "configs/published").glob("pretrain-*bpp.yaml"):
        cfg = config.load(pretrain.StageConfig, path)
        term = cfg.rate.term(cfg.rate.warmup_steps)
        found[term.target_bpp] = term.weight
        assert path.stem == f"pretrain-{term.target_bpp:g}bpp"
        assert cfg.rate.term(0) == pytest.approx((1.429 * term.target_bpp, term.weight / 2))
    assert found == PUBLISHED_RATE_WEIGHTS


def test_each_discriminator_brings_its_published_weight_and_optimizer():
    label = gan.StageConfig(data={"shards": "s", "batch_size": 2}, fit={"steps": 1}, codec="c", labeler="l")
    assert label.adversarial_weight == 0.008
    patch = config.load(gan.StageConfig, ROOT / "configs/gan-patchgan.yaml")
    assert patch.adversarial_weight == 0.15
    assert patch.discriminator_optimizer == gan.PUBLISHED_OPTIMIZERS["patch"]
    assert gan.PUBLISHED_OPTIMIZERS["label"].lr == 4e-4
    assert gan.PUBLISHED_OPTIMIZERS["label"].betas == (0.5, 0.9)


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_every_variant_trains(smoke, tmp_path, path):
    assert (ROOT / "configs" / path.name).is_file()  # what it is the small form of
    stage = path.stem.split("-")[0]
    ended = illm_here(stage, path, f"run={tmp_path / stage}", "fit.steps=6", cwd=smoke)
    assert ended.code == 0, ended.err
    made = resolve.read(str(tmp_path / stage), "codec")
    assert ("labeler" in made.manifest.parents) == (path.stem == "gan-unconditional")


def test_without_weight_there_is_no_discriminator_and_the_synthesis_still_learns(smoke, tmp_path, monkeypatch):
    ended = illm_here("gan", CONFIGS / "gan.yaml", f"run={tmp_path / 'gan'}", "fit.steps=3", "gan_weight=0", cwd=smoke)
    assert ended.code == 0, ended.err
    assert " D " not in ended.err
    monkeypatch.chdir(smoke)
    before, after = (
        serialization.load_codec(resolve.read(name, "codec")) for name in (f"{RUNS}/pretrain", str(tmp_path / "gan"))
    )
    assert after.bitstream_id() == before.bitstream_id()
    assert not after.synthesis.head[1].weight.equal(before.synthesis.head[1].weight)


def test_the_discriminator_can_learn_alone_first(smoke, tmp_path, monkeypatch):
    words = ("gan", CONFIGS / "gan.yaml", f"run={tmp_path / 'gan'}", "fit.steps=4", "discriminator_warmup_steps=4")
    assert illm_here(*words, cwd=smoke).code == 0
    monkeypatch.chdir(smoke)
    before, after = (resolve.read(name, "codec") for name in (f"{RUNS}/pretrain", str(tmp_path / "gan")))
    weights = [serialization.load_codec(artifact).state_dict() for artifact in (before, after)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_the_label_discriminator_asks_for_a_labeler(tmp_path):
    ended = illm_here("gan", CONFIGS / "gan.yaml", "run=r", "labeler=null", cwd=tmp_path)
    assert_one_clear_line(ended, "needs labeler=")


def test_calibration_changes_the_price_by_the_squared_ratio_of_rates():
    rate = pretrain.Calibration(pretrain.CalibratedRate(kind="calibrated", bpp=0.9))
    assert rate.term(0) == pytest.approx((0.0, 0.125))  # between 0.25 and 0.0625
    rate.measured(1.35)  # half too much
    assert rate.term(9) == pytest.approx((0.0, 0.125 * 1.5**2))
    again = pretrain.Calibration(pretrain.CalibratedRate(kind="calibrated", bpp=0.9))
    again.load_state_dict(rate.state_dict())
    assert again.term(9) == rate.term(9)
    rate.measured(1e-9)
    assert rate.weight == pytest.approx(0.125 * 1.5**2 / 4)


def test_a_calibrated_price_comes_back_from_a_rate_that_stayed_below_its_target_for_long():
    rate = pretrain.Calibration(pretrain.CalibratedRate(kind="calibrated", bpp=0.9))
    for _ in range(2000):
        rate.measured(0.1)
    assert rate.weight == pytest.approx(0.125 / 1000)
    for _ in range(6):
        rate.measured(9)
    assert rate.weight > 0.125
    for _ in range(2000):
        rate.measured(9)
    assert rate.weight == pytest.approx(0.125 * 1000)


def test_the_price_follows_the_weights_that_are_trained_and_not_their_average():
    torch.manual_seed(0)
    cfg = pretrain.StageConfig(
        data=LoaderConfig(shards="", batch_size=2, crop_size=64),
        fit=FitConfig(steps=10),
        engine=EngineConfig(ema_decay=0.999),
        codec=CodecConfig(channels=(4, 4, 4, 4, 4), latent_channels=4, hyper_channels=4, num_residual_blocks=1),
        rate=pretrain.CalibratedRate(kind="calibrated", bpp=0.5),
        distortion=DistortionConfig(lpips=0),
    )
    crops = torch.rand(3, 3, 64, 64)
    task = pretrain.PretrainTask(cfg, Runtime(cfg.engine), crops)
    pixels = 64 * 64
    averaged = task.codec.encode(crops)[1].mean().item() / pixels
    with torch.no_grad():
        task.codec.analysis[-1].weight.mul_(20)
    current = task.codec.encode(crops)[1].mean().item() / pixels
    assert current > 1.05 * averaged
    price = task.rate.weight
    assert task.validate()["val/bpp"] == pytest.approx(averaged)
    assert task.rate.weight == pytest.approx(price * min((current / 0.5) ** 2, 4.0))


def test_quantiles_stay_numbers_when_the_weights_they_follow_are_spoilt():
    codec = Codec(CodecConfig(channels=(4, 4, 4, 4, 4), latent_channels=4, hyper_channels=4, num_residual_blocks=1))
    step = pretrain.QuantileStep(codec, 1e-3)
    before = codec.hyper_entropy.quantiles.clone()
    step.step()
    assert not torch.equal(codec.hyper_entropy.quantiles, before)
    with torch.no_grad():
        next(p for name, p in codec.hyper_entropy.named_parameters() if name != "quantiles").fill_(float("nan"))
    assert not torch.isfinite(step.step())
    assert torch.isfinite(codec.hyper_entropy.quantiles).all()


def test_pretraining_starts_from_the_weights_of_another_codec(smoke, tmp_path):
    words = ("pretrain", CONFIGS / "pretrain.yaml")
    start = smoke / RUNS / "pretrain"
    # so small a step that the weights are those it began with
    options = (f"run={tmp_path / 'next'}", f"init_from={start}", "fit.steps=1", "optimizer.lr=1e-12")
    ended = illm_here(*words, *options, cwd=smoke)
    assert ended.code == 0, ended.err
    before, after = (serialization.load_codec(resolve.read(str(p), "codec")) for p in (start, tmp_path / "next"))
    for name, weight in before.named_parameters():
        if "quantiles" not in name:
            assert torch.allclose(weight, after.get_parameter(name), atol=1e-9), name
    assert "init_from" in resolve.read(str(tmp_path / "next"), "codec").manifest.parents
    refused = illm_here(*words, f"run={tmp_path / 'x'}", f"init_from={start}", "codec.hyper_channels=8", cwd=smoke)
    assert_one_clear_line(refused, "codec: not as in init_from=", "hyper_channels: ")
