"""Gates, intervals and BD-rate, with values worked out by hand."""

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.evaluation import comparison
from pipeline.evaluation.comparison import Difference, Interval
from pipeline.evaluation.measurement import Measurement
from pipeline.promotion import gates
from pipeline.promotion.gates import BdRateGate, Gate, RelativeGate


def measurement(image: int, psnr_db: float, bpp: float = 0.5, model: str = "m") -> Measurement:
    return Measurement(str(image), model, 100, 100, int(bpp * 1250), bpp, psnr_db, None, 0.1, 0.02, 0.01, None)


@pytest.mark.parametrize(
    ("gate", "inside", "outside"),
    [
        (Gate(at_least=27), [27, 99], [26.999]),
        (Gate(at_most=0.2), [0.2, -1], [0.2001]),
        (Gate(at_least=1, at_most=2), [1, 2], [0.9, 2.1]),
        (Gate(target=0.14, within_percent=10), [0.1261, 0.14, 0.1539], [0.1259, 0.1541]),
    ],
)
def test_a_gate_holds_within_its_bounds(gate, inside, outside):
    assert [gate.holds(value) for value in inside] == [True] * len(inside)
    assert [gate.holds(value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize("wrong", [{}, {"target": 1.0}, {"within_percent": 5}])
def test_a_gate_without_a_bound_is_a_mistake(wrong):
    with pytest.raises(ValidationError):
        Gate(**wrong)


@pytest.mark.parametrize("wrong", [{}, {"max_regression": 1, "max_regression_percent": 1}])
def test_a_relative_gate_has_one_bound(wrong):
    with pytest.raises(ValidationError):
        RelativeGate(**wrong)


def test_not_a_number_never_passes():
    assert not Gate(at_most=1).holds(float("nan"))
    verdicts = gates.against_champion(
        {"bpp": RelativeGate(max_regression=1)},
        [Difference("bpp", 1, 1, Interval(float("nan"), float("nan"), float("nan")))], "1", 99,
    )  # fmt: skip
    assert verdicts[0].holds is False


def test_the_whole_interval_has_to_be_within_the_bound():
    gate = {"psnr_db": RelativeGate(max_regression=0.3)}
    judged = lambda high: (
        gates.against_champion(gate, [Difference("psnr_db", 30, 30.1, Interval(0.1, 0, high))], "1", 99)[0].holds
    )
    assert judged(0.3) is True
    assert judged(0.31) is False
    percent = {"bpp": RelativeGate(max_regression_percent=10)}
    at = lambda high: (
        gates.against_champion(percent, [Difference("bpp", 0.2, 0.2, Interval(0, 0, high))], "1", 99)[0].holds
    )
    assert at(0.0199) is True
    assert at(0.0201) is False


def test_without_a_champion_relative_gates_are_open_and_without_a_measurement_they_fail():
    gate = {"lpips": RelativeGate(max_regression=0.3)}
    assert gates.against_champion(gate, [], "", 99)[0].holds is None
    assert gates.against_champion(gate, [], "1", 99)[0].holds is False


def test_worse_means_lower_quality_or_higher_cost():
    ours = [measurement(i, psnr_db=30.0, bpp=0.6) for i in range(10)]
    theirs = [measurement(i, psnr_db=31.0, bpp=0.5) for i in range(10)]
    found = {d.metric: d for d in comparison.differences(ours, theirs)}
    assert found["psnr_db"].worse_by.value == pytest.approx(1)
    assert found["bpp"].worse_by.value == pytest.approx(0.1)
    assert "ms_ssim" not in found  # images too small for it
    assert found["decode_seconds_per_megapixel"].ours == pytest.approx(1.0)


def test_differences_are_paired_so_that_the_spread_between_images_does_not_count():
    levels = np.linspace(20, 40, 50)
    noise = np.tile([0.1, -0.1], 25)
    ours = [measurement(i, psnr_db=float(level + n)) for i, (level, n) in enumerate(zip(levels, noise, strict=True))]
    theirs = [measurement(i, psnr_db=float(level)) for i, level in enumerate(levels)]
    worse = next(d.worse_by for d in comparison.differences(ours, theirs) if d.metric == "psnr_db")
    assert -0.04 < worse.low < 0 < worse.high < 0.04


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = comparison.interval(rng.normal(5, 1, 60).tolist(), draws=400)
        hits += found.low <= 5 <= found.high
    assert 180 <= hits <= 198


def test_intervals_are_the_same_every_time():
    values = list(range(20))
    assert comparison.interval(values) == comparison.interval(values)


def test_other_images_cannot_be_compared():
    with pytest.raises(ValueError, match="same images"):
        comparison.differences([measurement(1, 30)], [measurement(2, 30)])


RATES, QUALITY = np.array([0.1, 0.2, 0.4, 0.8]), np.array([26.0, 29.0, 32.0, 35.0])


def test_bd_rate_of_a_tenth_fewer_bits_is_minus_ten_percent():
    theirs = np.stack([RATES, QUALITY], axis=1)
    ours = np.stack([0.9 * RATES, QUALITY], axis=1)
    assert comparison.bd_rate(ours, theirs) == pytest.approx(-10)
    assert comparison.bd_rate(theirs, ours) == pytest.approx(100 / 9)
    assert comparison.bd_rate(theirs[::-1], theirs) == pytest.approx(0)


def test_bd_rate_of_better_quality_at_equal_rate():
    # 3 dB are a factor of two here, so 1.5 dB more are a factor of sqrt(2) fewer bits
    theirs, ours = np.stack([RATES, QUALITY], axis=1), np.stack([RATES, QUALITY + 1.5], axis=1)
    assert comparison.bd_rate(ours, theirs) == pytest.approx(100 * (2**-0.5 - 1), rel=1e-6)


def test_bd_rate_of_a_metric_that_an_image_is_too_small_for_is_unknown():
    rows = [
        [measurement(image, quality, rate) for image in (1, 2)] for rate, quality in zip(RATES, QUALITY, strict=True)
    ]
    assert comparison.bd_rate_interval(rows, rows, "psnr_db") == Interval(0, 0, 0)
    assert comparison.bd_rate_interval(rows, rows, "ms_ssim") is None


def test_bd_rate_needs_a_common_range_and_growing_quality():
    theirs = np.stack([RATES, QUALITY], axis=1)
    assert np.isnan(comparison.bd_rate(np.stack([RATES, QUALITY + 50], axis=1), theirs))
    with pytest.raises(ValueError, match="grows"):
        comparison.bd_rate(np.stack([RATES, -QUALITY], axis=1), theirs)


def test_the_bd_rate_gate_judges_two_families():
    family = lambda factor: [
        [measurement(i, q, r * factor) for i in range(20)] for r, q in zip(RATES, QUALITY, strict=True)
    ]
    measured = dict(zip("abcd", family(0.9), strict=True)) | dict(zip("wxyz", family(1.0), strict=True))
    gate = lambda bound: BdRateGate(ours=tuple("abcd"), theirs=tuple("wxyz"), at_most_percent=bound)
    assert gates.bd_rate(gate(-5), measured).holds is True
    assert gates.bd_rate(gate(-15), measured).holds is False
