"""Crops of an evaluation side by side: python -m tests.benchmarks.crops OUT.jpg MODELS RUN:IMAGE:LEFT,TOP...

MODELS: names in the evaluations, separated by commas, in the order of the columns, for instance jpeg,webp,ours; "ours" is an
evaluation's first codec, and the original comes first. Each RUN:IMAGE:LEFT,TOP is a row of crops. Under each crop stands its model
with the bits per pixel of the whole image.
"""

import csv
import sys
from pathlib import Path

from PIL import Image

from pipeline.report import side_by_side


def row(run: str, image: str, left: int, top: int, models: list[str]) -> Image.Image:
    artifact = Path(run) / "artifact"
    with (artifact / "per_image.csv").open(encoding="utf-8") as stream:
        # its own name differs from run to run
        ours = next(csv.DictReader(stream))["model"]
    return side_by_side.row(artifact, image, [ours if model == "ours" else model for model in models], (left, top))


def main(out: str, models: str, *rows: str) -> None:
    strips = []
    for word in rows:
        run, image, at = word.split(":")
        left, top = map(int, at.split(","))
        strips.append(row(run, image, left, top, models.split(",")))
    side_by_side.stacked(strips).save(out, quality=92, subsampling=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
