"""Puts a page together: data, pictures, style and scripts in one HTML file that fetches nothing."""

import csv
import io
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.evaluation.evaluator import ORIGINAL
from pipeline.evaluation.metric_table import METRICS, REALISM
from pipeline.report import content, pictures
from pipeline.report.content import Evaluation, Image
from pipeline.report.pictures import Pictures

# Where published results come from, by model
SOURCES = {
    "MS-ILLM": "Muckley et al., ICML 2023; results of the authors' release (facebookresearch/NeuralCompression)",
    "No-GAN": "the codec before fine-tuning in Muckley et al., ICML 2023; results of the authors' release",
    "HiFiC": "Mentzer et al., NeurIPS 2020; results of the authors' release (tensorflow/compression)",
}
SCRIPTS = ("state.js", "tables.js", "plots.js", "panes.js", "viewer.js", "main.js")
# Digits that values of a page keep
DIGITS = 7


def published(dataset: str) -> list[dict[str, str]]:
    """Rows of the published results on one data set."""
    text = (resources.files("pipeline.evaluation") / "published.csv").read_text(encoding="utf-8")
    return [row for row in csv.DictReader(io.StringIO(text)) if row["dataset"] == dataset]


def make(evaluations: Sequence[Evaluation], max_mb: int) -> str:
    """The page. max_mb: its size in MB (10^6 bytes), which decides how pictures are stored and of how many images."""
    images, rows = content.images(evaluations)
    ordered = _extremes_first(images, rows, evaluations[0].key(evaluations[0].models[0]))
    data = {
        "metrics": {name: _metric(name) for name in METRICS},
        "realism": list(REALISM),
        "original": ORIGINAL,
        "models": content.models(evaluations),
        "published": _published(evaluations),
        "rows": rows,
        "bd_rates": content.bd_rates(evaluations),
    }

    def page(shown: Pictures | None) -> str:
        uris = shown.uris if shown else []
        found = {
            image.name: dict(zip(image.sources, row, strict=True)) for image, row in zip(ordered, uris, strict=False)
        }
        names = [image.name for image in images if image.name in found]
        listed = [{"image": name, "models": list(found[name])} for name in names]
        loss = shown.psnr_db if shown else None
        return template.render(
            title=_title(evaluations),
            evaluations=evaluations,
            how={metric.name: metric.how for metric in METRICS.values()},
            notes=_notes(evaluations, images, shown) if shown else [],
            style=_inline(_file("page.css")),
            plotly=_inline(plotly()),
            scripts=_inline("\n".join(_file(name) for name in SCRIPTS)),
            data=_json(data | {"pictures": listed, "picture_psnr_db": loss}),
            pictures=[_json(list(found[name].values())) for name in names],
        )

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_file("page.html"))
    # what the rest needs, and some for the notes and the names of pictures
    rest = len(page(None).encode()) + 1000 + sum(len(name) + 20 for image in images for name in image.sources)
    return page(pictures.fit([list(image.sources.values()) for image in ordered], max_mb * 10**6 - rest))


def plotly() -> str:
    """The plotting library, as its Python package ships it."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _metric(name: str) -> dict[str, Any]:
    metric = METRICS[name]
    return {
        "name": metric.name,
        "label": metric.label,
        "digits": metric.digits,
        "higher": metric.higher_is_better,
        "per_image": metric.per_image,
    }


def _published(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    datasets = sorted({evaluation.facts["published"] for evaluation in evaluations})
    return [
        {"model": row["model"], "dataset": dataset, "source": SOURCES[row["model"]]}
        | {name: float(row[name]) for name in METRICS if row.get(name)}
        for dataset in datasets
        for row in published(dataset)
    ]


def _title(evaluations: Sequence[Evaluation]) -> str:
    if len(evaluations) == 1:
        return "Codec evaluation"
    return f"Codec evaluations: {', '.join(evaluation.name for evaluation in evaluations)}"


def _extremes_first(images: Sequence[Image], rows: Sequence[content.Json], model: str) -> list[Image]:
    """Worst, best, second worst, second best and so on for one model, so that a page without room for all shows both ends."""
    metric = next((m for m in REALISM if METRICS[m].per_image and any(row[m] is not None for row in rows)), "psnr_db")
    sign = 1 if METRICS[metric].higher_is_better else -1
    values = {row["image"]: sign * row[metric] for row in rows if row["model"] == model and row[metric] is not None}
    ranked = sorted((image for image in images if image.name in values), key=lambda image: values[image.name])
    both_ends = zip(ranked, reversed(ranked), strict=True)
    return list({image.name: image for group in [*both_ends, images] for image in group}.values())


def _notes(evaluations: Sequence[Evaluation], images: Sequence[Image], shown: Pictures) -> list[str]:
    """What a reader has to know about this page's numbers and pictures."""
    notes = []
    if shown.psnr_db is not None:
        notes.append(
            f"Pictures on this page are stored as {shown.coding} to keep the file small, at {shown.psnr_db:.1f} dB or better "
            "against what was measured; the artifact's reconstructions/ has the exact ones."
        )
    if shown.cut:
        notes.append(
            f"Pictures of more than {pictures.MAX_SIDE} pixels on a side are shown by their middle, in full resolution."
        )
    if len(shown.uris) < len(images):
        notes.append(
            f"The viewer has {len(shown.uris)} of {len(images)} images, the worst and the best ones of the first model; "
            "the table has all."
        )
    if len(set(content.image_sets(evaluations))) > 1:
        notes.append(
            "These evaluations are not of the same images: their means are not compared, and points of different images have "
            "different shapes."
        )
    absent = [
        name
        for name, metric in METRICS.items()
        if all(row.get(name) is None for e in evaluations for row in e.totals.values())
    ]
    if absent:
        listed = ", ".join(METRICS[name].name for name in absent)
        notes.append(f"Not measured: {listed}. Their weights or programs were missing, or there were too few patches.")
    return notes


def _file(name: str) -> str:
    return (resources.files("pipeline.report") / name).read_text(encoding="utf-8")


def _inline(text: str) -> Any:
    """Text as the content of a script or style element. No file of ours or Plotly's may close it."""
    assert "</script" not in text.lower()
    assert "</style" not in text.lower()
    return Markup(text)


def _json(value: Any) -> Any:
    """JSON as the content of a script element, in which nothing can close it."""
    text = json.dumps(_sayable(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _sayable(value: Any) -> Any:
    """The same in what JSON can say: infinity, such as the PSNR of equal images, as a string that the page knows."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else "∞" if value > 0 else "-∞"
    if isinstance(value, dict):
        return {key: _sayable(each) for key, each in value.items()}
    return [_sayable(each) for each in value] if isinstance(value, list) else value


def write(path: Path, evaluations: Sequence[Evaluation], max_mb: int) -> None:
    path.write_text(make(evaluations, max_mb), encoding="utf-8")
