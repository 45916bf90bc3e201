"""Does decoding only what a crop needs pay? python -m tests.benchmarks.windows FOLDER, with pyvips and pyvips-binary installed.

A window of 256x256 of each photo in FOLDER, cut out of the whole image that simplejpeg decodes, and decoded by pyvips, which stops
after the window's last row. Writes docs/results/windows.json: CPU time per window, medians of alternating rounds.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyvips
import simplejpeg
from PIL import Image

from tests.benchmarks.measure import hardware

TARGET = Path("docs/results/windows.json")
SIDE, ROUNDS = 256, 5
Window = tuple[bytes, int, int]


def whole(window: Window) -> np.ndarray:
    content, top, left = window
    return simplejpeg.decode_jpeg(content)[top : top + SIDE, left : left + SIDE].copy()


def in_part(window: Window) -> np.ndarray:
    content, top, left = window
    return pyvips.Image.new_from_buffer(content, "", access="sequential").crop(left, top, SIDE, SIDE).numpy()


def windows(folder: Path, long: int) -> list[Window]:
    """Four random ones of each photo, re-encoded with that longer side."""
    rng, found = np.random.default_rng(0), []
    for path in sorted(folder.iterdir())[:24]:
        with Image.open(path) as opened:
            scale = long / max(opened.size)
            size = round(opened.width * scale), round(opened.height * scale)
            stream = io.BytesIO()
            opened.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=90)
        if min(size) >= SIDE:
            places = [(int(rng.integers(size[1] - SIDE + 1)), int(rng.integers(size[0] - SIDE + 1))) for _ in range(4)]
            found += [(stream.getvalue(), *place) for place in places]
    return found


def milliseconds(decode: Callable[[Window], np.ndarray], given: list[Window]) -> float:
    started = time.process_time()
    for window in given:
        decode(window)
    return 1000 * (time.process_time() - started) / len(given)


def main(folder: str) -> None:
    pyvips.cache_set_max(0)
    rows = []
    for long in (500, 2048):
        given = windows(Path(folder), long)
        assert all(np.array_equal(whole(window), in_part(window)) for window in given)
        pairs = [(milliseconds(whole, given), milliseconds(in_part, given)) for _ in range(ROUNDS)]
        ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
        name = f"CPU time for a window of {SIDE}x{SIDE}, {long} long"
        about = {"ours": ours, "unit": "ms", "peer": peer, "peer_name": "pyvips, in part", "ratio": ours / peer}
        rows.append({"group": "windows", "name": name, **about, "hardware": hardware()})
        print(rows[-1])
    TARGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
