"""FID/256 and KID/256: how far the distribution of reconstructed patches is from that of the originals."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from pipeline.data.images import Pixels

PATCH = 256
# Below, the covariance of the 2048 features is singular
MIN_FID_PATCHES = 2048
KID_SUBSET = 1000


class Fidelity(NamedTuple):
    """None where there are too few patches."""

    fid: float | None
    kid: float | None


def patch_corners(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Top-left corners of an image's 256x256 patches: a grid from (0, 0) and, if both sides reach 384, one from (128, 128).

    Source: MS-ILLM release; gives 28,650 patches for CLIC2020 and 6,573 for DIV2K.
    """
    starts = [0, PATCH // 2] if min(height, width) >= 384 else [0]
    for start in starts:
        for top in range(start, height - PATCH + 1, PATCH):
            for left in range(start, width - PATCH + 1, PATCH):
                yield top, left


class PatchFeatures:
    """Inception features of images' patches, from verified weights."""

    def __init__(self, weights_file: Path):
        self.extractor = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights_file)
        ).eval()

    @torch.no_grad()
    def of(self, pixels: Pixels) -> Tensor:
        """Shapes: pixels (H, W, 3) uint8; returns (number of patches, 2048)."""
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        patches = [image[:, t : t + PATCH, s : s + PATCH] for t, s in patch_corners(*pixels.shape[:2])]
        if not patches:
            return torch.empty(0, 2048)
        return torch.cat([self.extractor(torch.stack(group))[0] for group in _chunks(patches, 16)])


def compare(ours: Tensor, originals: Tensor) -> Fidelity:
    """FID and KID of two sets of features. Shapes: both (N, 2048)."""
    fid = kid = None
    if min(len(ours), len(originals)) >= MIN_FID_PATCHES:
        statistics = [fid_features_to_statistics(f) for f in (ours, originals)]
        fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    if min(len(ours), len(originals)) >= KID_SUBSET:
        kid = kid_features_to_metric(
            ours, originals, kid_subsets=100, kid_subset_size=KID_SUBSET, rng_seed=2020, verbose=False
        )["kernel_inception_distance_mean"]
    return Fidelity(fid, kid)


def _chunks(items: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
