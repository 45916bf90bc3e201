"""`make bench`: what our ways gain over the plain ones, as ratios measured in one run. Writes docs/bench/cpu.json or gpu.json."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline import losses
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.discriminator import LabelDiscriminator, LabelDiscriminatorConfig
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.models.layers import ChannelNorm

PAIRS = 7
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(
    name: str, ours: Callable[[], object], peer: Callable[[], object], items: int, unit: str
) -> dict[str, object]:
    """Medians over alternating pairs, after one call of each."""
    seconds(ours), seconds(peer)
    times = [(seconds(ours), seconds(peer)) for _ in range(PAIRS)]
    mine, theirs = (items / statistics.median(t) for t in zip(*times, strict=True))
    return {"name": name, "ours": mine, "peer": theirs, "ratio": mine / theirs, "unit": unit}


def channel_norm() -> dict[str, object]:
    norm = ChannelNorm(240).to(DEVICE)
    x = torch.randn(4, 240, 64, 64, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()

    def definition(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=1)
        return norm.scale * (x - mean) * torch.rsqrt(var + norm.eps) + norm.shift

    return compare(
        "channel norm, forward and backward, against its definition",
        lambda: norm(x).sum().backward(),
        lambda: definition(x).sum().backward(),
        4,
        "maps of 240x64x64 /s",
    )


def nearest_code() -> dict[str, object]:
    labeler = Labeler(LabelerConfig(channels=8)).to(DEVICE)
    z = F.normalize(torch.randn(8, 8, 32, 32, device=DEVICE), dim=1)
    codes = F.normalize(labeler.codebook.detach(), dim=1)

    def difference() -> Tensor:
        return (z.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1).argmin(-1)

    assert torch.equal(labeler.nearest(z), difference())
    return compare(
        "nearest of 1024 codes, against all differences",
        lambda: labeler.nearest(z),
        difference,
        8,
        "crops of 256x256 /s",
    )


def gan_step() -> dict[str, object]:
    """Forward and backward of both networks at a quarter of the published width; the peer decodes both halves of the
    batch and calls the discriminator on real and fake in turn, as the published code does."""
    torch.manual_seed(0)
    cfg = CodecConfig(channels=(15, 30, 60, 120, 240), latent_channels=55, hyper_channels=80)
    codec = Codec(cfg).to(DEVICE, memory_format=torch.channels_last).requires_grad_(False)
    codec.synthesis.requires_grad_(True)
    wanted = LabelDiscriminatorConfig(channels=(32, 32, 64, 64, 128, 128), head_channels=64)
    judge = LabelDiscriminator(wanted, 1024, cfg.latent_channels).to(DEVICE, memory_format=torch.channels_last)
    x = torch.rand(4, 3, 256, 256, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1024, (4, 32, 32), device=DEVICE)

    def step(wasteful: bool) -> None:
        y_hat, _ = codec.encode(x)
        if wasteful:
            with torch.no_grad():
                codec.synthesis(y_hat[1::2])
        x_hat = codec.synthesis(y_hat[0::2])
        judge.requires_grad_(False)
        (
            150 * losses.mse(x_hat, x[0::2]) + 0.008 * losses.generator_loss(judge(x_hat, y_hat[0::2]), labels[0::2])
        ).backward()
        judge.requires_grad_(True)
        fake = x_hat.detach()
        if wasteful:
            real_logits, fake_logits = judge(x[1::2], y_hat[1::2]), judge(fake, y_hat[0::2])
        else:
            both = judge(torch.cat([x[1::2], fake]), torch.cat([y_hat[1::2], y_hat[0::2]]))
            real_logits, fake_logits = both.chunk(2)
        losses.discriminator_loss(real_logits, fake_logits, labels[1::2]).backward()
        for module in (codec, judge):
            module.zero_grad(set_to_none=True)

    return compare(
        "gan step, against decoding both halves", lambda: step(False), lambda: step(True), 4, "crops of 256x256 /s"
    )


def main() -> None:
    hardware = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    rows = [measure() for measure in (channel_norm, nearest_code, gan_step)]
    about = {
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": "make bench",
    }
    table = Table(title=f"{hardware}, torch {torch.__version__}")
    for heading in ("what", "ours", "peer", "ratio", "unit"):
        table.add_column(heading)
    for row in rows:
        table.add_row(str(row["name"]), *(f"{row[key]:.2f}" for key in ("ours", "peer", "ratio")), str(row["unit"]))
    Console(width=140).print(table)
    target = Path("docs/bench") / ("gpu.json" if DEVICE.type == "cuda" else "cpu.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps([row | about for row in rows], indent=1) + "\n", encoding="utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    sys.exit(main())
