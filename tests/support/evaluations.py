"""Folders as `illm evaluate` makes them, of plain pictures whose every pixel is known."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest
from pipeline.data.images import Pixels
from pipeline.evaluation import comparison, measurement, metrics
from pipeline.evaluation.evaluator import ORIGINAL, save_png
from pipeline.evaluation.measurement import Measurement, mean
from pipeline.evaluation.metric_table import METRICS
from pipeline.report import facts

MADE = {"command": "illm evaluate x.yaml run=runs/x", "images": "3 of data/x (digest 0123)"}


def measured(image: str, model: str, ours: Pixels, original: Pixels, size: int) -> Measurement:
    height, width = original.shape[:2]
    found = {
        "bpp": 8 * size / (width * height),
        "psnr_db": metrics.psnr_db(ours, original),
        "ms_ssim": metrics.ms_ssim(ours, original),
        "lpips": None,
    }
    return Measurement(image, model, width, height, size, **found, encode_seconds=0.5, decode_seconds=0.25, latent=None)


def write(
    folder: Path, images: Mapping[str, Pixels], models: Mapping[str, Mapping[str, Pixels]], size: int = 100
) -> None:
    """images: name -> original; models: name -> image -> reconstruction, whose file had `size` bytes."""
    rows: dict[str, list[Measurement]] = {model: [] for model in models}
    for image, original in images.items():
        save_png(folder / "reconstructions" / ORIGINAL / f"{image}.png", original)
        for model, made in models.items():
            save_png(folder / "reconstructions" / model / f"{image}.png", made[image])
            rows[model].append(measured(image, model, made[image], original, size))
    first, *others = rows
    values = {m: {k: [getattr(row, k, None) for row in rows[m]] for k in METRICS} for m in rows}
    totals = {m: {k: mean(v) for k, v in values[m].items()} for m in rows}
    known = {
        m: {k: asdict(comparison.interval(values[m][k])) for k, v in totals[m].items() if v is not None} for m in rows
    }
    apart = {m: [asdict(d) for d in comparison.differences(rows[m], rows[first])] for m in others}
    measurement.write_csv(folder / "per_image.csv", [row for m in rows for row in rows[m]])
    (folder / "totals.json").write_text(json.dumps(totals))
    (folder / "intervals.json").write_text(json.dumps({"first": first, "intervals": known, "differences": apart}))
    facts.write(
        folder,
        facts.Facts(
            made=MADE, config={"stage": "evaluate"}, lineage={first: "gan 0123"}, anchors={}, published="kodak"
        ),
    )


def published(run: Path, *args: object, **options: object) -> Path:
    """The same as an artifact, `run`/artifact."""
    artifact = publish(run / "artifact", Manifest(kind="evaluation"), lambda scratch: write(scratch, *args, **options))  # type: ignore[arg-type]
    return artifact.path


def plain(color: tuple[int, int, int], height: int = 192, width: int = 256) -> Pixels:
    """A picture of one color, (height, width, 3) uint8."""
    return np.full((height, width, 3), color, np.uint8)
