"""How pictures change with the GAN weight: python -m tests.benchmarks.gan_weights OUT.jpg SWEEP IMAGE:LEFT,TOP

SWEEP: the run folder of `make claim`; IMAGE: a file. A row of crops for each discriminator, by the codecs of the first seed: the
original, without a discriminator, and with growing weight. Under each crop stands the weight with the PSNR of the whole image.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import Pixels
from pipeline.evaluation.metrics import psnr_db
from pipeline.report.side_by_side import stacked, strip
from tests.benchmarks.claim import NO_DISCRIMINATOR, groups


def reconstructions(sweep: Path, pixels: Pixels) -> dict[str, dict[str, Pixels]]:
    """Discriminator -> GAN weight, as it is told -> the decoded file."""
    found: dict[str, dict[str, Pixels]] = {}
    for (kind, weight), rows in groups(sweep / "artifact/trials.csv").items():
        first = min(rows, key=lambda row: int(row["gan.seed"]))
        codec = ImageCodec.load(str(sweep / "trials" / first["name"] / "gan"))
        found.setdefault(kind, {})[f"weight {weight:g}"] = codec.decompress(codec.compress(pixels))
    without = found.pop(NO_DISCRIMINATOR)
    return {kind: without | found[kind] for kind in found}


def main(out: str, sweep: str, crop: str) -> None:
    image, at = crop.rsplit(":", 1)
    left, top = map(int, at.split(","))
    pixels = np.array(Image.open(image).convert("RGB"))
    rows = reconstructions(Path(sweep), pixels)
    strips = []
    for kind, found in rows.items():
        told = {kind: pixels} | {f"{name}, {psnr_db(ours, pixels):.2f} dB": ours for name, ours in found.items()}
        strips.append(strip([(text, Image.fromarray(shown)) for text, shown in told.items()], left, top))
    stacked(strips).save(out, quality=90, subsampling=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
