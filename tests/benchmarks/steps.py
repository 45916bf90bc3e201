"""Training steps of the three stages at full size, and the published implementation's own steps beside them.

REFERENCE names a folder that holds the `neuralcompression` package (a checkout, or where pip put it); without it, the
installed package is used if there is one. Its GAN step is put together from its networks and losses in the order that
its training script has: labels of all crops; the whole codec on all crops; the generator's update through the frozen
discriminator; the discriminator's update on original and reconstructed crops, one after the other.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.data.loader import LoaderConfig
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.discriminator import LabelDiscriminatorConfig
from pipeline.models.distortion import DistortionConfig
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.stages import gan, pretrain, vqvae
from pipeline.training.device import best_precision
from pipeline.training.engine_config import EngineConfig
from pipeline.training.loop import FitConfig
from pipeline.training.runtime import Runtime
from tests.benchmarks.measure import CUDA, DEVICE, TINY, Row, faster, flops, peak_flops, peak_memory_gb, seconds

if place := os.environ.get("REFERENCE"):
    sys.path.insert(0, place)

# TINY=1: tiny networks, to try a benchmark in seconds. Its figures say nothing.
CROP = 64 if TINY else 256
CODEC, LABELER, DISCRIMINATOR = CodecConfig(), LabelerConfig(), LabelDiscriminatorConfig()
if TINY:
    CODEC = CodecConfig(channels=(4, 4, 6, 8, 12), latent_channels=8, hyper_channels=6, num_residual_blocks=1)
    LABELER = LabelerConfig(
        channels=4, channel_multipliers=(1, 1, 2, 2), num_blocks=1, embedding_channels=8, code_dim=4, num_codes=16
    )
    DISCRIMINATOR = LabelDiscriminatorConfig(channels=(4, 4, 8, 8, 8, 8), head_channels=8, context_channels=2)
BATCH = {"gan": 4, "pretrain": 2, "vqvae": 2} if not CUDA else {"gan": 16, "pretrain": 8, "vqvae": 16}
MSE_ONLY = DistortionConfig(
    mse=150, lpips=0
)  # LPIPS needs weights that cannot be had everywhere; both sides go without
LAYOUT = torch.channels_last
Step = Callable[[], object]


def batch(stage: str) -> Batch:
    torch.manual_seed(1)
    size = BATCH[stage]
    x = torch.rand(size, 3, CROP, CROP, device=DEVICE).to(memory_format=LAYOUT)
    return Batch(x, list(range(size)), list(range(size)))


def common(stage: str, engine: EngineConfig | None) -> dict[str, object]:
    return {
        "data": LoaderConfig(shards="", batch_size=BATCH[stage]),
        "fit": FitConfig(steps=1000),
        "engine": engine or EngineConfig(),
    }


class Stepping:
    """A stage's task, trained on one batch that stays on the device: each call is a step."""

    def __init__(self, task: gan.GanTask | pretrain.PretrainTask | vqvae.VqvaeTask, stage: str):
        self.task, self.step = task, 0
        self.parts = batch(stage).split(task.cfg.engine.gradient_accumulation_steps)

    def __call__(self) -> object:
        self.step += 1
        self.task.runtime.begin_step()
        return self.task.train_step(list(self.parts), self.step)


def our_gan(engine: EngineConfig | None = None, frozen_cache_mb: int = 0, **more: object) -> Stepping:
    """`more`: other keys of the stage."""
    torch.manual_seed(0)
    settings = common("gan", engine)
    settings["data"] = LoaderConfig(shards="", batch_size=BATCH["gan"], fixed_crops=frozen_cache_mb > 0)
    settings |= {"distortion": MSE_ONLY, "discriminator": DISCRIMINATOR, "frozen_cache_mb": frozen_cache_mb} | more
    cfg = gan.StageConfig(**settings, codec="", labeler="")
    codec, labeler = (network.requires_grad_(False).eval() for network in (Codec(CODEC), Labeler(LABELER)))
    return Stepping(gan.GanTask(cfg, Runtime(cfg.engine), torch.zeros(0, 3, CROP, CROP), codec, labeler), "gan")


def our_pretrain(engine: EngineConfig | None = None) -> Stepping:
    torch.manual_seed(0)
    rate = pretrain.TargetRate(kind="target", bpp=0.14)
    cfg = pretrain.StageConfig(**common("pretrain", engine), rate=rate, distortion=MSE_ONLY, codec=CODEC)
    return Stepping(pretrain.PretrainTask(cfg, Runtime(cfg.engine), torch.zeros(0, 3, CROP, CROP)), "pretrain")


def our_vqvae(engine: EngineConfig | None = None) -> Stepping:
    torch.manual_seed(0)
    cfg = vqvae.StageConfig(**common("vqvae", engine), labeler=LABELER)
    return Stepping(vqvae.VqvaeTask(cfg, Runtime(cfg.engine), torch.zeros(0, 3, CROP, CROP)), "vqvae")


def reference() -> bool:
    """Whether the published implementation can be imported."""
    return importlib.util.find_spec("neuralcompression") is not None


@contextmanager
def precision(bf16: bool) -> Iterator[None]:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        yield


def clipped_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def their_gan(bf16: bool = False) -> Step:
    from neuralcompression import loss_fn, models
    from neuralcompression.zoo import vqvae_xcit_p8_ch64_cb1024_h8

    torch.manual_seed(0)
    codec = models.HiFiCAutoencoder(freeze_encoder=True, freeze_bottleneck=True).to(DEVICE).train()
    judge = models.ConditionalUnetDiscriminator(1025, 8, 220).to(DEVICE).train()
    projector = models.VqVaeProjector(vqvae_xcit_p8_ch64_cb1024_h8()).to(DEVICE)
    trained = [p for p in codec.parameters() if p.requires_grad]
    generator = torch.optim.AdamW(trained, lr=1e-4, betas=(0.5, 0.9), weight_decay=0)
    discriminator = torch.optim.AdamW(judge.parameters(), lr=4e-4, betas=(0.5, 0.9), weight_decay=0)
    distortion, fool, tell = loss_fn.MSELoss(150.0), loss_fn.OASISGeneratorLoss(), loss_fn.OASISDiscriminatorLoss()
    x = batch("gan").x.contiguous()
    half = len(x) // 2

    def step() -> None:
        with precision(bf16):
            with torch.no_grad():
                labels = projector(x).reshape(len(x), -1)
                real_latent = codec(x[half:]).latent
            out = codec(x[:half])
            judge.requires_grad_(False)
            context = out.latent.detach()
            loss = distortion(out.image, x[:half]) + 0.008 * fool(judge(out.image, context), labels[:half])
        loss.backward()
        clipped_step(codec, generator)
        judge.requires_grad_(True)
        with precision(bf16):
            loss = tell(judge(x[half:], real_latent), judge(out.image.detach(), context), labels[half:])
        loss.backward()
        clipped_step(judge, discriminator)

    return step


def their_pretrain(bf16: bool = False) -> Step:
    from neuralcompression import loss_fn, models

    torch.manual_seed(0)
    codec = models.HiFiCAutoencoder().to(DEVICE).train()
    quantiles = [p for name, p in codec.named_parameters() if name.endswith("quantiles")]
    others = [p for name, p in codec.named_parameters() if not name.endswith("quantiles")]
    optimizer = torch.optim.AdamW(others, lr=3e-4, weight_decay=5e-5)
    auxiliary = torch.optim.AdamW(quantiles, lr=1e-3)
    distortion, x = loss_fn.MSELoss(150.0), batch("pretrain").x.contiguous()

    def bits(likelihoods: torch.Tensor) -> torch.Tensor:
        return -likelihoods.log2().flatten(1).sum(1) / (CROP * CROP)

    def step() -> None:
        with precision(bf16):
            out = codec(x)
            bpp = bits(out.latent_likelihoods) + bits(out.hyper_latent_likelihoods)
            rounded = bits(out.quantized_latent_likelihoods) + bits(out.quantized_hyper_latent_likelihoods)
            loss = distortion(out.image, x) + (torch.where(rounded > 0.14, 2.0, 1 / 16) * bpp).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        codec.hyper_bottleneck.loss().backward()
        auxiliary.step()
        auxiliary.zero_grad()

    return step


def their_vqvae(bf16: bool = False) -> Step:
    from neuralcompression.zoo import vqvae_xcit_p8_ch64_cb1024_h8

    torch.manual_seed(0)
    labeler = vqvae_xcit_p8_ch64_cb1024_h8().to(DEVICE).train()
    optimizer = torch.optim.AdamW(labeler.parameters(), lr=1e-4, betas=(0.9, 0.99))
    x = batch("vqvae").x.contiguous()

    def step() -> None:
        with precision(bf16):
            out = labeler(x)
            loss = (out.image - x).abs().mean() + 0.25 * out.commitment_loss + out.embedding_loss
        loss.backward()
        clipped_step(labeler, optimizer)

    return step


OURS = {"gan": our_gan, "pretrain": our_pretrain, "vqvae": our_vqvae}
THEIRS = {"gan": their_gan, "pretrain": their_pretrain, "vqvae": their_vqvae}


def rows(stage: str) -> Iterator[Row]:
    """Speed, memory and share of the machine's peak of one stage's step."""
    unit = f"crops of {CROP}x{CROP} /s"
    count = 3 if DEVICE.type == "cpu" else 20
    with_reference = reference()
    for name, make, peers in variants(stage):
        ours = make()
        for what, bf16 in peers if with_reference else ():
            theirs = THEIRS[stage](bf16)
            row = faster(f"{stage} step, {name}", ours, theirs, BATCH[stage], unit, what, count)
            del theirs
            yield row
        if not with_reference:
            mine = sorted(seconds_of(ours, count))[count // 2]
            row = Row(f"{stage} step, {name}", BATCH[stage] / mine, unit)
            yield row
        if name == "fp32":
            arithmetic = flops(ours) * row.ours / BATCH[stage]
            for what, peak in peak_flops().items():
                yield Row(f"{stage} step's arithmetic, fp32", arithmetic / 1e9, "GFLOP/s", peak / 1e9, what)
        del ours
        ours_gb = peak_memory_gb(make)
        theirs_gb = peak_memory_gb(partial(THEIRS[stage], peers[0][1])) if with_reference else None
        yield Row(f"{stage} step's peak memory, {name} (less is better)", ours_gb, "GB", theirs_gb, peers[0][0])


def variants(stage: str) -> Iterator[tuple[str, Callable[[], Stepping], list[tuple[str, bool]]]]:
    """Name, what makes our step, and what it is compared with: name, and whether that computes in bf16.

    On a CPU in bf16 also with their step in fp32, which is how it was published.
    """
    # engine.deterministic holds for the whole process: on a GPU it would bind the published implementation too
    engine = EngineConfig(deterministic=False)
    yield "fp32", partial(OURS[stage], engine), [("published implementation", False)]
    if best_precision() == "bf16":
        engine = EngineConfig(precision="bf16", deterministic=False)
        peers = [("published implementation", True)]
        if DEVICE.type == "cpu":
            peers.append(("published implementation in fp32", False))
        yield "bf16", partial(OURS[stage], engine), peers
        if stage == "gan":
            yield "bf16, labels too", partial(our_gan, engine, labeler_precision="bf16"), peers


def seconds_of(call: Step, count: int) -> list[float]:
    seconds(call)
    return [seconds(call) for _ in range(count)]
