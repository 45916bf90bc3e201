"""What a validation measures and shows besides rate and PSNR."""

import numpy as np
import pytest
import torch

from pipeline.evaluation import frechet
from pipeline.evaluation.frechet import FeatureSet
from pipeline.stages.validation import Examples, Realism, ValidationConfig, label_colors
from pipeline.training.engine_config import EngineConfig
from pipeline.training.runtime import Runtime
from tests.conftest import picture


def crops(*seeds: int) -> torch.Tensor:
    pixels = np.stack([picture(seed, 128, 128) for seed in seeds])
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255


def test_moments_of_parts_give_the_distance_of_the_whole():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(20, 20))
    a, b = (rng.normal(size=(count, 20)) @ mix + 3 for count in (100, 60))
    moments = [frechet.Moments(len(x), x.sum(0), x.T @ x) for x in (a[:30], a[30:])]
    whole = frechet.Moments(*(one + other for one, other in zip(*moments, strict=True)))
    others = frechet.Moments(len(b), b.sum(0), b.T @ b)
    assert frechet.distance_of_moments(whole, others) == pytest.approx(
        frechet.frechet_distance(FeatureSet(a), FeatureSet(b)), rel=1e-9
    )
    assert frechet.distance_of_moments(whole, whole) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_realism_is_perfect_for_equal_crops_and_falls_with_noise(real_weights):
    real_weights("alexnet"), real_weights("vgg16")
    x = crops(1, 2, 3)
    realism = Realism(ValidationConfig(), Runtime(EngineConfig()), x)
    found = []
    for noise in (0.0, 0.05, 0.2):
        x_hat = (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        lpips = torch.cat([realism.measure(a, b)["val/lpips"] for a, b in zip(x_hat.split(2), x.split(2), strict=True)])
        assert lpips.shape == (3,)
        found.append((float(lpips.mean()), realism.distance()["val/vgg_fd_64"]))
    assert found[0] == pytest.approx((0, 0), abs=1e-2)
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][1] + 1 < found[1][1] < found[2][1]
    # by definition, over the patches of all three crops
    features = realism._features.of_tensor
    ours, theirs = (features((y * 255).round()).numpy() for y in (x_hat, x))
    assert ours.shape == (12, 512)
    assert found[2][1] == pytest.approx(frechet.frechet_distance(FeatureSet(ours), FeatureSet(theirs)), rel=1e-3)


def test_without_weights_or_if_not_wanted_nothing_is_measured(real_weights, monkeypatch, tmp_path):
    x, runtime = crops(1), Runtime(EngineConfig())
    off = Realism(ValidationConfig(realism=False), runtime, x)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    missing = Realism(ValidationConfig(), runtime, x)
    for realism in (off, missing):
        assert realism.measure(x, x) == {}
        assert realism.distance() == {}


def test_the_picture_shows_original_reconstruction_and_difference_of_the_first_crops():
    examples = Examples(ValidationConfig(num_images=3))
    assert examples.picture() is None
    x = crops(1, 2, 3, 4)
    x_hat = x.clone()
    x_hat[1] += 0.1
    examples.add(x[:2], x_hat[:2])
    examples.add(x[2:], x_hat[2:])
    shown = examples.picture()
    assert shown.shape == (3 * 128, 3 * 128, 3)
    assert np.array_equal(shown[:128, :128], picture(1, 128, 128))
    assert np.array_equal(shown[:128, 128:256], picture(1, 128, 128))
    assert (shown[:128, 256:] == 128).all()
    inside = picture(2, 128, 128) < 220
    assert np.abs(shown[128:256, 256:][inside].astype(int) - round((0.5 + 0.4) * 255)).max() <= 1
    examples.start()
    assert examples.picture() is None
    none = Examples(ValidationConfig(num_images=0))
    none.add(x, x_hat)
    assert none.picture() is None


def test_labels_have_colors_of_their_own():
    labels = torch.arange(1024).view(1, 32, 32)
    colors = label_colors(labels, 8)
    assert colors.shape == (1, 3, 256, 256)
    assert 0 <= colors.min() < colors.max() <= 1
    assert (colors[0, :, :8, :8] == colors[0, :, :1, :1]).all()
    seen = {tuple(color) for color in (colors[0, :, ::8, ::8] * 255).round().int().flatten(1).T.tolist()}
    assert len(seen) > 1000
    assert torch.equal(label_colors(labels[:, :1, 5:6], 8)[0, :, 0, 0], colors[0, :, 0, 40])
