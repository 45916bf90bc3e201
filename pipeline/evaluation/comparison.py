"""Two codecs on the same images: by how much one is worse, how sure that is, and BD-rate between families of codecs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from pipeline.evaluation import fid
from pipeline.evaluation.evaluator import Evaluator, Measurement
from pipeline.evaluation.metric_table import PER_IMAGE, TIMES, sign

# Resamplings of the images behind an interval
DRAWS = 2000
# Resamplings for FID and KID, each of which takes seconds
FIDELITY_DRAWS = 20
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
        if any(value is None for pair in pairs for value in pair):
            continue
        a, b = np.array(pairs, dtype=np.float64).T
        result.append(Difference(metric, float(a.mean()), float(b.mean()), interval((b - a) * sign(metric))))
    return result


def fidelity_differences(measured: Evaluator, ours: str, theirs: str) -> list[Difference]:
    """FID and KID of two models that were measured together, with intervals of a few resamplings of the images."""
    if measured.inception is None:
        return []
    groups = [measured.features[name] for name in (ours, theirs, "original")]
    whole = _fidelities(groups, range(len(groups[0])))
    drawn = [_fidelities(groups, draw.tolist()) for draw in _resampled(len(groups[0]), FIDELITY_DRAWS)]
    result = []
    for i, metric in enumerate(("fid", "kid")):
        a, b = whole[0][i], whole[1][i]
        gaps = [d[0][i] - d[1][i] for d in drawn if d[0][i] is not None and d[1][i] is not None]  # type: ignore[operator]
        if a is not None and b is not None and len(gaps) == FIDELITY_DRAWS:
            reach = 1.96 * float(np.std(gaps, ddof=1))
            result.append(Difference(metric, a, b, Interval(a - b, a - b - reach, a - b + reach)))
    return result


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


def _fidelities(groups: list[list[Tensor]], images: Sequence[int]) -> list[fid.Fidelity]:
    ours, theirs, originals = (torch.cat([group[i] for i in images]) for group in groups)
    return [fid.compare(features, originals) for features in (ours, theirs)]


def _resampled(count: int, draws: int) -> NDArray[np.int64]:
    """Indexes of images, drawn with replacement. Shapes: returns (draws, count)."""
    return np.random.default_rng(2023).integers(0, count, (draws, count))


def _percentiles(value: float, drawn: Floats) -> Interval:
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
