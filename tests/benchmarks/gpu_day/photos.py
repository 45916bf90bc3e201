"""Photos through a codec and its measurements, with the GPU and without."""

import csv
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.bitstream.codec import ImageCodec
from pipeline.data import images
from tests.benchmarks.gpu_day.inputs import illm, networks, photos
from tests.benchmarks.gpu_day.measuring import wait
from tests.benchmarks.gpu_day.rows import Result, Rows
from tests.benchmarks.measure import DEVICE, TINY

COUNT = 2 if TINY else 8


def rows() -> Rows:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        networks(folder)
        photos(folder / "photos", COUNT)
        for where, device in {"the CPU": torch.device("cpu"), "this device": DEVICE}.items():
            yield f"compress and decompress, networks on {where}", lambda d=device: coded(folder, d)
        for where, env in {"with this device": {}, "on the CPU": {"CUDA_VISIBLE_DEVICES": ""}}.items():
            yield f"illm evaluate of {COUNT} photos, {where}", lambda e=env, w=where: evaluated(folder, e, w)


def coded(folder: Path, device: torch.device) -> Result:
    codec = ImageCodec.load(str(folder / "codec"), device)
    found = [images.decode(path).pixels for path in sorted((folder / "photos").iterdir())[:3]]
    megapixels = sum(pixels.shape[0] * pixels.shape[1] for pixels in found) / 1e6
    codec.decompress(codec.compress(found[0][:64, :64]))
    files: list[bytes] = []

    def seconds(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - started

    encoding = seconds(lambda: files.extend(codec.compress(pixels) for pixels in found))
    decoding = seconds(lambda: [codec.decompress(file) for file in files])
    return {
        "compress_s_per_megapixel": encoding / megapixels,
        "decompress_s_per_megapixel": decoding / megapixels,
        "bytes": sum(map(len, files)),
    }


def evaluated(folder: Path, env: dict[str, str], where: str) -> Result:
    run, config = folder / where.replace(" ", "-"), folder / "evaluate.yaml"
    config.write_text("stage: evaluate\nimages: photos\ncodecs: {codec: codec}\nanchors: []\n")
    started = time.perf_counter()
    illm(folder, "evaluate", config, f"run={run}", env=env).ended()
    seconds = time.perf_counter() - started
    totals = json.loads((run / "artifact/totals.json").read_text())["codec"]
    with (run / "artifact/per_image.csv").open(encoding="utf-8") as stream:
        each = list(csv.DictReader(stream))
    spent = {name: sum(float(row[name]) for row in each) for name in ("encode_seconds", "decode_seconds")}
    return {"seconds": seconds, **spent, **{name: totals[name] for name in ("bpp", "psnr_db")}}
