"""What surrounds the step: saving, starting, and a second process."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from pipeline.training import checkpoint
from pipeline.training.checkpoint import Saver, TrainProgress
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime
from tests.benchmarks.measure import DEVICE, Row, seconds
from tests.conftest import ROOT, picture
from tests.support.ranks import free_port


def saving(folder: Path) -> Iterator[Row]:
    """How long training stands still for a checkpoint of the full GAN stage, against saving in its way."""
    runtime = Runtime()
    network = torch.nn.Linear(12_000, 14_500, bias=False)  # as many weights as synthesis and discriminator together
    trainable = runtime.trainable("network", network, AdamConfig(lr=1e-4), 10)
    trainable.backward(trainable.model(torch.ones(1, 12_000, device=DEVICE)).sum())
    trainable.update(0)
    saver = Saver(folder / "beside", keep=1, keep_every=None)
    stalls, whole = [], []
    for n in range(1, 4):
        stalls.append(saver.save(TrainProgress(n, n), runtime.state_dict(), needed=True))
        saver.wait()
        whole.append(
            seconds(lambda n=n: checkpoint.save(folder / "before", TrainProgress(n, n), runtime.state_dict(), 1))
        )
    size = sum(f.stat().st_size for f in (folder / "before").rglob("*") if f.is_file()) / 1e9
    yield Row(
        f"pause of training for a checkpoint of {size:.1f} GB (less is better)",
        statistics.median(stalls), "s", statistics.median(whole), "saving synchronously",
    )  # fmt: skip


def starting() -> Iterator[Row]:
    """From the command to the first step of a small run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = lambda *words: subprocess.run(
            [sys.executable, "-m", "pipeline", *words], cwd=folder, check=True, capture_output=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        (folder / "images").mkdir()
        for i in range(8):
            Image.fromarray(picture(i, 96, 96)).save(folder / "images" / f"{i}.png")
        run("shard", str(ROOT / "configs/smoke/shard.yaml"), "run=runs/smoke/shard", "source=images")
        words = ["vqvae", str(ROOT / "configs/smoke/vqvae.yaml"), "fit.steps=1"]
        times = []
        for i in range(3):
            started = time.perf_counter()
            run(*words, f"run=runs/v{i}")
            times.append(time.perf_counter() - started)
        yield Row("a stage of one step, from command to artifact (less is better)", statistics.median(times), "s")


PINNED = """
import os, sys, time
rank = int(os.environ.get("RANK", "0"))
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[rank % len(cores)]})
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.benchmarks import steps
steps.BATCH = dict.fromkeys(steps.BATCH, 2)
steps.CROP = 128
step = steps.OURS[sys.argv[2]]()
step()
times = []
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    step()
    times.append(time.perf_counter() - started)
if rank == 0:
    print("seconds", sorted(times)[len(times) // 2])
"""


def scaling() -> Iterator[Row]:
    """Several processes on a core each, as far as there are cores, against one process with its part of the batch."""
    cores = len(os.sched_getaffinity(0))
    for stage, count in (("gan", 5), ("pretrain", 5)):
        alone = _pinned(stage, count, 1, free_port())
        for processes in (2, 4):
            seconds = _pinned(stage, count, processes, free_port())
            used = min(processes, cores)
            yield Row(
                f"{stage} step, {processes} processes on {used} cores, 2 crops of 128x128 each", 2 * processes / seconds,
                "crops/s", 2 * used / alone, f"{used} times one process on one core",
            )  # fmt: skip


def _pinned(stage: str, count: int, processes: int, port: int) -> float:
    ranks = []
    for rank in range(processes):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if processes > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
            }
            env |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", PINNED, str(ROOT), stage, str(count)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    told = [rank.communicate()[0] for rank in ranks]
    return float(told[0].split("seconds")[1])


def rows() -> Iterator[Row]:
    folder = Path(tempfile.mkdtemp())
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    try:
        yield from saving(folder)
    finally:
        shutil.rmtree(folder)
    yield from starting()
    if DEVICE.type == "cpu":
        yield from scaling()
