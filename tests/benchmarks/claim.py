"""What `make claim` keeps: python -m tests.benchmarks.claim SWEEP

Writes docs/results/claim.csv, the sweep's table with the ratio of gradients that each trial ended with, and docs/images/claim.png,
its figure. SWEEP: the run folder.
"""

import csv
import json
import shutil
import sys
from pathlib import Path

from pipeline.evaluation.metric_table import METRICS, format_value
from pipeline.sweep.results import discriminator_of, mean_and_error
from tests.benchmarks.short_runs import recorded

TABLE, FIGURE = Path("docs/results/claim.csv"), Path("docs/images/claim.png")
RATIO = "train/adversarial_gradient_ratio"
SHOWN = ("psnr_db", "vgg_fd_64", "lpips", "dists")
NO_DISCRIMINATOR = "none"


def keep(sweep: Path) -> None:
    with (sweep / "artifact/trials.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        ratios = recorded(sweep / "trials" / row["name"] / "gan").get(RATIO)
        row[RATIO] = f"{ratios[-1]:.4g}" if ratios and float(row["gan.gan_weight"]) else ""
    # metrics that were not measured have no column
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shutil.copyfile(sweep / "artifact/gan_weights.png", FIGURE)


def groups(path: Path) -> dict[tuple[str, float], list[dict[str, str]]]:
    """Discriminator and GAN weight -> the rows that differ in their seed alone; the codec without a discriminator first."""
    found: dict[tuple[str, float], list[dict[str, str]]] = {}
    with path.open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            weight = float(row["gan.gan_weight"])
            settings = {"gan.discriminator": json.loads(row["gan.discriminator"])}
            kind = discriminator_of({"settings": settings}, None) if weight else NO_DISCRIMINATOR
            found.setdefault((kind, weight), []).append(row)
    return dict(sorted(found.items(), key=lambda pair: (pair[0][0] != NO_DISCRIMINATOR, pair[0])))


def table(path: Path) -> str:
    """As docs/results.md shows it: means over seeds with half their 95 % interval."""
    lines = [["discriminator", "GAN weight", "gradient ratio", *(METRICS[metric].name for metric in SHOWN)]]
    lines.append(["---"] * len(lines[0]))
    for (kind, weight), rows in groups(path).items():
        ratio = mean_and_error(float(row[RATIO]) for row in rows)[0] if weight else 0.0
        shown = [
            " ± ".join(format_value(metric, value) for value in mean_and_error(float(row[metric]) for row in rows))
            for metric in SHOWN
        ]
        lines.append([kind, f"{weight:g}" if weight else "", f"{ratio:.2g}" if weight else "", *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
    print(table(TABLE))
