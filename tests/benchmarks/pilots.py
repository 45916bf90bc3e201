"""Which settings learn sooner: python -m tests.benchmarks.pilots SHARDS IMAGES [STEPS] writes docs/results/pilots.json.

Each pilot is configs/small/pretrain-base.yaml from nothing for STEPS steps (600), with one thing changed, and is then measured on
files of IMAGES, a folder. Runs go to runs/pilots and resume; delete that folder to begin anew.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.evaluation.metric_table import format_value
from tests.benchmarks.short_runs import evaluated, illm, recorded, write_rows

TARGET = Path("docs/results/pilots.json")
RUNS = Path("runs/pilots")
SPEED = "system/images_per_s"
METRICS = ("bpp", "psnr_db", "lpips")
PILOTS = {
    "the configuration: light, bf16": [],
    "fp32": ["engine.precision=fp32"],
    "published layout, narrow": [
        "codec={transforms: published, channels: [24, 48, 96, 160, 192], latent_channels: 96, hyper_channels: 64}"
    ],
    "half as wide": ["codec.channels=[32, 64, 80]"],
    "one and a half times as wide": ["codec.channels=[96, 192, 240]"],
    "one residual block per size instead of 3": ["codec.num_residual_blocks=1"],
    "six residual blocks": ["codec.num_residual_blocks=6"],
    "2 crops of 256x256 instead of 8 of 128x128": ["data.crop_size=256", "data.batch_size=2"],
    "4 crops instead of 8": ["data.batch_size=4"],
    "16 crops": ["data.batch_size=16"],
    "learning rate 1e-4 instead of 3e-4": ["optimizer.lr=1e-4"],
    "learning rate 6e-4": ["optimizer.lr=6e-4"],
    "learning rate 1e-3": ["optimizer.lr=1e-3"],
    "PyTorch's starting weights instead of He's": ["init=pytorch"],
    "squared error at half the weight": ["distortion.mse=75"],
    "squared error at twice the weight": ["distortion.mse=300"],
    "LPIPS at weight 1": ["distortion.lpips=1"],
    "LPIPS at weight 3": ["distortion.lpips=3"],
}


def pilot(number: int, changed: list[str], shards: str, steps: int) -> float:
    """Trains it if it is not trained yet. Returns how many crops per second it took, the median of what it logged.

    A training that diverges ends with exit code 2 after some steps, without an artifact. Raises: CalledProcessError if it ended in
    another way.
    """
    run = RUNS / f"{number:02}"
    schedule = [
        "optimizer.warmup_steps=50",
        "engine.ema_decay=0.99",
        "engine.precision=bf16",
        f"fit.validate_every={steps}",
    ]
    words = [f"run={run}", f"data.shards={shards}", f"fit.steps={steps}", *schedule, *changed]
    try:
        illm("pretrain", "configs/small/pretrain-base.yaml", *words)
    except subprocess.CalledProcessError as error:
        began = (run / "tracking.jsonl").is_file() and SPEED in recorded(run)
        if error.returncode != UserError.exit_code or not began:
            raise
    return statistics.median(recorded(run)[SPEED])


def measure(images: str) -> dict[str, dict[str, float]]:
    """On files of all pilots' codecs, decoded again."""
    codecs = {
        f"p{number:02}": str(RUNS / f"{number:02}")
        for number in range(len(PILOTS))
        if (RUNS / f"{number:02}/artifact").is_dir()
    }
    totals: dict[str, dict[str, float]] = json.loads((evaluated(RUNS, images, codecs) / "totals.json").read_text())
    return totals


def table(rows: list[dict[str, object]]) -> str:
    """As docs/results.md shows it."""
    lines = ["| pilot | crops/s | bpp | PSNR, dB | LPIPS |", "|---|---|---|---|---|"]
    for row in rows:
        values = " | ".join(format_value(m, row[m]) if m in row else "diverged" for m in METRICS)  # type: ignore[arg-type]
        lines.append(f"| {row['pilot']} | {row['crops_per_s']:.1f} | {values} |")
    return "\n".join(lines)


def main(shards: str, images: str, steps: str = "600") -> None:
    rows: list[dict[str, object]] = [
        {
            "pilot": name,
            "changed": changed,
            "steps": int(steps),
            "crops_per_s": pilot(number, changed, shards, int(steps)),
        }
        for number, (name, changed) in enumerate(PILOTS.items())
    ]
    totals = measure(images)
    for number, row in enumerate(rows):
        measured = totals.get(f"p{number:02}", {})
        row.update({metric: measured[metric] for metric in METRICS if metric in measured})
    write_rows(TARGET, rows)
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
