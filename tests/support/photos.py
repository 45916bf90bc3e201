"""Crops of real photos, for tests that need many: from the folders in ILLM_TEST_PHOTOS, or from installed packages."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipeline.data.images import SUFFIXES, Pixels, decode
from pipeline.sharding import sources
from pipeline.sharding.sources import Source


def crops(count: int, side: int) -> list[Pixels]:
    """`count` crops of up to side x side pixels, a third of them with sides that are no multiples of 64."""
    return list(islice(_all_crops(side), count))


def _all_crops(largest: int) -> Iterator[Pixels]:
    files, number = _files(), 0
    for round_ in range(100):
        for path in files:
            pixels = decode(path).pixels
            height, width = pixels.shape[:2]
            rows, columns = max(height - largest, 0), max(width - largest, 0)
            top, left = (rows * (3 * round_ + 1) // 7) % (rows + 1), (columns * (5 * round_ + 2) // 11) % (columns + 1)
            side = largest - 37 * (number % 3 == 2)
            number += 1
            yield pixels[top : top + side, left : left + side]


def _files() -> list[Path]:
    folders = [Path(name) for name in os.environ.get("ILLM_TEST_PHOTOS", "").split(os.pathsep) if name]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    return files or [Path(item.location) for item in sources.items(Source(name="photos", path="samples://photos"))]
