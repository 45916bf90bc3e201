"""Does what is faster train as well? python -m tests.benchmarks.equal_quality SHARDS CODEC LABELER [STEPS]

Trains the light layout for STEPS steps (300), pretraining from nothing and fine-tuning CODEC, in fp32 and with each option, with
two seeds; writes docs/results/quality.json: what validation says at the end, and how many labels are the same in bf16. Runs go to
runs/quality and resume.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.data.loader import LoaderConfig, validation_crops
from pipeline.data.reader import ShardReader
from pipeline.evaluation.metric_table import format_value
from pipeline.models import serialization
from pipeline.registry import resolve
from tests.benchmarks.short_runs import illm, validated, write_rows

RUNS = Path("runs/quality")
TARGET = Path("docs/results/quality.json")
SEEDS = (0, 1)
PRETRAIN = ["configs/small/pretrain-base.yaml", "optimizer.warmup_steps=50", "engine.ema_decay=0.99"]
GAN = ["configs/small/gan-claim.yaml", "discriminator_warmup_steps=100", "gan_weight=0.01"]
# Stage, processes, and what differs from the first of its stage
RUNS_OF = {
    "pretraining, fp32": ("pretrain", 1, ["engine.precision=fp32"]),
    "pretraining, bf16": ("pretrain", 1, ["engine.precision=bf16"]),
    "pretraining, fp32, 2 processes": ("pretrain", 2, ["engine.precision=fp32"]),
    "pretraining, fp32, 2 processes, gradients sent in bf16": (
        "pretrain",
        2,
        ["engine.precision=fp32", "engine.gradient_compression=bf16"],
    ),
    "fine-tuning, fp32": ("gan", 1, ["engine.precision=fp32"]),
    "fine-tuning, bf16": ("gan", 1, ["engine.precision=bf16"]),
    "fine-tuning, bf16, labels in bf16": ("gan", 1, ["engine.precision=bf16", "labeler_precision=bf16"]),
}
METRICS = {"val/bpp": "bpp", "val/psnr_db": "PSNR, dB", "val/lpips": "LPIPS"}


def trained(name: str, seed: int, steps: int, inputs: dict[str, str]) -> dict[str, float]:
    """Trains it if it is not trained yet; returns what validation measured at the end."""
    stage, processes, changed = RUNS_OF[name]
    run = RUNS / f"{list(RUNS_OF).index(name)}-{seed}"
    config, *more = PRETRAIN if stage == "pretrain" else GAN
    more += [f"data.shards={inputs['shards']}", f"fit.steps={steps}", f"fit.validate_every={steps}", f"seed={seed}"]
    if stage == "gan":
        more += [f"codec={inputs['codec']}", f"labeler={inputs['labeler']}", "fit.keep_every=null"]
    launcher = [] if processes == 1 else ["launch", "--config_file", "configs/launch/cpu.yaml", "-m", "pipeline"]
    illm(*launcher, stage, config, f"run={run}", *more, *changed)
    return {metric: value for metric, value in validated(run).items() if metric in METRICS}


def agreement(shards: str, labeler: str) -> float:
    """Share of the validation crops' labels that are the same in bf16."""
    network = serialization.load_labeler(resolve.read(labeler, "labeler"))
    cfg = LoaderConfig(shards=shards, batch_size=1, num_validation_crops=14, validation_crop_size=256)
    crops = validation_crops(cfg, ShardReader(resolve.read(shards, "shards"), "valid", 1.0))
    labels = network.label(crops)
    with torch.autocast("cpu", torch.bfloat16):
        return float((network.label(crops) == labels).float().mean())


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/engines.md shows it: both seeds."""
    lines = [f"| {rows[0]['steps']} steps | {' | '.join(METRICS.values())} |", "|---|---|---|---|"]
    for name in RUNS_OF:
        seeds = [row for row in rows if row["name"] == name]
        # validation of fine-tuning is without LPIPS
        values = [", ".join(format_value(m.removeprefix("val/"), row[m]) for row in seeds if m in row) for m in METRICS]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def main(shards: str, codec: str, labeler: str, steps: str = "300") -> None:
    inputs = {"shards": shards, "codec": codec, "labeler": labeler}
    rows: list[dict[str, Any]] = [
        {"name": name, "seed": seed, "steps": int(steps), **trained(name, seed, int(steps), inputs)}
        for name in RUNS_OF
        for seed in SEEDS
    ]
    rows.append({"name": "labels equal in bf16", "share": agreement(shards, labeler)})
    write_rows(TARGET, rows)
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
