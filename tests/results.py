"""Tables of docs/results.md, made of the files in docs/results: python -m tests.results prints them.

`make results DATA=folder NAME=name` writes these files; `tests/test_results.py` compares the page with them.
"""

import csv
import json

from pipeline.evaluation.metric_table import METRICS, format_value
from pipeline.sweep.results import discriminator_of, mean_and_error
from tests.conftest import ROOT

HOME = ROOT / "docs/results"
QUALITIES = ("low", "medium", "high")


def table(name: str) -> str:
    """Of a set of images: a row for each of the package's codecs and each conventional one at its sizes."""
    measured = [quality for quality in QUALITIES if (HOME / f"{name}-{quality}-totals.json").is_file()]
    read = [json.loads((HOME / f"{name}-{quality}-totals.json").read_text()) for quality in measured]
    metrics = [
        metric for metric in METRICS if any(row.get(metric) is not None for rows in read for row in rows.values())
    ]
    lines = [["codec", *(METRICS[metric].name for metric in metrics)], ["---"] * (len(metrics) + 1)]
    lines[0][1] = "bpp"
    for quality, rows in zip(measured, read, strict=True):
        for codec, row in rows.items():
            shown = f"**{codec}**" if codec == quality else codec
            lines.append([shown, *(format_value(metric, row.get(metric)) for metric in metrics)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def eight_bits() -> str:
    """Each codec as trained and as shipped, see configs/shipped/evaluate-compact.yaml."""
    rows = json.loads((HOME / "compact-totals.json").read_text())
    metrics = ("bpp", "psnr_db", "ms_ssim", "lpips")
    lines = [["codec", *(METRICS[metric].name for metric in metrics)], ["---"] * (len(metrics) + 1)]
    lines += [[codec, *(format_value(metric, row[metric]) for metric in metrics)] for codec, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claim() -> str:
    """Of `make claim`: for each discriminator and GAN weight the mean over seeds with half its 95 % interval."""
    metrics = ("bpp", "psnr_db", "vgg_fd_64", "lpips", "dists")
    found: dict[tuple[str, float], list[dict[str, str]]] = {}
    with (HOME / "claim.csv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            weight = float(row["gan.gan_weight"])
            kind = discriminator_of({"settings": {"gan.discriminator": json.loads(row["gan.discriminator"])}}, None)
            found.setdefault((kind if weight else "none", weight), []).append(row)
    lines = [["discriminator", "GAN weight", "seeds", *(METRICS[metric].name for metric in metrics)]]
    lines.append(["---"] * len(lines[0]))
    for (kind, weight), rows in sorted(found.items(), key=lambda pair: (pair[0][0] != "none", pair[0])):
        shown = []
        for metric in metrics:
            mean, error = mean_and_error(float(row[metric]) for row in rows)
            shown.append(f"{format_value(metric, mean)} ± {format_value(metric, error)}")
        # the encoder is frozen, so the rate of all trials is the same
        lines.append([kind, f"{weight:g}", str(len(rows)), shown[0].split(" ")[0], *shown[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def names() -> list[str]:
    """Of the sets that were measured."""
    return sorted({path.name.rsplit("-", 2)[0] for path in HOME.glob("*-*-totals.json")})


if __name__ == "__main__":
    for name in names():
        print(f"{name}\n\n{table(name)}\n")
    if (HOME / "claim.csv").is_file():
        print(f"claim\n\n{claim()}\n")
    if (HOME / "compact-totals.json").is_file():
        print(eight_bits())
