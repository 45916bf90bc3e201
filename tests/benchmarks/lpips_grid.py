"""Does a codec look better at the pixels that LPIPS looks at? python -m tests.benchmarks.lpips_grid IMAGES NAME=CODEC ...

AlexNet's first layer looks at every fourth pixel. LPIPS of what each codec makes of the images of a folder: of whole images, as
always, and without their first 0 to 3 rows and columns, which moves the grid. Writes docs/results/lpips-grid.json.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import Pixels, decode
from pipeline.evaluation import metrics
from pipeline.models.lpips import Lpips, load_lpips
from tests.benchmarks.measure import hardware

TARGET = Path("docs/results/lpips-grid.json")
SHIFTS = 4


def tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@torch.no_grad()
def grid(lpips: Lpips, x_hat: Tensor, x: Tensor) -> list[float]:
    """LPIPS without the first rows and columns, from none to three of each; the first is that of the whole images."""
    return [lpips(x_hat[..., i:, j:], x[..., i:, j:]).item() for i in range(SHIFTS) for j in range(SHIFTS)]


def measure(word: str, images: list[Pixels], lpips: Lpips) -> dict[str, float | str]:
    name, _, place = word.partition("=")
    codec, rows = ImageCodec.load(place), []
    for pixels in images:
        content = codec.compress(pixels)
        x_hat = codec.decompress(content)
        whole, *shifted = grid(lpips, tensor(x_hat), tensor(pixels))
        bpp = metrics.bits_per_pixel(len(content), *pixels.shape[:2])
        rows.append((bpp, metrics.psnr_db(x_hat, pixels), whole, statistics.mean(shifted)))
    bpp, psnr_db, whole, shifted = (round(float(np.mean(column)), 4) for column in zip(*rows, strict=True))
    return {"codec": name, "bpp": bpp, "psnr_db": psnr_db, "lpips": whole, "lpips_elsewhere": shifted}


def table() -> str:
    """As docs/training.md shows it."""
    lines = ["| codec | bpp | PSNR, dB | LPIPS | LPIPS elsewhere |", "|---|---|---|---|---|"]
    for row in json.loads(TARGET.read_text())["rows"]:
        values = (f"{row['bpp']:.4f}", f"{row['psnr_db']:.2f}", f"{row['lpips']:.4f}", f"{row['lpips_elsewhere']:.4f}")
        lines.append(f"| {row['codec']} | {' | '.join(values)} |")
    return "\n".join(lines)


def main(folder: str, *words: str) -> None:
    lpips = load_lpips()
    if lpips is None:
        raise SystemExit("needs AlexNet's weights: illm fetch-weights")
    images = [decode(path.read_bytes()).pixels for path in sorted(Path(folder).iterdir())]
    rows = [measure(word, images, lpips) for word in words]
    TARGET.write_text(json.dumps({"hardware": hardware(), "images": len(images), "rows": rows}, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
