"""How pictures change with the GAN weight: python -m tests.benchmarks.gan_weights OUT.jpg SWEEP IMAGE:LEFT,TOP

SWEEP: the run folder of `make claim`; IMAGE: a file. A row of crops for each discriminator, by the codecs of the first seed: the
original, without a discriminator, and with growing weight. Under each crop stands the weight with the PSNR of the whole image.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import Pixels
from pipeline.evaluation.metrics import psnr_db
from tests.benchmarks.claim import NO_DISCRIMINATOR, groups
from tests.benchmarks.crops import GAP, SIDE, TEXT, stacked


def reconstructions(sweep: Path, pixels: Pixels) -> dict[str, dict[str, Pixels]]:
    """Discriminator -> GAN weight, as it is told -> the decoded file."""
    found: dict[str, dict[str, Pixels]] = {}
    for (kind, weight), rows in groups(sweep / "artifact/trials.csv").items():
        first = min(rows, key=lambda row: int(row["gan.seed"]))
        codec = ImageCodec.load(str(sweep / "trials" / first["name"] / "gan"))
        found.setdefault(kind, {})[f"weight {weight:g}"] = codec.decompress(codec.compress(pixels))
    without = found.pop(NO_DISCRIMINATOR)
    return {kind: without | found[kind] for kind in found}


def strip(kind: str, columns: dict[str, Pixels], pixels: Pixels, left: int, top: int) -> Image.Image:
    page = Image.new("RGB", ((len(columns) + 1) * (SIDE + GAP) - GAP, SIDE + TEXT), "white")
    told = {kind: pixels} | {f"{name}, {psnr_db(found, pixels):.2f} dB": found for name, found in columns.items()}
    for number, (text, shown) in enumerate(told.items()):
        crop = Image.fromarray(shown).crop((left, top, left + SIDE, top + SIDE))
        page.paste(crop, (number * (SIDE + GAP), 0))
        ImageDraw.Draw(page).text((number * (SIDE + GAP) + 2, SIDE + 2), text, "black", font_size=12)
    return page


def main(out: str, sweep: str, crop: str) -> None:
    image, at = crop.rsplit(":", 1)
    left, top = map(int, at.split(","))
    pixels = np.array(Image.open(image).convert("RGB"))
    rows = reconstructions(Path(sweep), pixels)
    strips = [strip(kind, columns, pixels, left, top) for kind, columns in rows.items()]
    stacked(strips).save(out, quality=90, subsampling=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
