"""What a page shows of evaluations: read from their artifacts, under names that are clear among several of them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.evaluation.comparison import bd_rate
from pipeline.evaluation.evaluator import ORIGINAL
from pipeline.evaluation.measurement import Measurement, read_csv
from pipeline.evaluation.metric_table import METRICS, PER_IMAGE, sign
from pipeline.report import facts
from pipeline.report.facts import Facts
from pipeline.storage import disk

Json = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation's folder holds.

    prefix: before the names of its models, where a page has several evaluations. digests: image -> SHA-256 of the original's
    file, by which evaluations know the same image.
    """

    name: str
    folder: Path
    prefix: str
    totals: dict[str, dict[str, float | None]]
    intervals: Json
    rows: list[Measurement]
    facts: Facts
    digests: dict[str, str]

    @property
    def models(self) -> list[str]:
        return list(self.totals)

    def key(self, model: str) -> str:
        """A model's name on the page."""
        return self.prefix + model

    def picture(self, model: str, image: str) -> Path:
        """A reconstruction, or what "original" names."""
        return self.folder / "reconstructions" / model / f"{image}.png"


def read(folder: Path, name: str = "", prefix: str = "") -> Evaluation:
    """An evaluation from its artifact's folder. Raises: ArtifactError if its files are not those of one."""
    try:
        totals = json.loads((folder / "totals.json").read_text(encoding="utf-8"))
        # an evaluation of an earlier version has none
        known = folder / "intervals.json"
        intervals = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: not an evaluation ({error})") from None
    rows = read_csv(folder / "per_image.csv")
    originals = folder / "reconstructions" / ORIGINAL
    digests = {image: disk.sha256(originals / f"{image}.png") for image in dict.fromkeys(row.image for row in rows)}
    return Evaluation(name or folder.name, folder, prefix, totals, intervals, rows, facts.read(folder), digests)


def read_several(artifacts: Sequence[tuple[str, Artifact]]) -> list[Evaluation]:
    """Evaluations for one page. artifacts: each with the name that the user gave."""
    short = [_short(name) for name, _ in artifacts]
    names = [s if short.count(s) == 1 else name for s, (name, _) in zip(short, artifacts, strict=True)]
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ArtifactError(f"{repeated[0]}: was named twice; name each evaluation once")
    several = len(names) > 1
    return [
        read(artifact.path, name, f"{name}/" if several else "")
        for name, (_, artifact) in zip(names, artifacts, strict=True)
    ]


def _short(name: str) -> str:
    parts = [part for part in name.split("/") if part]
    return parts[-2] if len(parts) > 1 and parts[-1] == "artifact" else parts[-1]


@dataclass(frozen=True)
class Image:
    """An image of one or several evaluations. sources: name on the page -> file; the original's is "original"."""

    name: str
    sources: dict[str, Path]


def images(evaluations: Sequence[Evaluation]) -> tuple[list[Image], list[Json]]:
    """Every image, and one row of measurements for each image and model.

    Images of several evaluations are one if their originals are equal byte for byte, whatever they are called.
    """
    found: dict[tuple[str, int], Image] = {}
    names: set[str] = set()
    rows: list[Json] = []
    for evaluation in evaluations:
        places: dict[str, tuple[str, int]] = {}
        seen: Counter[str] = Counter()
        for row in evaluation.rows:
            if row.image not in places:
                digest = evaluation.digests[row.image]
                # an evaluation may hold the same image twice
                places[row.image] = (digest, seen[digest])
                seen[digest] += 1
            place = places[row.image]
            if place not in found:
                name = row.image if row.image not in names else f"{evaluation.name}/{row.image}"
                names.add(name)
                sources = {ORIGINAL: evaluation.picture(ORIGINAL, row.image)}
                found[place] = Image(name, sources)
            image = found[place]
            image.sources[evaluation.key(row.model)] = evaluation.picture(row.model, row.image)
            rows.append(_row(image.name, evaluation.key(row.model), row))
    return list(found.values()), rows


def image_sets(evaluations: Sequence[Evaluation]) -> list[int]:
    """A number for each evaluation, the same where they are of the same images."""
    kinds: list[list[str]] = []
    numbers = []
    for evaluation in evaluations:
        digests = sorted(evaluation.digests.values())
        if digests not in kinds:
            kinds.append(digests)
        numbers.append(kinds.index(digests))
    return numbers


def _row(image: str, model: str, row: Measurement) -> Json:
    values = {name: getattr(row, name) for name in PER_IMAGE}
    times = {"encode_seconds": row.encode_seconds, "decode_seconds": row.decode_seconds}
    return {"image": image, "model": model, "bytes": row.bytes} | values | times


def models(evaluations: Sequence[Evaluation]) -> list[Json]:
    """Every model with its mean values as [value, low, high] and by how much it is worse than its evaluation's first one.

    set: the same number for models that were measured on the same images.
    """
    return [
        {
            "key": evaluation.key(model),
            "family": model,
            "set": number,
            "reference": evaluation.key(evaluation.models[0]),
            "settings": evaluation.facts["anchors"].get(model, ""),
            "totals": {name: _interval(evaluation, model, name) for name in METRICS if row.get(name) is not None},
            "worse_by": _worse_by(evaluation, model),
        }
        for evaluation, number in zip(evaluations, image_sets(evaluations), strict=True)
        for model, row in evaluation.totals.items()
    ]


def _interval(evaluation: Evaluation, model: str, metric: str) -> list[float | None]:
    value = evaluation.totals[model][metric]
    found = evaluation.intervals.get("intervals", {}).get(model, {}).get(metric)
    return [value, found["low"], found["high"]] if found else [value, value, value]


def _worse_by(evaluation: Evaluation, model: str) -> Json:
    listed = evaluation.intervals.get("differences", {}).get(model, [])
    return {d["metric"]: [d["worse_by"][k] for k in ("value", "low", "high")] for d in listed if d["metric"] in METRICS}


def bd_rates(evaluations: Sequence[Evaluation]) -> Json:
    """By how many percent of the rate each codec differs from the first one at equal quality, where both have several rates.

    Returns the first codec's name as "against", and "rows": codec -> metric -> percent, negative for fewer bits. A metric is left
    out where it does not grow with the rate, or where the two share no range of it. Both are of the same images.
    """
    points: dict[str, list[dict[str, float | None]]] = {}
    numbers = image_sets(evaluations)
    for evaluation, number in zip(evaluations, numbers, strict=True):
        if number == numbers[0]:
            for model, row in evaluation.totals.items():
                points.setdefault(model, []).append(row)
    several = {model: rows for model, rows in points.items() if len(rows) > 1}
    if len(several) < 2:
        return {"against": "", "rows": {}}
    first, *others = several
    rows = {model: {m: _bd_rate(several[model], several[first], m) for m in METRICS if m != "bpp"} for model in others}
    found = {model: {m: v for m, v in values.items() if v is not None} for model, values in rows.items()}
    return {"against": first, "rows": {model: values for model, values in found.items() if values}}


def _bd_rate(
    ours: Sequence[dict[str, float | None]], theirs: Sequence[dict[str, float | None]], metric: str
) -> float | None:
    curves = []
    for rows in (ours, theirs):
        points = [(row["bpp"], row.get(metric)) for row in rows]
        if any(quality is None or math.isinf(quality) for _, quality in points):
            return None
        curves.append(np.array(points, np.float64) * [1, sign(metric)])
    try:
        value = bd_rate(*curves)
    except ValueError:
        return None
    return None if math.isnan(value) else value
