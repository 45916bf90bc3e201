import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_msssim import ms_ssim as second_opinion
from ssimulacra2 import compute_ssimulacra2

from pipeline.errors import ConfigError
from pipeline.evaluation import anchors, ffmpeg, instruments, metrics
from pipeline.models.lpips import LPIPS_MIN_SIDE, Lpips
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


def test_ssimulacra_2_is_the_packages_and_takes_the_original_first(tmp_path):
    original = picture(2, 256, 300)
    ours = noisy(original, 20)
    for name, pixels in (("original", original), ("ours", ours)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    expected = compute_ssimulacra2(tmp_path / "original.png", tmp_path / "ours.png")
    assert metrics.ssimulacra2(ours, original) == pytest.approx(expected, abs=1e-9)
    swapped = compute_ssimulacra2(tmp_path / "ours.png", tmp_path / "original.png")
    assert abs(expected - swapped) > 0.1
    assert metrics.ssimulacra2(original, original) == 100
    assert metrics.ssimulacra2(ours[:255], original[:255]) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", anchors.CLASSICS)
def test_an_anchor_comes_as_near_to_the_size_as_its_levels_allow(name):
    classic = anchors.CLASSICS[name]
    if missing := classic.missing():
        pytest.skip(f"needs {missing}")
    pixels = noisy(picture(0, 101, 151), 10)
    levels = range(classic.levels) if name in ("jpeg", "webp") else range(0, classic.levels, 15)
    sizes = [len(classic.encode(pixels, level)) for level in levels]
    for target in (10, sum(sizes) // len(sizes), 10**6):
        content, seconds = anchors.encode(pixels, classic, target)
        assert abs(len(content) - target) <= min(abs(size - target) for size in sizes) * 1.1 + 20
        assert seconds > 0
    decoded = classic.decode(anchors.encode(pixels, classic, 10**6)[0], pixels.shape)
    # also what the odd sides and the conversion of colors cost
    assert decoded.shape == pixels.shape
    assert metrics.psnr_db(decoded, pixels) > 27


def test_a_codec_that_this_machine_lacks_is_one_clear_line(monkeypatch):
    lacking = dataclasses.replace(anchors.CLASSICS["vvc"], missing=lambda: "ffmpeg with libvvenc (how)")
    monkeypatch.setitem(anchors.CLASSICS, "vvc", lacking)
    with pytest.raises(ConfigError, match=r"^anchors: vvc needs ffmpeg with libvvenc \(how\); or leave it out$"):
        anchors.require(["jpeg", "vvc"])


@pytest.mark.slow
@pytest.mark.skipif(not ffmpeg.has("libvmaf"), reason="needs ffmpeg with libvmaf (requirements/classics.txt)")
def test_lpips_needs_what_its_convolutions_need(monkeypatch):
    monkeypatch.setattr(instruments, "load_lpips", lambda: Lpips(None))
    bench = instruments.Instruments({"lpips"})
    for side in (LPIPS_MIN_SIDE - 1, LPIPS_MIN_SIDE):
        pixels = picture(3, side, 64)
        found = bench.of_pair(noisy(pixels, 20), bench.original(pixels))
        assert ("lpips" in found) is (side == LPIPS_MIN_SIDE)


def test_vmaf_falls_with_distortion_and_takes_the_original_as_such():
    original = picture(3, 200, 240)
    values = [ffmpeg.vmaf(noisy(original, scale), original) for scale in (0, 10, 40)]
    assert values[0] > 95
    assert values[0] > values[1] + 5 > values[2] + 10
    assert ffmpeg.vmaf(original, noisy(original, 40)) != pytest.approx(values[2], abs=0.1)
