"""Differences between codecs on the same images, and how sure they are."""

import numpy as np
import pytest

from pipeline.evaluation import comparison, frechet, instruments
from pipeline.evaluation.evaluator import ImageResult, Results
from pipeline.evaluation.measurement import Measurement


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Few patches are enough."""
    for name in ("fid", "vgg_fd_64"):
        kind, distance, _ = instruments.SET_DISTANCES[name]
        monkeypatch.setitem(instruments.SET_DISTANCES, name, (kind, distance, 50))
    kind, distance, _ = instruments.SET_DISTANCES["kid"]
    monkeypatch.setitem(instruments.SET_DISTANCES, "kid", (kind, distance, 50))
    monkeypatch.setattr(frechet, "KID_SUBSET", 50)


def results(kinds: tuple[str, ...] = ("inception_256",), **noise: float) -> Results:
    """Forty images of five patches whose features models change by noise; their PSNR falls with it."""
    rng = np.random.default_rng(1)
    found = Results(list(noise))
    for number in range(40):
        original = rng.normal(size=(5, 8)).astype(np.float32)
        hard = rng.normal()
        features = {"original": dict.fromkeys(kinds, original)}
        rows = []
        for model, scale in noise.items():
            changed = original + scale * rng.normal(size=(5, 8)).astype(np.float32)
            features[model] = dict.fromkeys(kinds, changed)
            psnr_db = 30 + 5 * hard - scale + 0.01 * rng.normal()
            rows.append(Measurement(f"{number}", model, 64, 64, 100, 0.2, psnr_db, None, None, 1.0, 1.0, None))
        found.add(ImageResult(rows, features, []))
    return found


@pytest.mark.slow
def test_distances_of_two_models_are_compared_over_the_same_draws_of_images():
    far = comparison.set_differences(results(ours=1.0, theirs=0.1), "ours", "theirs")
    assert [d.metric for d in far] == ["fid", "kid"]
    for difference in far:
        assert difference.ours > difference.theirs
        assert difference.worse_by.low > 0
        assert difference.worse_by.value == pytest.approx(difference.ours - difference.theirs)
    near = comparison.set_differences(results(ours=0.1, theirs=0.1), "ours", "theirs")
    assert near[0].worse_by.low < 0 < near[0].worse_by.high
    assert comparison.set_differences(results((), ours=1.0, theirs=0.1), "ours", "theirs") == []


def test_an_evaluation_has_intervals_for_every_metric_and_pairs_models_with_the_first():
    found = comparison.uncertainty(results(("vgg16_64",), first=0.1, second=1.0, third=0.1))
    assert found.first == "first"
    assert set(found.intervals["second"]) == {"bpp", "psnr_db", "vgg_fd_64"}
    for model, metrics in found.intervals.items():
        for name, interval in metrics.items():
            assert interval.low <= interval.value <= interval.high, (model, name)
    # images differ by 5 dB and models by 0.9: only pairs of the same image show it
    assert found.intervals["second"]["psnr_db"].high > found.intervals["first"]["psnr_db"].low
    second = {d.metric: d.worse_by for d in found.differences["second"]}
    assert 0.8 < second["psnr_db"].low < second["psnr_db"].high < 1.0
    assert second["vgg_fd_64"].low > 0
    third = {d.metric: d.worse_by for d in found.differences["third"]}
    assert third["vgg_fd_64"].low < 0 < third["vgg_fd_64"].high
    assert set(found.differences) == {"second", "third"}


def test_equal_images_have_no_interval_of_an_infinite_psnr():
    found = Results(["ours"])
    for number in range(3):
        row = Measurement(f"{number}", "ours", 64, 64, 100, 0.2, float("inf"), None, 0.0, 1.0, 1.0, None)
        found.add(ImageResult([row], {"original": {}, "ours": {}}, []))
    assert set(comparison.uncertainty(found).intervals["ours"]) == {"bpp", "lpips"}
