"""Tables of docs/results.md, made of the files in docs/results: python -m tests.results prints them.

`make results DATA=folder NAME=name` writes these files; `tests/test_results.py` compares the page with them.
"""

import json
from collections.abc import Sequence

from pipeline.evaluation.metric_table import METRICS, format_value
from tests.benchmarks import claim
from tests.conftest import ROOT

HOME = ROOT / "docs/results"
QUALITIES = ("low", "medium", "high")


def table(name: str, all_codecs: bool = True) -> str:
    """Of a set of images: a row for each of the package's codecs and, with `all_codecs`, each conventional one at its sizes."""
    measured = [quality for quality in QUALITIES if (HOME / f"{name}-{quality}-totals.json").is_file()]
    read = [json.loads((HOME / f"{name}-{quality}-totals.json").read_text()) for quality in measured]
    metrics = [
        metric for metric in METRICS if any(row.get(metric) is not None for rows in read for row in rows.values())
    ]
    lines = [["codec", *(METRICS[metric].name for metric in metrics)], ["---"] * (len(metrics) + 1)]
    lines[0][1] = "bpp"
    for quality, rows in zip(measured, read, strict=True):
        for codec, row in rows.items():
            if all_codecs or codec == quality:
                shown = f"**{codec}**" if codec == quality else codec
                lines.append([shown, *(format_value(metric, row.get(metric)) for metric in metrics)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def eight_bits() -> str:
    """Each codec as trained and as shipped, see configs/shipped/evaluate-compact.yaml."""
    return _evaluation("compact", ("bpp", "psnr_db", "lpips"))


def own_images() -> str:
    """The package's codec before and after it learned from other photos, see docs/own-images.md."""
    return _evaluation("mine", ("bpp", "psnr_db", "ms_ssim", "lpips", "dists"))


def _evaluation(name: str, metrics: Sequence[str]) -> str:
    """A row for each codec of one evaluation's totals."""
    rows = json.loads((HOME / f"{name}-totals.json").read_text())
    lines = [["codec", *(METRICS[metric].name for metric in metrics)], ["---"] * (len(metrics) + 1)]
    lines += [[codec, *(format_value(metric, row[metric]) for metric in metrics)] for codec, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def names() -> list[str]:
    """Of the sets that were measured."""
    return sorted({path.name.rsplit("-", 2)[0] for path in HOME.glob("*-*-totals.json")})


if __name__ == "__main__":
    for name in names():
        print(f"{name}\n\n{table(name)}\n")
    print(f"the comparison of discriminators\n\n{claim.table(HOME / claim.TABLE.name)}\n")
    print(f"the package's card\n\n{table('kodak', all_codecs=False)}\n")
    print(f"8 bits\n\n{eight_bits()}\n")
    print(f"own images\n\n{own_images()}")
