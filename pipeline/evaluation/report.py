"""Figures, and one self-contained HTML page with originals and reconstructions side by side."""

import base64
import csv
import io
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipeline.evaluation.metric_table import METRICS, format_value

Totals = Mapping[str, Mapping[str, float | None]]


def published(dataset: str) -> list[dict[str, str]]:
    """Rows of the published results on one data set."""
    text = (resources.files("pipeline.evaluation") / "published.csv").read_text(encoding="utf-8")
    return [row for row in csv.DictReader(io.StringIO(text)) if row["dataset"] == dataset]


def write(folder: Path, totals: Totals, dataset: str, num_images: int) -> None:
    """Writes `figures/*.png` and `report.html` into an evaluation's folder, which holds `reconstructions/`."""
    (folder / "figures").mkdir()
    figures = []
    for metric in METRICS:
        if metric != "bpp" and any(row[metric] is not None for row in totals.values()):
            path = folder / "figures" / f"{metric}.png"
            rate_distortion(totals, metric, dataset).savefig(path, dpi=110)
            figures.append(_data_uri(path.read_bytes(), "image/png"))
    template = jinja2.Environment(autoescape=True).from_string(
        (resources.files("pipeline.evaluation") / "report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        columns={name: metric.label for name, metric in METRICS.items()},
        totals=totals,
        shown=format_value,
        figures=figures,
        dataset=dataset,
        images=_images(folder, list(totals), num_images),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def rate_distortion(totals: Totals, metric: str, dataset: str) -> Figure:
    """Our models' points over rate, with the published curves of one data set for orientation."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in published(dataset) if row.get(metric)]
    for name, style in (("MS-ILLM", "-"), ("No-GAN", "--"), ("HiFiC", ":")):
        points = sorted((float(row["bpp"]), float(row[metric])) for row in rows if row["model"] == name)
        if points:
            axes.plot(*zip(*points, strict=True), style, color="0.6", marker=".", label=f"{name}, published, {dataset}")
    for name, row in totals.items():
        rate, value = row["bpp"], row[metric]
        if rate is not None and value is not None:
            axes.plot([rate], [value], "o", markersize=8, label=f"{name}, these images")
    axes.set(xlabel=METRICS["bpp"].label, ylabel=METRICS[metric].label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _images(folder: Path, models: list[str], limit: int) -> list[dict[str, Any]]:
    sizes = {
        (row["image"], row["model"]): row for row in csv.DictReader((folder / "per_image.csv").open(encoding="utf-8"))
    }
    originals = sorted((folder / "reconstructions" / "original").glob("*.png"))[:limit]
    return [
        {
            "name": original.stem,
            "original": _lossless(original),
            "models": [
                {
                    "name": model,
                    "uri": _lossless(folder / "reconstructions" / model / original.name),
                    "bytes": int(sizes[original.stem, model]["bytes"]),
                    "bpp": float(sizes[original.stem, model]["bpp"]),
                    "psnr_db": float(sizes[original.stem, model]["psnr_db"]),
                }
                for model in models
            ],
        }
        for original in originals
    ]


def _lossless(path: Path) -> str:
    stream = io.BytesIO()
    with Image.open(path) as image:
        image.save(stream, "WEBP", lossless=True, quality=50)
    return _data_uri(stream.getvalue(), "image/webp")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def print_table(totals: dict[str, dict[str, float | None]], num_images: int) -> None:
    """The mean of every metric that was measured, one row per model."""
    names = [name for name in METRICS if any(row[name] is not None for row in totals.values())]
    table = Table(title=f"mean over {num_images} held-out image(s)")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for model, row in totals.items():
        table.add_row(model, *(format_value(name, row[name]) for name in names))
    Console(width=100).print(table)
