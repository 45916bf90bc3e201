"""Training from shards, from start to end: speed, waiting for data, what saving costs, SIGTERM, and the resumed run's bits."""

import os
import signal
import tempfile
import time
from pathlib import Path

from tests.benchmarks.gpu_day.inputs import CONFIGS, checkpoint, differing, illm, networks, shards, speed, wait_for
from tests.benchmarks.gpu_day.rows import Result, Rows
from tests.benchmarks.measure import TINY

STEPS, EVERY = (24, 6) if TINY else (400, 100)
WORKERS = 0 if TINY else min(12, os.cpu_count() or 1)


def rows() -> Rows:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield "making what training reads", lambda: prepared(folder)
        for workers in sorted({min(4, WORKERS), WORKERS}):
            named = f"gan, bf16, {STEPS} steps from shards, {workers} loader threads"
            yield named, lambda n=workers: straight(folder, n)
        yield "stopped by SIGTERM and resumed", lambda: stopped(folder)


def prepared(folder: Path) -> Result:
    started = time.perf_counter()
    words = [f"data.shards={shards(folder)}", *networks(folder)]
    (folder / "words.txt").write_text("\n".join(words))
    return {"seconds": time.perf_counter() - started}


def words(folder: Path, run: str, workers: int) -> list[str]:
    small = [] if TINY else ["data.batch_size=16", "engine.precision=bf16"]
    cadence = [f"fit.steps={STEPS}", f"fit.log_every={EVERY // 2}", f"fit.validate_every={STEPS}"]
    return [
        str(CONFIGS / "gan.yaml"), f"run={run}", *(folder / "words.txt").read_text().split("\n"), *small, *cadence,
        f"fit.checkpoint_every={EVERY}", f"data.num_workers={workers}", "distortion.if_lpips_missing=skip",
    ]  # fmt: skip


def straight(folder: Path, workers: int) -> Result:
    started = time.perf_counter()
    illm(folder, "gan", *words(folder, f"straight-{workers}", workers)).ended()
    return {"seconds": time.perf_counter() - started} | speed(folder / f"straight-{workers}")


def stopped(folder: Path) -> Result:
    """SIGTERM after the first checkpoint: the code and the seconds until the end; and whether the same command, given once
    more, ends with the weights of the run that was not stopped."""
    command, run = words(folder, "stopped", WORKERS), folder / "stopped"
    running = illm(folder, "gan", *command)
    wait_for(lambda: checkpoint(run, EVERY), running)
    running.process.send_signal(signal.SIGTERM)
    leaving = running.ended(75, 0)
    code = running.process.returncode
    started = time.perf_counter()
    illm(folder, "gan", *command).ended()
    resumed = time.perf_counter() - started
    found: Result = {"code": code, "seconds_to_leave": leaving, "seconds_resumed": resumed}
    return found | differing(folder / f"straight-{WORKERS}", run)
