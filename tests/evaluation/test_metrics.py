import math

import numpy as np
import pytest
import torch
from pytorch_msssim import ms_ssim as second_opinion

from pipeline.evaluation import anchors, fid, metrics
from tests.conftest import picture


def noisy(pixels: np.ndarray, scale: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, scale, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def test_bits_per_pixel_counts_all_bytes():
    assert metrics.bits_per_pixel(100, 20, 40) == 1.0


def test_psnr_of_known_errors():
    black = np.zeros((4, 4, 3), np.uint8)
    assert metrics.psnr_db(black + 1, black) == pytest.approx(20 * math.log10(255))
    half = black.copy()
    half[:2] = 10  # mean squared error 50
    assert metrics.psnr_db(half, black) == pytest.approx(10 * math.log10(255**2 / 50))
    assert metrics.psnr_db(black, black) == math.inf


@pytest.mark.parametrize("scale", [5, 30, 80])
def test_ms_ssim_agrees_with_a_second_implementation(scale):
    original = picture(1, 192, 256)  # sides that halve evenly, where all definitions agree
    ours = noisy(original, scale)
    tensors = (torch.from_numpy(p).permute(2, 0, 1)[None].double() for p in (ours, original))
    assert metrics.ms_ssim(ours, original) == pytest.approx(second_opinion(*tensors, data_range=255).item(), abs=1e-5)


def test_ms_ssim_of_equal_images_is_one_and_small_images_have_none():
    assert metrics.ms_ssim(picture(0, 177, 201), picture(0, 177, 201)) == pytest.approx(1.0)
    assert metrics.ms_ssim(picture(0, 175, 400), picture(0, 175, 400)) is None


@pytest.mark.parametrize(
    ("height", "width", "patches"),
    [(255, 900, 0), (256, 256, 1), (383, 600, 2), (384, 384, 2), (512, 768, 8), (2048, 1365, 68)],
)
def test_patch_grid(height, width, patches):
    # Kodak's 24 images of 512x768 give the published 192
    assert len(list(fid.patch_corners(height, width))) == patches


@pytest.mark.slow
def test_fidelity_needs_enough_patches():
    few = torch.randn(100, 256)
    assert fid.compare(few, few) == (None, None)
    torch.manual_seed(0)
    ours, same, other = torch.rand(2100, 256), torch.rand(2100, 256), torch.rand(2100, 256) + 0.5
    near, far = fid.compare(ours, same), fid.compare(ours, other)
    assert abs(near.kid) < 1e-3 < far.kid
    assert near.fid < far.fid
    assert far.fid - near.fid == pytest.approx(256 * 0.25, rel=0.05)  # the squared distance of the means


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["jpeg", "webp"])
def test_an_anchor_comes_as_near_to_the_size_as_its_quality_steps_allow(anchor):
    pixels = noisy(picture(0, 200, 300), 10)
    sizes = {q: len(anchors._encoded(pixels, anchor, q)) for q in range(1, 96)}
    for target in (10, 6000, 10**6):
        found = len(anchors.encode(pixels, anchor, target))
        assert abs(found - target) <= min(abs(s - target) for s in sizes.values()) * 1.1 + 20
    assert anchors.decode(anchors.encode(pixels, anchor, 6000)).shape == pixels.shape
