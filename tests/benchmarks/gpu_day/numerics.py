"""How far latents, code lengths, images, labels and gradients are from those of the CPU in fp32, with random networks."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.codec import Codec
from pipeline.models.layers import ChannelNorm
from pipeline.stages.gan import GanTask
from pipeline.training.engine_config import EngineConfig
from tests.benchmarks.gpu_day.measuring import made
from tests.benchmarks.gpu_day.rows import Result, Rows
from tests.benchmarks.gpu_day.variants import FUSED, LABELS, PADDED, Keys, engine_and_stage
from tests.benchmarks.measure import CUDA, DEVICE, TINY
from tests.benchmarks.steps import CROP

COUNT = 2 if TINY or not CUDA else 16
VARIANTS: dict[str, Keys] = {
    "fp32_exact": {"engine.precision": "fp32_exact"},
    "fp32": {"engine.precision": "fp32"},
    "bf16": {},
    "bf16, labeler_precision=bf16": LABELS,
    "bf16, fused_norms, pad_channels, labeler_precision=bf16": FUSED | PADDED | LABELS,
}


def rows() -> Rows:
    expected: list[Tensor] = []
    where = "GPU" if CUDA else "no GPU"
    for name, keys in VARIANTS.items():
        yield f"{where}, {name}", lambda keys=keys: compared(keys, expected)


def photos() -> Tensor:
    noise = torch.rand(COUNT, 3, CROP, CROP, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(F.pad(noise, (4, 4, 4, 4), mode="reflect"), 9, 1)


def compared(keys: Keys, expected: list[Tensor]) -> Result:
    """`expected`: what the CPU gives, filled by the first call."""
    engine, more = engine_and_stage(keys)
    task = made("gan", 2, EngineConfig(**engine), **more).task
    assert isinstance(task, GanTask)
    if not expected:
        expected += on_cpu(task)
    found = zip(answers(task), expected, strict=True)
    y_hat, bits, image, labels, gradient = found
    return {
        "latents_that_differ": float(((y_hat[0] - y_hat[1]).abs() > 0.5).float().mean()),
        "bits_relative_error": apart(bits),
        "image_relative_error": apart(image),
        "labels_equal": float((labels[0] == labels[1]).float().mean()),
        "gradient_relative_error": apart(gradient),
    }


def apart(pair: tuple[Tensor, Tensor]) -> float:
    return float((pair[0] - pair[1]).norm() / pair[1].norm())


def answers(task: GanTask) -> list[Tensor]:
    """As a step of training computes them: frozen networks, then the generator in the run's precision."""
    x = photos().to(DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y_hat, bits = task.codec.encode(x)
        labels = task.labels(x)
    image = task.generator.model(y_hat)
    task.generator.backward(image.square().mean())
    return [v.detach().float().cpu() for v in (y_hat, bits, image, labels, gradient(task.codec))]


def on_cpu(task: GanTask) -> list[Tensor]:
    """Of the same networks, in fp32."""
    codec, labeler, x = deepcopy(task.codec).cpu(), deepcopy(task.labeler).cpu(), photos()  # type: ignore[union-attr]
    for norm in (part for network in (codec, labeler) for part in network.modules() if isinstance(part, ChannelNorm)):
        norm.kernel = None
    with torch.no_grad():
        y_hat, bits = codec.encode(x)
        labels = labeler.label(x)
    image = codec.synthesis(y_hat)
    image.square().mean().backward()
    return [v.detach().float() for v in (y_hat, bits, image, labels, gradient(codec))]


def gradient(codec: Codec) -> Tensor:
    return torch.cat([p.grad.float().flatten().cpu() for p in codec.synthesis.parameters() if p.grad is not None])
