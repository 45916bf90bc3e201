"""Everything that measures a reconstruction: metrics of image pairs, and features of patches, with the weights that are there."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import Pixels
from pipeline.data.transforms import to_float
from pipeline.evaluation import ffmpeg, frechet, metrics
from pipeline.evaluation.frechet import Features, FeatureSet
from pipeline.evaluation.metric_table import METRICS, OF_SETS
from pipeline.evaluation.patch_features import PATCH_SETS, PatchFeatures
from pipeline.models import pretrained
from pipeline.models.lpips import LPIPS_MIN_SIDE, load_lpips
from pipeline.models.vgg16 import load_dists
from pipeline.training.device import settle_arithmetic

PairMetric = Callable[[Pixels, Pixels], float | None]
# Pixels of an original whose features are kept for all its reconstructions: 600 bytes for each
MAX_KEPT_PIXELS = 2**22
# Distance of two sets -> the features it compares, how, and the patches it needs: of fewer, a covariance would be singular
SET_DISTANCES: dict[str, tuple[str, Callable[[FeatureSet, FeatureSet], float | None], int]] = {
    "fid": ("inception_256", frechet.frechet_distance, 2048),
    "fid_64": ("inception_64", frechet.frechet_distance, 2048),
    "kid": ("inception_256", frechet.kernel_distance, frechet.KID_SUBSET),
    "vgg_fd_64": ("vgg16_64", frechet.frechet_distance, 512),
}


def device() -> torch.device:
    """Where networks run: on a GPU where there is one, in whole 32-bit arithmetic, so that values agree with a CPU's."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    settle_arithmetic("fp32_exact", deterministic=False)
    return torch.device("cuda")


@dataclass(frozen=True)
class Original:
    """An image that reconstructions are compared with, and what of it several comparisons need."""

    pixels: Pixels
    x: Tensor
    dists_features: list[Tensor] | None
    patch_features: dict[str, Features]


class Instruments:
    """The metrics among `wanted` that this machine can compute. Networks run on a GPU where there is one.

    wanted: names of `METRICS`; the distances need features of whole sets, which `set_distances` compares.
    """

    def __init__(self, wanted: Collection[str] = tuple(METRICS)):
        self.device = device()
        lpips = load_lpips() if "lpips" in wanted else None
        dists = load_dists() if "dists" in wanted else None
        self._lpips = lpips.to(self.device) if lpips else None
        self._dists = dists.to(self.device) if dists else None
        plain = {"psnr_db": metrics.psnr_db, "ms_ssim": metrics.ms_ssim, "ssimulacra2": metrics.ssimulacra2}
        if ffmpeg.has("libvmaf"):
            plain["vmaf"] = ffmpeg.vmaf
        self._plain: dict[str, PairMetric] = {name: metric for name, metric in plain.items() if name in wanted}
        self._features: dict[str, PatchFeatures] = {}
        for kind in sorted({SET_DISTANCES[name][0] for name in OF_SETS if name in wanted}):
            weights = pretrained.find(PATCH_SETS[kind].network)
            if weights is not None:
                self._features[kind] = PatchFeatures(kind, weights, self.device)

    def original(self, pixels: Pixels) -> Original:
        """Shapes: pixels (H, W, 3) uint8."""
        x = self._on_device(pixels)
        keep = self._dists is not None and x.shape[-2] * x.shape[-1] <= MAX_KEPT_PIXELS
        features = self._dists_features(x) if keep else None
        return Original(pixels, x, features, {k: f.of_original(pixels) for k, f in self._features.items()})

    @torch.no_grad()
    def of_pair(self, ours: Pixels, original: Original) -> dict[str, float | None]:
        """Every metric of one image; None for those that it is too small for. Shapes: ours (H, W, 3) uint8."""
        found = {name: metric(ours, original.pixels) for name, metric in self._plain.items()}
        x_hat = self._on_device(ours)
        if self._lpips is not None and min(ours.shape[:2]) >= LPIPS_MIN_SIDE:
            found["lpips"] = float(self._lpips(x_hat, original.x))
        if self._dists is not None:
            theirs = original.dists_features or self._dists_features(original.x)
            found["dists"] = float(self._dists.compare(self._dists_features(x_hat), theirs))
        return found

    def features_of(self, pixels: Pixels) -> dict[str, Features]:
        """Features of a reconstruction's patches, by kind."""
        return {kind: features.of(pixels) for kind, features in self._features.items()}

    def _on_device(self, pixels: Pixels) -> Tensor:
        return to_float(np.ascontiguousarray(pixels)[None]).to(self.device)

    @torch.no_grad()
    def _dists_features(self, x: Tensor) -> list[Tensor]:
        assert self._dists is not None
        return self._dists.features(x)


def set_distances(
    ours: Mapping[str, FeatureSet], originals: Mapping[str, FeatureSet], at_least: int | None = None
) -> dict[str, float]:
    """Distances between sets of features, each by kind; those of too few patches are left out.

    at_least: patches that are enough, if not as many as the distance needs.
    """
    found: dict[str, float] = {}
    for name, (kind, distance, needed) in SET_DISTANCES.items():
        if kind not in ours:
            continue
        enough = needed if at_least is None else at_least
        if min(len(ours[kind]), len(originals[kind])) >= enough:
            value = distance(ours[kind], originals[kind])
            found |= {} if value is None else {name: value}
    return found
