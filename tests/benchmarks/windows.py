"""From which size on does a part of a JPEG file cost more than all of it? python -m tests.benchmarks.windows FOLDER

Windows of 256x256, and random ones by their share of the image, of photos in FOLDER: cut out of the whole image that simplejpeg
decodes, and decoded by nvImageCodec without the rest. Writes docs/results/windows.json: CPU time per window, medians of
alternating rounds.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import images, transforms, windows
from pipeline.data.windows import Window
from tests.benchmarks.measure import hardware

TARGET = Path("docs/results/windows.json")
SIDE, ROUNDS = 256, 5
Place = tuple[bytes, int, int, Window]


def whole(place: Place) -> np.ndarray:
    content, width, height, window = place
    return window.of(images.decode_jpeg(content, width, height))


def in_part(place: Place) -> np.ndarray:
    content, width, height, window = place
    part = windows.decode_part(content, width, height, window)
    assert part is not None
    return part


def places(folder: Path, long: int) -> dict[str, list[Place]]:
    """Of each photo, re-encoded with that longer side: four windows of 256x256, and random ones by their share of it."""
    rng = np.random.default_rng(0)
    found: dict[str, list[Place]] = {"256x256": []}
    for path in sorted(folder.iterdir())[:24]:
        with Image.open(path) as opened:
            scale = long / max(opened.size)
            width, height = round(opened.width * scale), round(opened.height * scale)
            stream = io.BytesIO()
            opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=90)
        content = stream.getvalue()
        for _ in range(4):
            found["256x256"].append((content, width, height, transforms.random_square(height, width, SIDE, rng)))
        for _ in range(20):
            window = transforms.random_window(height, width, rng)
            percent = min(80, 20 * (5 * window.height * window.width // (height * width)))
            found.setdefault(f"{percent} to {percent + 20} %", []).append((content, width, height, window))
    return found


def milliseconds(decode: Callable[[Place], np.ndarray], given: list[Place]) -> float:
    started = time.process_time()
    for place in given:
        decode(place)
    return 1000 * (time.process_time() - started) / len(given)


def main(folder: str) -> None:
    rows = []
    for long in (500, 2048):
        for name, given in sorted(places(Path(folder), long).items()):
            assert all(np.array_equal(whole(place), in_part(place)) for place in given)
            pairs = [(milliseconds(in_part, given), milliseconds(whole, given)) for _ in range(ROUNDS)]
            ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
            about = {"ours": ours, "unit": "ms", "peer": peer, "peer_name": "the whole image", "ratio": ours / peer}
            rows.append({"group": "windows", "name": f"{name}, {long} long", **about, "hardware": hardware()})
            print(rows[-1])
    TARGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
