"""Distances between sets of patches: the numbers, the grids, and where features come from."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from pipeline.evaluation import frechet, patch_features
from pipeline.evaluation.frechet import FeatureSet
from pipeline.evaluation.instruments import set_distances
from pipeline.evaluation.patch_features import PATCH_SETS, PatchFeatures, patch_corners
from pipeline.models import vgg16
from tests.conftest import picture


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet.frechet_distance(FeatureSet(a), FeatureSet(b))


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """With SciPy's square root of a matrix."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)


def correlated(count: int, dims: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dims)) @ rng.normal(size=(dims, dims)) / dims**0.5 + rng.normal(size=dims)).astype(
        np.float32
    )


@pytest.mark.parametrize(("count", "others", "dims"), [(300, 200, 40), (1000, 700, 96)])
def test_the_frechet_distance_is_that_of_scipy(count, others, dims):
    a, b = correlated(count, dims, 1), correlated(others, dims, 2)
    assert distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-6)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_known_gaussians():
    """One dimension: (difference of means)^2 + (difference of deviations)^2."""
    a, b = np.array([[-1.0], [0.0], [1.0]], np.float32), np.array([[1.0], [4.0], [7.0]], np.float32)
    assert distance(a, b) == pytest.approx(4**2 + (3 - 1) ** 2)


def test_the_frechet_distance_of_few_samples_in_many_dimensions():
    """Both covariances are singular; the square root that SciPy takes of their product is then far from exact."""
    a = np.zeros((2, 100), np.float32)
    a[0, 0], a[1, 0] = 1, -1
    b = np.zeros((2, 100), np.float32)
    b[0, 1], b[1, 1] = 3, -3
    # variances 2 and 18 along different axes: nothing in common
    assert distance(a, b) == pytest.approx(2 + 18)
    assert distance(a, 2 * a) == pytest.approx(2)


def test_kid_is_torch_fidelitys_and_needs_a_thousand_patches():
    a, b = correlated(1100, 16, 1), correlated(1200, 16, 2)
    expected = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=100, kid_subset_size=1000, rng_seed=2020, verbose=False
    )
    assert frechet.kernel_distance(FeatureSet(a), FeatureSet(b)) == pytest.approx(
        expected["kernel_inception_distance_mean"]
    )
    assert frechet.kernel_distance(FeatureSet(a[:999]), FeatureSet(b)) is None


def test_sets_that_are_too_small_have_no_distance():
    few = {"inception_256": FeatureSet(correlated(2047, 8, 1)), "vgg16_64": FeatureSet(correlated(511, 8, 2))}
    assert set(set_distances(few, few)) == {"kid"}
    enough = {"inception_256": FeatureSet(correlated(2048, 8, 1)), "vgg16_64": FeatureSet(correlated(512, 8, 2))}
    assert set(set_distances(enough, enough)) == {"fid", "kid", "vgg_fd_64"}


@pytest.mark.parametrize(
    ("height", "width", "patches"),
    [(255, 900, 0), (256, 256, 1), (383, 600, 2), (384, 384, 2), (512, 768, 8), (2048, 1365, 68)],
)
def test_patch_grid(height, width, patches):
    # Kodak's 24 images of 512x768 give the published 192
    assert len(list(patch_corners(height, width, PATCH_SETS["inception_256"]))) == patches


@pytest.mark.parametrize("name", ["inception_64", "vgg16_64"])
def test_small_patches_are_a_plain_grid(name):
    assert list(patch_corners(129, 200, PATCH_SETS[name])) == [(t, s) for t in (0, 64) for s in (0, 64, 128)]
    # 2304 for Kodak's 24 images
    assert len(list(patch_corners(512, 768, PATCH_SETS[name]))) == 96


@pytest.fixture
def features(monkeypatch) -> PatchFeatures:
    """VGG16 with random weights."""
    make = vgg16.layers
    monkeypatch.setattr(vgg16, "layers", lambda weights: make(None))
    torch.manual_seed(0)
    return PatchFeatures("vgg16_64", "not read", torch.device("cpu"))


def test_features_are_of_normalized_patches_and_pooled(features):
    pixels = picture(4, 70, 130)
    found = features.of(pixels)
    assert found.shape == (2, 512)
    patch = torch.tensor(pixels[:64, 64:128]).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = features.network((patch - mean) / std)
    assert expected.shape == (1, 512, 4, 4)
    assert found[1] == pytest.approx(expected.mean((0, 2, 3)).numpy(), rel=1e-4, abs=1e-7)
    assert features.of(pixels[:63]).shape == (0, 512)


def test_features_of_originals_are_kept_by_content(features, tmp_path, monkeypatch):
    monkeypatch.setenv("ILLM_CACHE", str(tmp_path))
    first = features.of_original(picture(4, 64, 64))
    (kept,) = (tmp_path / "features").iterdir()
    features.network = None
    assert np.array_equal(features.of_original(picture(4, 64, 64)), first)
    with pytest.raises(TypeError):
        features.of_original(picture(5, 64, 64))
    # another grid is another content
    features.patches = dataclasses.replace(features.patches, size=32)
    with pytest.raises(TypeError):
        features.of_original(picture(4, 64, 64))
    features.patches = PATCH_SETS["vgg16_64"]
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(TypeError):
        features.of_original(picture(4, 64, 64))


def test_many_patches_go_through_in_parts_with_the_same_result(features, monkeypatch):
    pixels = picture(6, 128, 192)
    whole = features.of(pixels)
    monkeypatch.setattr(patch_features, "CHUNK_PIXELS", 64 * 64)
    assert features.of(pixels) == pytest.approx(whole, rel=1e-4, abs=1e-7)
