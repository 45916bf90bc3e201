"""How far the distribution of reconstructions is from that of originals: Frechet and kernel distances of features."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

KID_SUBSETS, KID_SUBSET = 100, 1000
Features = NDArray[np.float32]
Floats = NDArray[np.float64]


class FeatureSet:
    """Features of a set of patches (N, D), and what several distances from it have in common, computed once."""

    def __init__(self, features: Features):
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def factors(self) -> tuple[Floats, Floats]:
        """The mean, and a matrix F with the covariance F.T @ F. Shapes: (D,), (min(N, D), D)."""
        exact = self.features.astype(np.float64)
        mean = exact.mean(0)
        centered = (exact - mean) / np.sqrt(max(1, len(exact) - 1))
        if len(centered) <= centered.shape[1]:
            return mean, centered
        return mean, np.asarray(np.linalg.qr(centered, mode="r"))


def frechet_distance(ours: FeatureSet, originals: FeatureSet) -> float:
    """Squared Frechet distance between Gaussians with the sets' means and covariances.

    The trace of the square root of the covariances' product is the sum of singular values of the product of their factors:
    no square root of a matrix is taken, and singular covariances are no special case.
    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    return _distance(*ours.factors, *originals.factors)


class Moments(NamedTuple):
    """A set of features by its size, sum (D,) and sum of products (D, D)."""

    size: int
    total: Floats
    products: Floats


def distance_of_moments(ours: Moments, originals: Moments) -> float:
    """As `frechet_distance`, of sets that are known by their moments: parts of them may lie on other machines."""
    return _distance(*_factored(ours), *_factored(originals))


def kernel_distance(ours: FeatureSet, originals: FeatureSet) -> float | None:
    """Kernel distance (KID): mean over 100 subsets of 1000, cubic kernel, unbiased; None for smaller sets.

    Source: Binkowski et al. 2018, arXiv:1801.01401.
    """
    if min(len(ours), len(originals)) < KID_SUBSET:
        return None
    # It imports torchvision, which takes seconds
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(ours.features),
        torch.from_numpy(originals.features),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=KID_SUBSET,
        rng_seed=2020,
        verbose=False,
    )
    return float(found["kernel_inception_distance_mean"])


def _distance(mean_a: Floats, factor_a: Floats, mean_b: Floats, factor_b: Floats) -> float:
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    shift = mean_a - mean_b
    return max(0.0, float(shift @ shift + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * cross))


def _factored(moments: Moments) -> tuple[Floats, Floats]:
    """As `FeatureSet.factors`. Shapes: returns (D,), (D, D)."""
    mean = moments.total / moments.size
    covariance = (moments.products - moments.size * np.outer(mean, mean)) / max(1, moments.size - 1)
    values, vectors = np.linalg.eigh(covariance)
    return mean, np.sqrt(values.clip(0))[:, None] * vectors.T
