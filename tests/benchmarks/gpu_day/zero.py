"""DeepSpeed's ZeRO 1 and 2 with one process, against the same training without it."""

import importlib.util
import tempfile
import time
from pathlib import Path

from tests.benchmarks.gpu_day.inputs import CONFIGS, ROOT, differing, illm, networks, shards, speed
from tests.benchmarks.gpu_day.rows import LeftOut, Result, Rows
from tests.benchmarks.measure import CUDA, TINY

STEPS = 6 if TINY else 60


def rows() -> Rows:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage in (0, 1, 2):
            how = f"ZeRO {stage}, one process" if stage else "without ZeRO"
            yield f"gan, bf16, {STEPS} steps from shards, {how}", lambda stage=stage: run(folder, stage)


def run(folder: Path, stage: int) -> Result:
    """The run's speed and memory; and how far its weights are from those of the run without ZeRO."""
    if stage and importlib.util.find_spec("deepspeed") is None:
        raise LeftOut("deepspeed is not installed")
    listed = folder / "words.txt"
    if not listed.exists():
        listed.write_text("\n".join([f"data.shards={shards(folder)}", *networks(folder)]))
    small = [] if TINY else ["data.batch_size=16"]
    words = [
        "gan", CONFIGS / "gan.yaml", f"run={folder / f'zero{stage}'}", *listed.read_text().split("\n"), *small,
        f"fit.steps={STEPS}", f"fit.log_every={STEPS // 3}", f"fit.validate_every={STEPS}",
        f"fit.checkpoint_every={STEPS}", "engine.precision=bf16", "distortion.if_lpips_missing=skip",
    ]  # fmt: skip
    launcher = ["launch", "--config_file", ROOT / f"configs/launch/zero{stage}.yaml", "--num_processes", "1"]
    env = {} if CUDA else {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    illm(folder, *([*launcher, "-m", "pipeline"] if stage else []), *words, env=env).ended()
    found: Result = {"seconds": time.perf_counter() - started} | speed(folder / f"zero{stage}")
    return found | (differing(folder / "zero0", folder / f"zero{stage}") if stage else {})
