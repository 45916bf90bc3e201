"""Pixels of image files, with their transparency."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


RGBA = np.array([[[10, 20, 30, 255], [10, 20, 30, 1], [10, 20, 30, 0], [200, 100, 0, 128]]], np.uint8)


def test_opacity_that_is_kept_leaves_colors_alone_but_for_what_cannot_be_seen():
    decoded = images.decode(png(RGBA), keep_opacity=True)
    assert decoded.opacity.tolist() == [[255, 1, 0, 128]]
    assert decoded.pixels.tolist() == [[[10, 20, 30], [10, 20, 30], [255, 255, 255], [200, 100, 0]]]
    assert not decoded.flattened


def test_opacity_that_is_not_kept_is_laid_over_white():
    decoded = images.decode(png(RGBA))
    assert decoded.opacity is None
    assert decoded.flattened
    # 128 / 255 of 200, 100, 0 and the rest white
    assert decoded.pixels[0, 3].tolist() == pytest.approx([227, 177, 127], abs=1)
    assert decoded.pixels[0, 2].tolist() == [255, 255, 255]
    kept = images.decode(png(RGBA), keep_opacity=True)
    assert np.abs(images.over_white(kept.pixels, kept.opacity).astype(int) - decoded.pixels).max() <= 1


def test_opacity_that_says_nothing_is_none():
    opaque = RGBA.copy()
    opaque[..., 3] = 255
    assert images.decode(png(opaque), keep_opacity=True).opacity is None
    assert images.decode(png(RGBA[..., :3].copy()), keep_opacity=True).opacity is None
    assert images.decode(png(np.arange(256, dtype=np.uint16).reshape(16, 16)), keep_opacity=True).opacity is None


def test_pixels_with_their_opacity():
    kept = images.decode(png(RGBA), keep_opacity=True)
    assert np.array_equal(images.with_opacity(kept.pixels, kept.opacity)[..., 3], RGBA[..., 3])
    assert images.with_opacity(kept.pixels, None) is kept.pixels
