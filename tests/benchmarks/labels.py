"""What a labeler sees: python -m tests.benchmarks.labels LABELER OUT.jpg PHOTO...

A row per photo: the photo, the label of every 8x8 patch as a color of its own, and in the place of every patch the mean of all
patches of these photos that have its label. LABELER: an artifact, for instance docs/runs/small/labeler.
"""

import sys

import numpy as np
import torch
from PIL import Image

from pipeline.models import serialization
from pipeline.models.labeler import PATCH
from pipeline.registry import resolve
from pipeline.report.side_by_side import GAP, stacked

WIDTH = 380


def patches_of(pixels: np.ndarray) -> np.ndarray:
    """Shapes: pixels (H, W, 3), sides multiples of 8; returns (H/8, W/8, 8, 8, 3)."""
    height, width = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    return pixels.reshape(height, PATCH, width, PATCH, 3).swapaxes(1, 2)


def image_of(patches: np.ndarray) -> Image.Image:
    """The inverse of `patches_of`."""
    height, width = patches.shape[:2]
    return Image.fromarray(patches.swapaxes(1, 2).reshape(height * PATCH, width * PATCH, 3).astype(np.uint8))


def main(name: str, out: str, *paths: str) -> None:
    labeler = serialization.load_labeler(resolve.read(name, "labeler"))
    photos, labels = [], []
    for path in paths:
        with Image.open(path) as opened:
            photo = np.asarray(opened.convert("RGB"))
        photos.append(photo[: photo.shape[0] // 64 * 64, : photo.shape[1] // 64 * 64])
        with torch.no_grad():
            x = torch.from_numpy(photos[-1].copy()).permute(2, 0, 1)[None].float() / 255
            labels.append(labeler.label(x)[0].numpy())
    patches = np.concatenate([patches_of(photo).reshape(-1, PATCH, PATCH, 3) for photo in photos]).astype(float)
    flat = np.concatenate([each.ravel() for each in labels])
    means = np.zeros((labeler.cfg.num_codes, PATCH, PATCH, 3))
    for label in np.unique(flat):
        means[label] = patches[flat == label].mean(0)
    colors = np.random.default_rng(0).integers(0, 256, (labeler.cfg.num_codes, 3))
    rows = []
    for photo, each in zip(photos, labels, strict=True):
        drawn = np.broadcast_to(colors[each][:, :, None, None], (*each.shape, PATCH, PATCH, 3))
        columns = [Image.fromarray(photo), image_of(drawn), image_of(means[each])]
        height = WIDTH * photo.shape[0] // photo.shape[1]
        strip = Image.new("RGB", (3 * (WIDTH + GAP) - GAP, height), "white")
        for number, image in enumerate(columns):
            strip.paste(image.resize((WIDTH, height), Image.Resampling.LANCZOS), (number * (WIDTH + GAP), 0))
        rows.append(strip)
    stacked(rows).save(out, quality=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
