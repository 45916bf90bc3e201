"""What each trick gains on its own: our full-size GAN step with it, against the same step without it."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import gemm
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.models.layers import ChannelNorm
from pipeline.stages.gan import Adversary, GanTask
from pipeline.training.device import best_precision
from pipeline.training.engine_config import EngineConfig
from pipeline.training.runtime import Runtime
from tests.benchmarks.measure import DEVICE, Row, faster, peak_memory_gb
from tests.benchmarks.steps import BATCH, CROP, Step, our_gan, our_pretrain

UNIT = f"crops of {CROP}x{CROP} /s"
COUNT = 2 if DEVICE.type == "cpu" else 20


class TwoPasses(Adversary):
    """Two passes over the reconstructions with the same weights: one for each network, as published."""

    def fake_step(self, x_hat, y_hat, labels, share):  # type: ignore[no-untyped-def]
        fake = x_hat.detach().requires_grad_()
        self.network.requires_grad_(False)
        (seen_through,) = torch.autograd.grad(self.network.generator_loss(self.network(fake, y_hat), labels), fake)
        self.network.requires_grad_(True)
        metrics, _ = super().fake_step(x_hat, y_hat, labels, share)
        return metrics, seen_through


class DecodesAll(GanTask):
    """Decodes the discriminator's half too, and throws it away, as published."""

    def _encode_and_label(self, part):  # type: ignore[no-untyped-def]
        seen = super()._encode_and_label(part)
        with torch.no_grad():
            self.codec.synthesis(seen.y_hat[1::2])
        return seen


def changed(owner: object, name: str, value: object, make: Callable[[], Any]) -> Any:
    """What `make` builds or does while `owner.name` is another."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return make()
    finally:
        setattr(owner, name, before)


def channel_norm() -> Row:
    norm = ChannelNorm(240).to(DEVICE)
    x = torch.randn(4, 240, 64, 64, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()

    def definition(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=1)
        return norm.scale * (x - mean) * torch.rsqrt(var + norm.eps) + norm.shift

    return faster(
        "channel norm alone, forward and backward", lambda: norm(x).sum().backward(),
        lambda: definition(x).sum().backward(), 4, "maps of 240x64x64 /s", "its definition", 7,
    )  # fmt: skip


def nearest_code() -> Row:
    labeler = Labeler(LabelerConfig(channels=8)).to(DEVICE)
    z = F.normalize(torch.randn(8, 8, 32, 32, device=DEVICE), dim=1)
    codes = F.normalize(labeler.codebook.detach(), dim=1)

    def difference() -> Tensor:
        return (z.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1).argmin(-1)

    assert torch.equal(labeler.nearest(z), difference())
    return faster(
        "nearest of 1024 codes alone", lambda: labeler.nearest(z), difference, 8, UNIT, "all differences", 7
    )  # fmt: skip


def rows() -> Iterator[Row]:
    import tests.benchmarks.steps as steps
    from pipeline.stages import gan as stage

    yield channel_norm()
    yield nearest_code()
    plain = our_gan()
    contiguous = lambda self, module: module.to(self.device)
    peers: dict[str, Callable[[], Step]] = {
        "two passes over the reconstructions": lambda: changed(stage, "Adversary", TwoPasses, our_gan),
        "decoding the discriminator's half too": lambda: changed(steps.gan, "GanTask", DecodesAll, our_gan),
        "weights and images in PyTorch's default layout": lambda: changed(Runtime, "place", contiguous, plain_images),
    }
    for name, make in peers.items():
        yield faster("gan step", plain, make(), BATCH["gan"], UNIT, name, COUNT)
    options = {
        "labels and latents of fixed crops kept (frozen_cache_mb)": lambda: our_gan(frozen_cache_mb=1000),
        "residual blocks computed again (engine.activation_checkpointing)": lambda: our_gan(
            EngineConfig(activation_checkpointing=True)
        ),
        "bf16 autocast (engine.precision=bf16)": lambda: our_gan(EngineConfig(precision="bf16")),
        "labels in bf16 (labeler_precision=bf16)": lambda: our_gan(labeler_precision="bf16"),
        "compiled (engine.compile)": lambda: our_gan(EngineConfig(compile=True)),
    }
    for name, make in options.items():
        yield faster(f"gan step, {name}", make(), plain, BATCH["gan"], UNIT, "without", COUNT)
    # A step holds gigabytes, and what was compiled keeps its own
    del plain
    torch._dynamo.reset()
    if DEVICE.type == "cpu":
        yield from products()
    name = "engine.activation_checkpointing"
    less, more = peak_memory_gb(partial(our_gan, EngineConfig(activation_checkpointing=True))), peak_memory_gb(our_gan)
    yield Row(f"gan step's peak memory, {name} (less is better)", less, "GB", more, "without")


def products() -> Iterator[Row]:
    """Steps whose wide convolutions are matrix products, against PyTorch's own convolutions."""
    for stage, make in {"gan": our_gan, "pretrain": our_pretrain}.items():
        for precision in dict.fromkeys(("fp32", best_precision())):
            step = make(EngineConfig(precision=precision))
            without = partial(changed, gemm, "LEAST_WEIGHTS", sys.maxsize, step)
            name = "convolutions as PyTorch has them"
            yield faster(f"{stage} step, {precision}", step, without, BATCH[stage], UNIT, name, 2 * COUNT)


def plain_images() -> Step:
    import tests.benchmarks.steps as steps

    before = steps.LAYOUT
    steps.LAYOUT = torch.contiguous_format
    try:
        return our_gan()
    finally:
        steps.LAYOUT = before
