"""DDP on one GPU: several ranks over gloo, straight, and with one that is killed; and the GAN step behind DDP over NCCL."""

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pipeline.training import engines
from pipeline.training.engine_config import EngineConfig
from pipeline.training.engines import Trainable
from tests.benchmarks.gpu_day.inputs import (
    ROOT,
    Running,
    checkpoint,
    differing,
    free_port,
    shards,
    speed,
    start,
    wait_for,
)
from tests.benchmarks.gpu_day.measuring import crops, made, timed
from tests.benchmarks.gpu_day.rows import Result, Rows
from tests.benchmarks.measure import CUDA, DEVICE, TINY

RANKS = 2 if TINY else 4
STEPS, EVERY = (60, 20) if TINY else (200, 50)


def rows() -> Rows:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield f"pretrain of smoke networks, {RANKS} ranks on one GPU over gloo", lambda: straight(folder)
        yield "one rank killed and the same command given again", lambda: killed(folder)
    backend = "NCCL" if CUDA else "gloo"
    for how in ("plain", f"DDP with one rank over {backend}"):
        yield f"gan step, bf16, {how}", lambda how=how: step(how)


def together(folder: Path, run: str) -> list[Running]:
    port = str(free_port())
    every = [f"fit.steps={STEPS}", f"fit.checkpoint_every={EVERY}", f"fit.log_every={EVERY}", "fit.validate_every=1000"]
    words = ["pretrain", ROOT / "configs/smoke/pretrain.yaml", f"run={run}", "data.shards=shard", "data.batch_size=8"]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"}
    # LOCAL_RANK counts GPUs here, of which there is one
    common |= {} if CUDA else {"ACCELERATE_USE_CPU": "true"}
    module = ["-m", "tests.benchmarks.gpu_day.rank"]
    return [start(folder, *module, *words, *every, env=common | {"RANK": str(n)}) for n in range(RANKS)]


def straight(folder: Path) -> Result:
    reading = shards(folder)
    if reading != folder / "shard":
        (folder / "shard").symlink_to(reading)
    started = time.perf_counter()
    for rank in together(folder, "straight"):
        rank.ended()
    return {"seconds": time.perf_counter() - started} | speed(folder / "straight")


def killed(folder: Path) -> Result:
    """Seconds until the others end after one was killed; whether a second start ends with the straight run's weights."""
    ranks, run = together(folder, "killed"), folder / "killed"
    wait_for(lambda: checkpoint(run, EVERY), ranks[0])
    ranks[-1].process.send_signal(signal.SIGKILL)
    started = time.perf_counter()
    codes = [rank.process.wait() for rank in ranks]
    noticed = time.perf_counter() - started
    for rank in together(folder, "killed"):
        rank.ended()
    return {"seconds_until_noticed": noticed, "codes": str(codes)} | differing(folder / "straight", run)


def step(how: str) -> Result:
    """Behind DDP as with several ranks, its hooks and buckets included; the other ranks are missing."""
    engine = EngineConfig(precision="bf16", deterministic=False)
    if how == "plain":
        return timed(made("gan", crops("gan"), engine), crops("gan"))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    dist.init_process_group("nccl" if CUDA else "gloo", rank=0, world_size=1)
    plain = Trainable._wrap
    Trainable._wrap = behind_ddp  # type: ignore[method-assign]
    try:
        return timed(made("gan", crops("gan"), engine), crops("gan"))
    finally:
        Trainable._wrap = plain  # type: ignore[method-assign]
        dist.destroy_process_group()


def behind_ddp(self: Trainable, accelerator: Any) -> None:
    devices = [DEVICE.index or 0] if CUDA else None
    self._engine = DistributedDataParallel(
        self.module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    self._callable = self._engine
    engines._settle_buckets(self._engine, list(self.trained.values()))
