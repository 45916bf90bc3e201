"""Crops of an evaluation side by side: python -m tests.benchmarks.crops OUT.jpg MODELS RUN:IMAGE:LEFT,TOP...

MODELS: names in the evaluations, separated by commas, in the order of the columns, for instance jpeg,webp,ours; "ours" is an
evaluation's first codec, and the original comes first. Each RUN:IMAGE:LEFT,TOP is a row of crops of SIDE pixels. Under each crop
stands its model with the bits per pixel of the whole image.
"""

import csv
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, GAP, TEXT = 256, 4, 18


def row(run: str, image: str, left: int, top: int, models: list[str]) -> Image.Image:
    artifact = Path(run) / "artifact"
    with (artifact / "per_image.csv").open(encoding="utf-8") as stream:
        rates = {(r["image"], r["model"]): float(r["bpp"]) for r in csv.DictReader(stream)}
    # the codec's own name differs from run to run: "ours" is the first
    ours = next(iter(rates))[1]
    columns = []
    for model in ["original", *(ours if m == "ours" else m for m in models)]:
        with Image.open(artifact / "reconstructions" / model / f"{image}.png") as whole:
            rate = rates.get((image, model))
            columns.append((model if rate is None else f"{model}, {rate:.3f} bpp", whole.convert("RGB")))
    return strip(columns, left, top)


def strip(columns: list[tuple[str, Image.Image]], left: int, top: int) -> Image.Image:
    """The same crop of several pictures side by side, each with its text below."""
    page = Image.new("RGB", (len(columns) * (SIDE + GAP) - GAP, SIDE + TEXT), "white")
    for number, (told, whole) in enumerate(columns):
        page.paste(whole.crop((left, top, left + SIDE, top + SIDE)), (number * (SIDE + GAP), 0))
        ImageDraw.Draw(page).text((number * (SIDE + GAP) + 2, SIDE + 2), told, "black", font_size=12)
    return page


def stacked(strips: list[Image.Image]) -> Image.Image:
    """One below the other. All have the width of the first."""
    page = Image.new("RGB", (strips[0].width, sum(strip.height + GAP for strip in strips) - GAP), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height + GAP
    return page


def main(out: str, models: str, *rows: str) -> None:
    strips = []
    for word in rows:
        run, image, at = word.split(":")
        left, top = map(int, at.split(","))
        strips.append(row(run, image, left, top, models.split(",")))
    stacked(strips).save(out, quality=92, subsampling=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
