"""Crops of reconstructions side by side in one picture, for where there is no browser."""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

# Pixels: sides of a crop, between crops, for the text below one
SIDE, GAP, TEXT = 256, 4, 18


def row(evaluation: Path, image: str, models: Sequence[str], at: tuple[int, int] | None = None) -> Image.Image:
    """The original's crop and those of `models`, each with its name and the bits per pixel of the whole image below.

    evaluation: folder of an artifact. at: left and top of the crop; None: from the middle.
    """
    with (evaluation / "per_image.csv").open(encoding="utf-8") as stream:
        rates = {found["model"]: float(found["bpp"]) for found in csv.DictReader(stream) if found["image"] == image}
    columns = []
    for model in ("original", *models):
        with Image.open(evaluation / "reconstructions" / model / f"{image}.png") as whole:
            told = f"{model}, {rates[model]:.3f} bpp" if model in rates else model
            columns.append((told, whole.convert("RGB")))
    width, height = columns[0][1].size
    left, top = at or (max(0, width - SIDE) // 2, max(0, height - SIDE) // 2)
    return strip(columns, left, top)


def strip(columns: Sequence[tuple[str, Image.Image]], left: int, top: int) -> Image.Image:
    """The same crop of several pictures side by side, each with its text below."""
    page = Image.new("RGB", (len(columns) * (SIDE + GAP) - GAP, SIDE + TEXT), "white")
    for number, (told, whole) in enumerate(columns):
        crop = whole.crop((left, top, min(left + SIDE, whole.width), min(top + SIDE, whole.height)))
        page.paste(crop, (number * (SIDE + GAP), 0))
        ImageDraw.Draw(page).text((number * (SIDE + GAP) + 2, SIDE + 2), told, "black", font_size=12)
    return page


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """One below the other. All have the width of the first."""
    page = Image.new("RGB", (strips[0].width, sum(strip.height + GAP for strip in strips) - GAP), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height + GAP
    return page
