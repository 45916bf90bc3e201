"""fit(): the one training loop. It knows *when*; the task it trains knows *what*."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.errors import NO_SPACE, Preempted, TrainingError
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
    keep_checkpoints: PositiveInt = 2  # the newest ones
    keep_every: PositiveInt | None = None  # and those at multiples of so many steps
    max_bad_steps: NonNegativeInt = 10  # steps in a row whose values are not finite; more stop the stage


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
    Raises: Preempted after SIGTERM or SIGUSR2; TrainingError if too many steps in a row are not finite.
    """
    progress = Progress(step=0, samples=0)
    if (found := checkpoint.restore(folder)) is not None:
        progress, state = found
        runtime.load_state_dict(state)
    stream = batches(progress.samples)
    window = Window(runtime, cfg.max_bad_steps)
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
                needed = stopping or step == cfg.steps
                runtime.on_main(partial(save_checkpoint, runtime, folder, progress, cfg, needed))
            if stopping:
                raise Preempted(step)
    return validated or task.validate()


def save_checkpoint(runtime: Runtime, folder: Path, progress: Progress, cfg: FitConfig, needed: bool) -> None:
    """Saves, and trains on where that fails for want of space, unless this is the last chance."""
    try:
        checkpoint.save(folder, progress, runtime.state_dict(), cfg.keep_checkpoints, cfg.keep_every)
    except OSError as error:
        if needed or error.errno not in NO_SPACE:
            raise
        print(
            f"no checkpoint at step {progress.step}: {error.strerror}; training goes on, the one before is kept. "
            f"Free some space for {folder}",
            file=sys.stderr,
        )


class Window:
    """Sums of metrics since they were last taken, kept on the device; values that are not finite are left out.

    A step with such a value is a bad one: its update changed nothing (Trainable.update).
    """

    def __init__(self, runtime: Runtime, max_bad_steps: int):
        self.runtime, self.max_bad_steps = runtime, max_bad_steps
        self.bad_row = torch.zeros((), device=runtime.device)  # bad steps in a row until now
        self.count = 0

    @torch.no_grad()
    def add(self, metrics: dict[str, Tensor]) -> None:
        """Takes the metrics of one step; their names are the same at every step."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        finite = values.isfinite()
        if not self.count:
            self.names = tuple(metrics)
            self.sums, self.finite = torch.zeros_like(values), torch.zeros_like(values)
            self.bad_steps, self.longest_row = torch.zeros_like(self.bad_row), torch.zeros_like(self.bad_row)
        self.sums += torch.where(finite, values, 0)
        self.finite += finite
        is_bad = (~finite.all()).float()
        self.bad_row = (self.bad_row + 1) * is_bad
        self.bad_steps += is_bad
        self.longest_row = torch.maximum(self.longest_row, self.bad_row)
        self.count += 1

    def take(self, step: int) -> dict[str, float]:
        """Averages over steps and processes. The only place that waits for the device.

        Raises: TrainingError if more steps in a row were bad than allowed.
        """
        ours = torch.cat([self.sums, self.finite, self.bad_steps[None], self.longest_row[None]])
        everyones = self.runtime.gather(ours[None])  # (processes, 2 names + 2)
        sums, finite = everyones[:, :-2].sum(0).reshape(2, -1).tolist()
        bad_steps, longest = (int(n) for n in everyones[:, -2:].amax(0))
        expected = self.count * len(everyones)
        blamed = ", ".join(name for name, count in zip(self.names, finite, strict=True) if count < expected)
        if longest > self.max_bad_steps:
            raise TrainingError(
                f"{blamed}: not finite for {longest} steps in a row before step {step}. Those steps changed no weight, and "
                "the last good checkpoint is kept. A lower optimizer.lr in a new run= usually mends this"
            )
        means = {name: s / n for name, s, n in zip(self.names, sums, finite, strict=True) if n}
        if bad_steps and self.runtime.is_main:
            print(f"skipped {bad_steps} of {self.count} steps before step {step}: {blamed} not finite", file=sys.stderr)
        self.count = 0
        return means | ({"train/skipped_steps": float(bad_steps)} if bad_steps else {})


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
