"""An evaluation that would measure something else than it says stops before it begins."""

import numpy as np
import pytest
import torch

from pipeline.errors import MetricError
from pipeline.evaluation import instruments, metrics, patch_features, sanity
from pipeline.evaluation.instruments import Instruments
from pipeline.models import vgg16
from pipeline.models.lpips import Lpips
from pipeline.models.vgg16 import Dists


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ILLM_CACHE", str(tmp_path))


@pytest.mark.slow
def test_the_metrics_of_this_installation_are_what_they_say(real_weights):
    sanity.check(Instruments())


def shifted(height, width, patches):
    return [(top + 7, left + 7) for top, left in CORNERS(height - 7, width - 7, patches)]


CORNERS, LPIPS, DISTS = patch_features.patch_corners, Lpips.forward, Dists.compare

PSNR, MS_SSIM, SSIMULACRA2 = metrics.psnr_db, metrics.ms_ssim, metrics.ssimulacra2
MISTAKES = {
    "PSNR of another peak": (
        metrics,
        "psnr_db",
        lambda ours, original: PSNR(ours // 2, original // 2),
        "PSNR against its JPEG",
    ),
    "MS-SSIM of a wrong range": (metrics, "ms_ssim", lambda a, b: MS_SSIM(a // 4, b // 4), "MS-SSIM against its JPEG"),
    "MS-SSIM of one channel": (
        metrics,
        "ms_ssim",
        lambda a, b: MS_SSIM(a[:, :, [0, 0, 0]], b[:, :, [0, 0, 0]]),
        "MS-SSIM",
    ),
    "SSIMULACRA 2 of swapped images": (
        metrics,
        "ssimulacra2",
        lambda a, b: SSIMULACRA2(b, a),
        "SSIMULACRA 2 against its JPEG",
    ),
}
OF_LPIPS = {
    "LPIPS in [0, 2]": (Lpips, "forward", lambda self, a, b: LPIPS(self, 2 * a, 2 * b), "LPIPS against its JPEG"),
    "LPIPS of BGR": (Lpips, "forward", lambda self, a, b: LPIPS(self, a.flip(1), b.flip(1)), "LPIPS against its JPEG"),
}
OF_VGG16 = {
    "DISTS without ImageNet's mean": (vgg16, "MEAN", (0.0, 0.0, 0.0), "DISTS against its JPEG"),
    "VGG-FD on a shifted grid": (patch_features, "patch_corners", shifted, "VGG-FD/64 against its JPEG"),
    "DISTS as similarity": (Dists, "compare", lambda self, f, g: 1 - DISTS(self, f, g), "DISTS against itself is 1"),
}


def refusal(monkeypatch, owner, name, mistake) -> str:
    """What an evaluation with this mistake says before it measures anything."""
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises(MetricError, match="nothing was measured: ") as refused:
        sanity.check(Instruments())
    return str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_metric_stops_the_evaluation(mistake, monkeypatch):
    *changed, told = MISTAKES[mistake]
    assert told in refusal(monkeypatch, *changed)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", OF_LPIPS)
def test_a_mistake_in_lpips_stops_the_evaluation(mistake, monkeypatch, real_weights):
    real_weights("alexnet")
    *changed, told = OF_LPIPS[mistake]
    assert told in refusal(monkeypatch, *changed)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", OF_VGG16)
def test_a_mistake_with_vgg16_stops_the_evaluation(mistake, monkeypatch, real_weights):
    real_weights("vgg16")
    *changed, told = OF_VGG16[mistake]
    assert told in refusal(monkeypatch, *changed)


@pytest.mark.slow
def test_what_several_comparisons_need_is_computed_once(monkeypatch, real_weights):
    real_weights("vgg16")
    calls = []
    forward = vgg16.normalized
    monkeypatch.setattr(vgg16, "normalized", lambda x: calls.append(tuple(x.shape)) or forward(x))
    measuring = Instruments(["dists", "vgg_fd_64"])
    pixels = sanity.picture()[:128, :128]
    original = measuring.original(pixels)
    for shift in (1, 2):
        measuring.of_pair(np.roll(pixels, shift, 0), original)
    # the original's patches, the original, and two reconstructions
    assert calls == [(1, 3, 128, 128), (4, 3, 64, 64)] + [(1, 3, 128, 128)] * 2
    assert original.dists_features[0].shape == (1, 3, 128, 128)
    monkeypatch.setattr(instruments, "MAX_KEPT_PIXELS", 100)
    large = measuring.original(pixels)
    assert large.dists_features is None
    kept, again = (measuring.of_pair(np.roll(pixels, 1, 0), of)["dists"] for of in (original, large))
    assert kept == again


def test_lpips_is_the_packages_with_real_weights(real_weights):
    """The package computes it from the same convolutions; only where all features are zero its epsilon differs."""
    model = Lpips(real_weights("alexnet"))
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 96, 96), torch.rand(2, 3, 96, 96)
    assert torch.allclose(model(x, y), model.net(x, y, normalize=True).flatten(), rtol=1e-4)
