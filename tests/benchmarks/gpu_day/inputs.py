"""What steps that run whole commands need: photos, shards, networks with random weights, and a way to run `illm`."""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest
from pipeline.models import initial, serialization
from pipeline.models.codec import Codec
from pipeline.models.labeler import Labeler
from pipeline.training.checkpoint import MANIFEST, path_of
from tests.benchmarks import steps
from tests.benchmarks.measure import CUDA, TINY
from tests.benchmarks.short_runs import recorded

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / ("smoke" if TINY else "")
# Number, width and height of the photos that are made where none are given
PHOTOS = (12, 128, 96) if TINY else (400, 1024, 768)


def photos(folder: Path, count: int = PHOTOS[0]) -> Path:
    """Smooth random pictures with some noise, as JPEG."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PHOTOS[1:], Image.Resampling.BICUBIC)).astype(np.int16)
        grainy = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{number:04}.jpg", quality=92)
    return folder


def shards(folder: Path) -> Path:
    """The run folder SHARDS, or one made of pictures."""
    if given := os.environ.get("SHARDS"):
        return Path(given).resolve()
    photos(folder / "photos")
    words = [ROOT / "configs/smoke/shard.yaml", "run=shard", "source=photos", "shard_mb=16"]
    illm(folder, "shard", *words).ended()
    return folder / "shard"


def networks(folder: Path) -> list[str]:
    """Publishes a codec and a labeler with random weights, at the size of `steps`; returns the words that name them."""
    torch.manual_seed(0)
    codec, labeler = Codec(steps.CODEC), Labeler(steps.LABELER)
    initial.he_codec(codec)
    codec.update_tables()
    save = partial(serialization.save_codec, codec=codec, cfg=codec.cfg)
    publish(folder / "codec/artifact", Manifest(kind="codec", stage="pretrain"), save)
    save_labeler = partial(serialization.save, module=labeler, cfg=labeler.cfg)
    publish(folder / "labeler/artifact", Manifest(kind="labeler", stage="vqvae"), save_labeler)
    return [f"codec={folder / 'codec'}", f"labeler={folder / 'labeler'}"]


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    store = f"sqlite:///{folder}/mlflow.db"
    return os.environ | {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": store, "PYTHONWARNINGS": "ignore"} | (more or {})


@dataclass
class Running:
    """A command that was started, and the file of what it says."""

    process: subprocess.Popen[bytes]
    told: Path

    def ended(self, *expected: int) -> float:
        """Seconds that its end took to come. Raises: RuntimeError if its code is not 0, or none of those expected."""
        started = time.perf_counter()
        code = self.process.wait()
        if code not in (expected or (0,)):
            last = self.told.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"code {code}: {''.join(last)[-200:]}")
        return time.perf_counter() - started


def start(folder: Path, *words: object, env: Mapping[str, str] | None = None) -> Running:
    """Starts `python words` in `folder`."""
    told = folder / f"{len(list(folder.glob('*.log')))}.log"
    with told.open("wb") as stream:
        command = [sys.executable, *map(str, words)]
        environ = environment(folder, env)
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=stream, stderr=subprocess.STDOUT)
    return Running(process, told)


def illm(folder: Path, *words: object, env: Mapping[str, str] | None = None) -> Running:
    return start(folder, "-m", "pipeline", *words, env=env)


def wait_for(found: Callable[[], object], running: Running, limit: float = 200) -> None:
    """Raises: RuntimeError if the command ends first, or it takes too long."""
    deadline = time.monotonic() + limit
    while not found():
        if running.process.poll() is not None or time.monotonic() > deadline:
            running.process.kill()
            running.ended(-signal.SIGKILL)
            raise RuntimeError("it ended, or took too long, before what was waited for")
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def checkpoint(run: Path, step: int) -> bool:
    """Whether a run has saved that step."""
    return (path_of(run, step) / MANIFEST).is_file()


def speed(run: Path) -> dict[str, object]:
    """How fast a run trained after its first log lines, how long it waited for data, and what saving cost."""
    seen = recorded(run)
    found: dict[str, object] = {
        "images_per_s": statistics.median(seen["system/images_per_s"][1:] or seen["system/images_per_s"]),
        "data_wait_fraction": statistics.median(seen["system/data_wait_fraction"]),
        "longest_stall_s": max(seen.get("system/checkpoint_stall_s", [0.0])),
    }
    return found | ({"peak_gb": max(seen["system/peak_memory_gb"])} if CUDA else {})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact/weights.safetensors")


def differing(ours: Path, theirs: Path) -> dict[str, object]:
    """How many tensors of two published networks differ, and by how much at most, in parts of the tensor's norm."""
    a, b = weights(ours), weights(theirs)
    apart = [
        float((a[name].double() - b[name].double()).norm() / a[name].double().norm().clamp_min(1e-12)) for name in a
    ]
    return {"tensors": len(a), "differ": sum(not torch.equal(a[name], b[name]) for name in a), "relative": max(apart)}
