"""Two codecs on the same images: by how much one is worse, how sure that is, and BD-rate between families of codecs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from pipeline.evaluation.evaluator import Results
from pipeline.evaluation.measurement import Measurement
from pipeline.evaluation.metric_table import OF_SETS, PER_IMAGE, TIMES, sign

# Resamplings of the images behind an interval
DRAWS = 2000
# Resamplings for distances of sets, each of which takes a second or more
SET_DRAWS = 30
CONFIDENCE = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean, or a difference of means, with the 95 % interval of a bootstrap over images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Difference:
    """One metric of two models on the same images; `worse_by` is positive where the first model is the worse one."""

    metric: str
    ours: float
    theirs: float
    worse_by: Interval


def interval(values: Sequence[float], draws: int = DRAWS) -> Interval:
    """The mean of one value per image with its bootstrap interval (percentiles; the same numbers every time)."""
    found = np.asarray(values, dtype=np.float64)
    return _percentiles(float(found.mean()), found[_resampled(len(found), draws)].mean(axis=1))


def differences(ours: Sequence[Measurement], theirs: Sequence[Measurement]) -> list[Difference]:
    """Every metric that both have for every image, compared image by image.

    Raises: ValueError if they are not of the same images.
    """
    if [m.image for m in ours] != [m.image for m in theirs] or not ours:
        raise ValueError("measurements of two models can be compared on the same images only")
    result = []
    for metric in (*PER_IMAGE, *TIMES):
        pairs = [(getattr(a, metric), getattr(b, metric)) for a, b in zip(ours, theirs, strict=True)]
        if not _all_finite([value for pair in pairs for value in pair]):
            continue
        a, b = np.array(pairs, dtype=np.float64).T
        result.append(Difference(metric, float(a.mean()), float(b.mean()), interval((b - a) * sign(metric))))
    return result


def set_differences(results: Results, ours: str, theirs: str) -> list[Difference]:
    """Distances of sets (FID and the like) of two models that were measured together, on the same resamplings of the images."""
    return _set_differences(*_set_distances(results), ours, theirs)


@dataclass(frozen=True)
class Uncertainty:
    """Intervals of each model's metrics, and of its differences from the first model, on the same images."""

    first: str
    intervals: dict[str, dict[str, Interval]]
    differences: dict[str, list[Difference]]


def uncertainty(results: Results) -> Uncertainty:
    """95 % intervals by resampling the images: of every model, and paired between each model and the first."""
    first = results.models[0]
    whole, drawn = _set_distances(results)
    intervals: dict[str, dict[str, Interval]] = {}
    paired: dict[str, list[Difference]] = {}
    for model in results.models:
        rows = results.of(model)
        values = {name: [getattr(row, name) for row in rows] for name in PER_IMAGE}
        intervals[model] = {name: interval(v) for name, v in values.items() if _all_finite(v)}
        for metric, value in whole[model].items():
            intervals[model][metric] = _around(value, [draw[model][metric] for draw in drawn])
        if model != first:
            paired[model] = differences(rows, results.of(first))
            paired[model] += _set_differences(whole, drawn, model, first)
    return Uncertainty(first, intervals, paired)


SetDistances = dict[str, dict[str, float]]


def _set_distances(results: Results) -> tuple[SetDistances, list[SetDistances]]:
    """Model -> distance -> value: of all images, and of each resampling, the same for all models."""
    count = len(results.features[results.models[0]])
    whole = results.set_distances()
    draws = _resampled(count, SET_DRAWS if any(whole.values()) else 0)
    return whole, [results.set_distances(draw.tolist()) for draw in draws]


def _set_differences(whole: SetDistances, drawn: Sequence[SetDistances], ours: str, theirs: str) -> list[Difference]:
    found = []
    for metric in (name for name in OF_SETS if name in whole[ours]):
        a, b = whole[ours][metric], whole[theirs][metric]
        gaps = [draw[ours][metric] - draw[theirs][metric] for draw in drawn]
        found.append(Difference(metric, a, b, _around(a - b, gaps)))
    return found


def _around(value: float, drawn: Sequence[float]) -> Interval:
    """A normal interval: of few resamplings, and around the value of all images, since resampled sets are further apart."""
    reach = 1.96 * float(np.std(drawn, ddof=1))
    return Interval(value, value - reach, value + reach)


def _all_finite(values: Sequence[float | None]) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def bd_rate(ours: Floats, theirs: Floats) -> float:
    """Mean difference in rate at equal quality, in percent; negative if `ours` needs fewer bits.

    Shapes: both (n, 2), n at least 2: bits per pixel and quality (higher is better) of one codec per row.
    Returns nan where the two curves share no range of quality.
    Raises: ValueError if quality does not grow with rate.
    Source: Bjontegaard 2001, VCEG-M33; with monotone cubic pieces, as in its later implementations.
    """
    curves = []
    for points in (ours, theirs):
        rate, quality = points[np.argsort(points[:, 0])].T
        if len(rate) < 2 or (np.diff(quality) <= 0).any():
            raise ValueError("BD-rate needs two or more codecs whose quality grows with their rate")
        curves.append((PchipInterpolator(quality, np.log(rate)), quality[0], quality[-1]))
    low, high = max(c[1] for c in curves), min(c[2] for c in curves)
    if low >= high:
        return math.nan
    a, b = (curve.integrate(low, high) / (high - low) for curve, _, _ in curves)
    return float((np.exp(a - b) - 1) * 100)


def bd_rate_interval(
    ours: Sequence[Sequence[Measurement]], theirs: Sequence[Sequence[Measurement]], quality: str
) -> Interval | None:
    """BD-rate between two families of codecs, measured on the same images. None if they cannot be compared."""
    if any(getattr(m, quality) is None for family in (ours, theirs) for rows in family for m in rows):
        return None
    tables = [np.array([[(m.bpp, getattr(m, quality)) for m in rows] for rows in family]) for family in (ours, theirs)]

    def at(images: NDArray[np.int64]) -> float:
        return bd_rate(*(table[:, images].mean(axis=1) for table in tables))

    count = tables[0].shape[1]
    try:
        whole = at(np.arange(count))
        drawn = np.array([at(draw) for draw in _resampled(count, DRAWS // 10)])
    except ValueError:
        return None
    return None if math.isnan(whole) or np.isnan(drawn).any() else _percentiles(whole, drawn)


def _resampled(count: int, draws: int) -> NDArray[np.int64]:
    """Indexes of images, drawn with replacement. Shapes: returns (draws, count)."""
    return np.random.default_rng(2023).integers(0, count, (draws, count))


def _percentiles(value: float, drawn: Floats) -> Interval:
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
