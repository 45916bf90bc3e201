"""How pictures change with the GAN weight: python -m tests.benchmarks.gan_weights OUT.jpg SWEEP IMAGE:LEFT,TOP

SWEEP: the run folder of `make claim`. A row of crops for each discriminator, of the trials of the first seed: the original, the
codec without a discriminator, and with growing weight. Under each crop stands the weight with the PSNR of the whole image.
"""

import csv
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from pipeline.sweep.results import discriminator_of
from tests.benchmarks.crops import GAP, SIDE, TEXT, stacked


def rows_of(sweep: Path) -> dict[str, dict[float, Path]]:
    """Discriminator -> GAN weight -> the evaluation of that trial."""
    found: dict[str, dict[float, Path]] = {}
    without = {}
    with (sweep / "artifact/trials.csv").open(encoding="utf-8") as stream:
        trials = list(csv.DictReader(stream))
    for trial in trials:
        if trial["gan.seed"] != min(t["gan.seed"] for t in trials):
            continue
        weight, evaluation = float(trial["gan.gan_weight"]), sweep / "trials" / trial["name"] / "evaluate/artifact"
        settings = {"gan.discriminator": json.loads(trial["gan.discriminator"])}
        if weight:
            found.setdefault(discriminator_of({"settings": settings}, None), {})[weight] = evaluation
        else:
            without[0.0] = evaluation
    return {kind: without | found[kind] for kind in sorted(found)}


def strip(kind: str, evaluations: dict[float, Path], image: str, left: int, top: int) -> Image.Image:
    first = next(iter(evaluations.values()))
    columns = [("original", first / "reconstructions/original")]
    for weight, evaluation in sorted(evaluations.items()):
        with (evaluation / "per_image.csv").open(encoding="utf-8") as stream:
            psnr = next(float(row["psnr_db"]) for row in csv.DictReader(stream) if row["image"] == image)
        columns.append((f"{weight:g}, {psnr:.1f} dB", evaluation / "reconstructions/fine-tuned"))
    page = Image.new("RGB", (len(columns) * (SIDE + GAP) - GAP, SIDE + TEXT), "white")
    for number, (told, folder) in enumerate(columns):
        with Image.open(folder / f"{image}.png") as whole:
            page.paste(whole.convert("RGB").crop((left, top, left + SIDE, top + SIDE)), (number * (SIDE + GAP), 0))
        text = f"{kind}: {told}" if number == 0 else told
        ImageDraw.Draw(page).text((number * (SIDE + GAP) + 2, SIDE + 2), text, "black", font_size=12)
    return page


def main(out: str, sweep: str, crop: str) -> None:
    image, at = crop.split(":")
    left, top = map(int, at.split(","))
    strips = [strip(kind, evaluations, image, left, top) for kind, evaluations in rows_of(Path(sweep)).items()]
    stacked(strips).save(out, quality=90, subsampling=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
