"""fit(): the one training loop. It knows *when*; the task it trains knows *what*."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from pydantic import PositiveInt
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.errors import Preempted, TrainingError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Progress
from pipeline.training.progress import ProgressDisplay
from pipeline.training.runtime import Runtime

Log = Callable[[int, dict[str, float]], None]


class FitConfig(Config):
    """How long, and how often. A step is one optimizer update of the main network."""

    steps: PositiveInt
    log_every: PositiveInt = 100
    validate_every: PositiveInt = 10_000
    checkpoint_every: PositiveInt = 5_000
    keep_checkpoints: PositiveInt = 2


class Task(Protocol):
    """What is trained. Metrics are means over the batch, on the device; `validate` returns the same on every rank."""

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]: ...
    def validate(self) -> dict[str, float]: ...
    def export(self, folder: Path) -> None: ...


def fit(
    task: Task, batches: Callable[[int], Iterator[Batch]], runtime: Runtime, folder: Path, cfg: FitConfig, log: Log
) -> dict[str, float]:
    """Trains `task` to `cfg.steps`, resuming from `folder` if it holds a checkpoint; returns the last validation.

    `batches(start)` is the stream from the sample at `start`.
    Raises: Preempted after SIGTERM or SIGUSR2; TrainingError if a metric is no longer finite.
    """
    progress = Progress(step=0, samples=0)
    if (found := checkpoint.restore(folder)) is not None:
        progress, state = found
        runtime.load_state_dict(state)
    stream = batches(progress.samples)
    window = Window(runtime)
    validated: dict[str, float] = {}
    with (
        stop_signals() as stop_requested,
        ProgressDisplay(folder.name, progress.step, cfg.steps, runtime.is_main) as display,
    ):
        while progress.step < cfg.steps:
            batch = runtime.place_batch(next(stream))
            window.add(task.train_step(batch, progress.step))
            step = progress.step + 1
            progress = Progress(step, progress.samples + len(batch.positions) * runtime.num_processes)

            due = step % cfg.log_every == 0 or step == cfg.steps
            stopping = stop_requested() if runtime.num_processes == 1 else due and runtime.any_rank(stop_requested())
            saving = stopping or step % cfg.checkpoint_every == 0 or step == cfg.steps
            if due or saving:
                metrics = window.take(step)
                log(step, metrics)
                display.update(step, metrics)
            if step % cfg.validate_every == 0 or step == cfg.steps:
                validated = task.validate()
                log(step, validated)
                display.note(step, validated)
            if saving:
                runtime.on_main(partial(save_checkpoint, runtime, folder, progress, cfg.keep_checkpoints))
            if stopping:
                raise Preempted(step)
    return validated or task.validate()


def save_checkpoint(runtime: Runtime, folder: Path, progress: Progress, keep: int) -> None:
    checkpoint.save(folder, progress, runtime.state_dict(), keep)


class Window:
    """Sums of metrics since they were last taken, kept on the device."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.sums = {name: self.sums[name] + value if self.count else value for name, value in metrics.items()}
        self.count += 1

    def take(self, step: int) -> dict[str, float]:
        """Averages over steps and processes. Raises: TrainingError if one is not finite."""
        means = self.runtime.means(self.sums, self.count)
        bad = {name: value for name, value in means.items() if not math.isfinite(value)}
        if bad:
            listed = ", ".join(f"{name}={value}" for name, value in bad.items())
            raise TrainingError(
                f"{listed} within the {self.count} steps before step {step}; the last good checkpoint is kept. "
                "A lower optimizer.lr in a new run= usually mends this"
            )
        self.sums, self.count = {}, 0
        return means


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM and SIGUSR2 only raise a flag; gives a function that reads the flag."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    wanted = (signal.SIGTERM, signal.SIGUSR2)
    try:
        before = {number: signal.signal(number, remember) for number in wanted}
    except ValueError:  # not in the main thread, for instance in a Ray trial: the host handles signals
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
