"""What one training step adds up, against the same sum written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F

from pipeline import losses
from pipeline.data.batch import Batch
from pipeline.data.loader import LoaderConfig
from pipeline.models import serialization
from pipeline.registry import resolve
from pipeline.stages.gan import GanTask
from pipeline.stages.gan import StageConfig as GanConfig
from pipeline.stages.pretrain import PretrainTask
from pipeline.stages.pretrain import StageConfig as PretrainConfig
from pipeline.stages.vqvae import StageConfig as VqvaeConfig
from pipeline.stages.vqvae import VqvaeTask
from pipeline.training.engines import Trainable
from pipeline.training.runtime import Runtime
from tests.models.test_networks import SMALL, SMALL_LABELER
from tests.system.test_pipeline import RUNS

COMMON = {"data": LoaderConfig(shards="s", batch_size=4, crop_size=64), "fit": {"steps": 10}}
DISTORTION = {"mse": 150, "lpips": 1, "if_lpips_missing": "skip"}


def batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    small = torch.rand(4, 3, 8, 8, generator=generator)
    return Batch(F.interpolate(small, size=(64, 64), mode="bilinear"), [40, 41, 42, 43], [0, 1, 2, 3])


@pytest.mark.parametrize("target", [0.001, 1000.0])
def test_pretraining_pays_for_distortion_and_for_bits_by_the_target(target):
    torch.manual_seed(0)
    cfg = PretrainConfig(
        **COMMON,
        codec=SMALL,
        distortion=DISTORTION,
        rate={"kind": "target", "bpp": target, "weight": 3.0, "warmup_steps": 2},
    )
    runtime = Runtime()
    task = PretrainTask(cfg, runtime, torch.zeros(0, 3, 64, 64))
    before, b = copy.deepcopy(task.codec), batch()
    out = before(b.x, before.noise_like(b.x, runtime.generators(cfg.seed, b.positions)))
    bpp = out.bits / 64**2
    weight = 3.0 if target < 1 else 0.0625
    metrics = task.train_step([b], step=5)
    expected = 150 * (out.x_hat - b.x).square().mean() + weight * bpp.mean()
    assert metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["train/bpp"].item() == pytest.approx(out.rounded_bits.mean().item() / 64**2, rel=1e-5)
    quantiles = task.codec.hyper_entropy.quantiles
    assert not torch.equal(quantiles, before.hyper_entropy.quantiles)
    for name, p in task.codec.named_parameters() if target < 1 else ():  # a low price moves the entropy model invisibly
        assert "quantiles" in name or not torch.equal(p, before.get_parameter(name)), name


@pytest.mark.parametrize("pixel_loss", ["l1", "mse"])
def test_the_labeler_pays_for_pixels_commitment_and_embedding(pixel_loss):
    torch.manual_seed(0)
    cfg = VqvaeConfig(
        **COMMON,
        labeler=SMALL_LABELER,
        pixel_loss=pixel_loss,
        commitment_weight=0.5,
        codebook_weight=2.0,
        dead_code_every=7,
        quantize_after=1,
    )
    task = VqvaeTask(cfg, Runtime(), torch.zeros(0, 3, 64, 64))
    before, b = copy.deepcopy(task.labeler), batch()
    out = before(b.x)
    pixel = (out.x_hat - b.x).abs().mean() if pixel_loss == "l1" else (out.x_hat - b.x).square().mean()
    codes = (out.z - out.codes).square().mean()
    metrics = task.train_step([b], step=5)
    assert metrics["train/loss"].item() == pytest.approx((pixel + 2.5 * codes).item(), rel=1e-5)
    assert metrics["train/codes_used"].item() == out.labels.unique().numel()
    assert not torch.equal(task.labeler.codebook, before.codebook)
    plain = before(b.x, quantise=False)
    task.labeler.load_state_dict(before.state_dict())
    pixel = (plain.x_hat - b.x).abs().mean() if pixel_loss == "l1" else (plain.x_hat - b.x).square().mean()
    metrics = task.train_step([b], step=0)  # plain autoencoding: no commitment yet
    assert metrics["train/loss"].item() == pytest.approx((pixel + 2 * codes).item(), rel=1e-5)


def labeler_task(**changes: object) -> VqvaeTask:
    torch.manual_seed(0)
    cfg = VqvaeConfig(**COMMON, labeler=SMALL_LABELER, **{"dead_code_every": 2, **changes})
    return VqvaeTask(cfg, Runtime(), torch.zeros(0, 3, 64, 64))


@pytest.mark.parametrize(("first", "all_replaced"), [("data", True), ("gaussian", False)])
def test_the_first_codes_are_patches_or_stay_random(first, all_replaced):
    task = labeler_task(codebook_init=first)
    before, b = task.labeler.codebook.clone(), batch()
    patches = task.labeler.embed(b.x).permute(0, 2, 3, 1).flatten(0, 2).detach()
    task.reseed([b], 0, everything=first == "data")
    is_patch = [(patches == code).all(1).any().item() for code in task.labeler.codebook]
    assert is_patch == [all_replaced] * len(before)
    assert torch.equal(task.labeler.codebook, before) != all_replaced


def test_dead_codes_alone_are_replaced_and_none_towards_the_end():
    task = labeler_task(dead_code_below=0.5, dead_code_until=0.5)
    before, b = task.labeler.codebook.clone(), batch()
    # The average use is 16: codes that were chosen 8 times or less are dead
    uses = torch.full_like(task.usage.counts, 19)
    uses[:3] = torch.tensor([0, 8, 9])
    uses[3] += 16 * len(uses) - uses.sum()
    task.usage.counts.copy_(uses)
    task.reseed([b], 2, everything=False)
    changed = (task.labeler.codebook != before).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 1]
    assert task.usage.counts.sum() == 0
    # Training has COMMON's 10 steps: from the fifth on no code is replaced
    seen = []
    task.reseed = lambda parts, step, everything: seen.append(step)
    for step in range(10):
        task.train_step([b], step)
    assert seen == [0, 2, 4]


def spied_gradients(monkeypatch) -> dict[Trainable, list[torch.Tensor]]:
    """Filled with the gradients that each network has when it is updated."""
    gradients, update = {}, Trainable.update

    def spy(self: Trainable, step: int) -> torch.Tensor:
        gradients[self] = [p.grad.clone() for p in self.trained.values()]
        return update(self, step)

    monkeypatch.setattr(Trainable, "update", spy)
    return gradients


@pytest.mark.parametrize("kind", ["label", "patch"])
def test_fine_tuning_pays_for_distortion_and_for_being_seen_through(smoke, monkeypatch, kind):
    monkeypatch.chdir(smoke)
    torch.manual_seed(0)
    discriminator = {"label": {"channels": (4,) * 6, "head_channels": 4}, "patch": {"channels": (4,) * 4}}[kind]
    cfg = GanConfig(
        **COMMON, codec=f"{RUNS}/pretrain", labeler=f"{RUNS}/vqvae", distortion=DISTORTION, gan_weight=0.7,
        discriminator=discriminator | {"kind": kind, "context_channels": 2},
    )  # fmt: skip
    networks = (
        serialization.load_codec(resolve.read(cfg.codec, "codec")),
        serialization.load_labeler(resolve.read(cfg.labeler, "labeler")),
    )
    task = GanTask(cfg, Runtime(), torch.zeros(0, 3, 64, 64), *networks)
    task.adversary.network.eval()  # spectral norm estimates nothing anew between the passes that are compared
    b, judge = batch(), copy.deepcopy(task.adversary.network)
    gradients = spied_gradients(monkeypatch)
    codec, labeler = (copy.deepcopy(m) for m in (task.codec, task.labeler))
    y_hat, _ = codec.encode(b.x)
    labels = labeler.label(b.x)
    x_hat = codec.synthesis(y_hat[0::2])
    fooled = judge(x_hat, y_hat[0::2])
    judge.zero_grad()
    logits = judge(torch.cat([b.x[1::2], x_hat]), torch.cat([y_hat[1::2], y_hat[0::2]]))
    if kind == "label":
        adversarial = F.cross_entropy(fooled, labels[0::2] + 1)
        judged = (F.cross_entropy(logits[:2], labels[1::2] + 1) + F.cross_entropy(logits[2:], 0 * labels[0::2])) / 2
    else:
        ones, zeros = torch.ones_like(fooled), torch.zeros_like(fooled)
        bce = F.binary_cross_entropy_with_logits
        adversarial = bce(fooled, ones)
        judged = bce(logits[:2], ones) + bce(logits[2:], zeros)
    metrics = task.train_step([b], step=0)
    plain = 150 * (x_hat - b.x[0::2]).square().mean()
    expected = plain + 0.7 * adversarial
    strengths = [torch.autograd.grad(loss, x_hat, retain_graph=True)[0].norm().item() for loss in (adversarial, plain)]
    assert metrics["train/adversarial_gradient_ratio"].item() == pytest.approx(
        0.7 * strengths[0] / strengths[1], rel=1e-3
    )
    assert metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["train/discriminator"].item() == pytest.approx(judged.item(), rel=1e-4)
    for trainable, loss, network in (
        (task.generator, expected, codec.synthesis),
        (task.adversary.trainable, judged, judge),
    ):  # what the networks learn from is the gradient of these losses, and of nothing else
        wanted = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        for got, want in zip(gradients[trainable], wanted, strict=True):
            assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9
    assert not torch.equal(task.codec.synthesis.head[1].weight, codec.synthesis.head[1].weight)
    moved = [n for n, p in task.adversary.network.named_parameters() if not torch.equal(p, judge.get_parameter(n))]
    assert len(moved) == len(list(judge.parameters()))


def test_an_adversary_without_any_distortion_is_not_divided_by_zero(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    cfg = GanConfig(
        **COMMON, codec=f"{RUNS}/pretrain", distortion={"mse": 0, "lpips": 0}, gan_weight=1,
        discriminator={"kind": "patch", "channels": (4,) * 4, "context_channels": 2, "high_pass": 8},
    )  # fmt: skip
    codec = serialization.load_codec(resolve.read(cfg.codec, "codec"))
    metrics = GanTask(cfg, Runtime(), torch.zeros(0, 3, 64, 64), codec, None).train_step([batch()], step=0)
    assert metrics["train/adversarial_gradient_ratio"].item() > 1e6
    assert all(torch.isfinite(value).all() for value in metrics.values())


def test_lpips_counts_with_its_weight():
    from pipeline.models import distortion
    from pipeline.models.lpips import Lpips

    loss = distortion.Distortion(distortion.DistortionConfig(mse=0, lpips=0))
    loss.cfg = distortion.DistortionConfig(mse=10, lpips=3)
    loss.lpips = Lpips(None)
    x, y = batch().x, batch().x.flip(0)
    total, _ = loss(y, x)
    expected = 10 * losses.mse(y, x) + 3 * loss.lpips(y, x).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_shifted_lpips_is_the_same_in_parts_and_whatever_else_draws_numbers(monkeypatch):
    from pipeline.models import distortion
    from pipeline.models.lpips import Lpips

    torch.manual_seed(3)
    lpips = Lpips(None)
    monkeypatch.setattr(distortion, "load_lpips", lambda: lpips)

    def weights(task: PretrainTask) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in task.codec.synthesis.parameters()])

    def trained(num_parts: int, drawn: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the synthesis moved in three steps, and the loss of the last."""
        torch.manual_seed(0)
        distortion_ = {"mse": 1, "lpips": 100, "lpips_shift": shift, "if_lpips_missing": "skip"}
        cfg = PretrainConfig(**COMMON, codec=SMALL, distortion=distortion_, rate={"kind": "fixed", "weight": 1.0})
        task = PretrainTask(cfg, Runtime(), torch.zeros(0, 3, 64, 64))
        start = weights(task)
        torch.rand(drawn)
        losses_ = [task.train_step(batch().split(num_parts), step)["train/loss"] for step in range(3)]
        return weights(task) - start, losses_[-1]

    (whole, loss), (after_others, same_loss), (in_parts, _) = trained(1, 0, 3), trained(1, 5, 3), trained(2, 0, 3)
    assert torch.equal(whole, after_others)
    assert torch.equal(loss, same_loss)
    assert (in_parts - whole).norm() < 1e-4 * whole.norm()
    assert (trained(1, 0, 0)[0] - whole).norm() > 0.1 * whole.norm()


def test_the_frozen_half_of_a_fine_tuned_codec_collects_no_gradient(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    cfg = GanConfig(**COMMON, codec=f"{RUNS}/pretrain", distortion=DISTORTION, gan_weight=0)
    loaded = serialization.load_codec(resolve.read(cfg.codec, "codec"))
    task = GanTask(cfg, Runtime(), torch.zeros(0, 3, 64, 64), loaded, None)
    task.train_step([batch()], step=0)
    codec = task.codec
    assert not any(m.training for m in (codec.analysis, codec.hyper_analysis, codec.hyper_entropy, codec.entropy))
    trainable = [name for name, p in codec.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.startswith("synthesis.") for name in trainable)
    assert all(p.grad is None for name, p in codec.named_parameters() if not name.startswith("synthesis."))
    first, again = (codec.encode(batch().x)[0] for _ in range(2))  # no noise: the same latent every time
    assert torch.equal(first, again)
    assert serialization.load_codec(resolve.read(cfg.codec, "codec")).bitstream_id() == codec.bitstream_id()
