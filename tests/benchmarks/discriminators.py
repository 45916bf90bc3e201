"""Which discriminators learn in minutes: python -m tests.benchmarks.discriminators SHARDS CODEC LABELER [STEPS]

Each learns alone for STEPS steps (800) from photos and CODEC's reconstructions, by the stage `gan` with
configs/small/gan-claim.yaml and one thing changed. Writes docs/results/discriminators.json. Runs go to runs/discriminators and
resume.
"""

import sys
from pathlib import Path

from tests.benchmarks.short_runs import illm, recorded, write_rows

TARGET = Path("docs/results/discriminators.json")
RUNS = Path("runs/discriminators")
LABEL = "kind: label, channels: [32, 48, 64, 96, 128, 128], head_channels: 64, context_channels: 8"
PATCH = "kind: patch, channels: [32, 64, 128, 192], context_channels: 8"
PILOTS = {
    "label, as published": LABEL,
    "`init: he`": f"{LABEL}, init: he",
    "and `skips: true`": f"{LABEL}, init: he, skips: true",
    "and `high_pass: 24`": f"{LABEL}, init: he, skips: true, high_pass: 24",
    "PatchGAN, as published": PATCH,
    "PatchGAN, `high_pass: 24`": f"{PATCH}, high_pass: 24",
}
METRICS = {
    "train/discriminator": "loss on both",
    "train/discriminator_accuracy": "right about real or fake",
}


def trained(number: int, discriminator: str, steps: int, inputs: list[str]) -> dict[str, float]:
    """Trains it if it is not trained yet; returns what it logged last, means over 50 steps."""
    run = RUNS / str(number)
    words = [f"run={run}", f"fit.steps={steps}", f"discriminator_warmup_steps={steps}", f"fit.validate_every={steps}"]
    words += [*inputs, "fit.keep_every=null", f"discriminator={{{discriminator}}}"]
    illm("gan", "configs/small/gan-claim.yaml", *words)
    return {metric: recorded(run)[metric][-1] for metric in METRICS}


def table(rows: list[dict[str, object]]) -> str:
    """As docs/training.md shows it."""
    lines = [f"| discriminator | {' | '.join(METRICS.values())} |", "|---|---|---|"]
    for row in rows:
        loss, right = (float(row[metric]) for metric in METRICS)  # type: ignore[arg-type]
        lines.append(f"| {row['pilot']} | {loss:.2f} | {100 * right:.0f} % |")
    return "\n".join(lines)


def main(shards: str, codec: str, labeler: str, steps: str = "800") -> None:
    inputs = [f"data.shards={shards}", f"codec={codec}", f"labeler={labeler}"]
    rows: list[dict[str, object]] = [
        {"pilot": name, "discriminator": changed, "steps": int(steps), **trained(number, changed, int(steps), inputs)}
        for number, (name, changed) in enumerate(PILOTS.items())
    ]
    write_rows(TARGET, rows)
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
