"""Memory and time of one large image at the published size: python -m tests.benchmarks.memory WIDTH HEIGHT [small].

The codec is random, the image is of smooth noise. Each direction runs in a process of its own; "grown" is what it needs beyond the
loaded codec. `small`: a codec of configs/small instead.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import Pixels
from pipeline.models.codec import Codec, CodecConfig
from tests.benchmarks.coding import spread
from tests.benchmarks.evaluation import SMALL


def noise(width: int, height: int) -> Pixels:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(direction: str, width: int, height: int, small: bool, file: Path) -> None:
    torch.manual_seed(0)
    codec = ImageCodec(spread(Codec(SMALL if small else CodecConfig()), noise(256, 256)))
    pixels = noise(width, height) if direction == "compress" else None
    before, started = resident(), time.perf_counter()
    if pixels is not None:
        file.write_bytes(codec.compress(pixels))
    else:
        assert codec.decompress(file.read_bytes()).shape == (height, width, 3)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {
        "direction": direction,
        "size": f"{width}x{height}",
        "megapixels": round(width * height / 1e6, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(peak / 2**30, 2),
        "grown_gib": round((peak - before) / 2**30, 2),
        "estimated_gib": round(codec.memory_bytes(height, width) / 2**30, 2),
        "bytes": file.stat().st_size,
    }
    print(json.dumps(told), flush=True)


def main(width: int, height: int, small: bool) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for direction in ("compress", "decompress"):
            process = context.Process(target=work, args=(direction, width, height, small, Path(folder) / "a.illm"))
            process.start()
            process.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "small" in sys.argv[3:])
