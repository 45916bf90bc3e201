"""fit(): the one training loop. It knows *when*; the task it trains knows *what*."""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from pipeline.config import Changeable, Config
from pipeline.data.batch import Batch
from pipeline.errors import Preempted, TrainingError
from pipeline.processes.signals import stop_signals
from pipeline.storage import disk
from pipeline.training import checkpoint
from pipeline.training.checkpoint import TrainProgress
from pipeline.training.metrics import MetricAverager
from pipeline.training.progress import Profiler, ProgressDisplay, ThroughputMeter
from pipeline.training.runtime import REMEDY, Runtime

Log = Callable[[int, dict[str, float]], None]


class FitConfig(Config):
    """How long, and how often. A step is one optimizer update of the main network."""

    steps: PositiveInt
    """Number of training steps."""
    log_every: Annotated[PositiveInt, Changeable()] = 100
    """Steps between two log lines."""
    validate_every: PositiveInt = 10_000
    """Steps between two validations."""
    checkpoint_every: Annotated[PositiveInt, Changeable()] = 5_000
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[PositiveInt, Changeable()] = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Annotated[PositiveInt | None, Changeable()] = None
    """Checkpoints at multiples of so many steps are kept, too."""
    max_skipped_steps: Annotated[NonNegativeInt, Changeable()] = 10
    """Number of steps in a row that may be skipped because they are not finite; more stop the stage."""
    accept_new_batch_size: Annotated[bool, Changeable()] = False
    """Resume with another data.batch_size than the run began with."""
    profile_steps: Annotated[NonNegativeInt, Changeable()] = 0
    """Write a profiler trace of so many steps, a few steps after the start; 0: none."""


class Task(Protocol):
    """What is trained. Metrics are means over the batch, on the device; `validate` returns the same on every rank."""

    def train_step(self, parts: list[Batch], step: int) -> dict[str, Tensor]: ...
    def validate(self) -> dict[str, float]: ...
    def export(self, folder: Path) -> None: ...


def fit(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    runtime: Runtime,
    folder: Path,
    cfg: FitConfig,
    log: Log,
    still_ours: Callable[[], None] = lambda: None,
    show: Callable[[int], None] = lambda _step: None,
) -> dict[str, float]:
    """Trains `task` to `cfg.steps`, resuming from `folder` if it holds a checkpoint; returns the last validation.

    `batches(start)` is the stream from the sample at `start`; `still_ours()` raises if the folder must not be written
    any more, and is asked on the main process before each checkpoint. `show(step)` is called after each validation.
    Raises: Preempted after a signal of `STOP_SIGNALS`; TrainingError if too many steps in a row, a weight or a validation
    are not finite; what `still_ours` raises.
    """
    progress = _resumed(runtime, folder)
    stream = batches(progress.samples)
    averager, meter = MetricAverager(runtime, cfg.max_skipped_steps), ThroughputMeter(runtime.device)
    profiler = Profiler(folder, cfg.profile_steps if runtime.is_main else 0, progress.step)
    validated: dict[str, float] = {}
    with (
        stop_signals() as stop_requested,
        ProgressDisplay(folder.name, progress.step, cfg.steps, runtime.is_main) as display,
        checkpoint.Saver(folder, cfg.keep_checkpoints, cfg.keep_every) as saver,
        runtime.control.leaving_on_error(),
    ):
        while progress.step < cfg.steps:
            with meter.waiting_for_data():
                batch = next(stream)
            averager.add(task.train_step(runtime.place_batch(batch), progress.step))
            num_samples = len(batch.positions) * runtime.num_processes
            progress = TrainProgress(step := progress.step + 1, progress.samples + num_samples)
            meter.count(num_samples)
            profiler.after(step)
            ending = step == cfg.steps
            stopping = runtime.control.any_rank(stop_requested())
            saving = stopping or ending or step % cfg.checkpoint_every == 0
            if saving or step % cfg.log_every == 0:
                metrics = averager.take(step) | meter.take()
                log(step, metrics)
                display.update(step, metrics)
            with meter.not_training():
                if step % cfg.validate_every == 0 or ending:
                    validated = _validate(task, step)
                    log(step, validated)
                    show(step)
                    display.note(step, validated)
                if saving and (averager.sound or stopping or ending):
                    runtime.on_main(still_ours)
                    log(step, {"system/checkpoint_stall_s": _save(runtime, saver, progress, stopping or ending)})
            if stopping and not ending:
                raise Preempted(step)
    return validated or _validate(task, progress.step)


def _validate(task: Task, step: int) -> dict[str, float]:
    """The metrics of a validation, the same on every process. Raises: TrainingError if it is not finite."""
    validated = task.validate()
    if wrong := [name for name, value in validated.items() if not math.isfinite(value)]:
        raise TrainingError(
            f"validation at step {step}: {', '.join(wrong)} not finite; nothing was written, the previous checkpoint is kept. "
            f"{REMEDY}"
        )
    return validated


def _save(runtime: Runtime, saver: checkpoint.Saver, progress: TrainProgress, last: bool) -> float:
    """Begins to save, and waits for the last one to complete; returns how long training was blocked, in s."""
    runtime.check_weights(progress.step)
    # the others wait for the main process over the CPU, where that may take long
    stall = runtime.on_main(partial(saver.save, progress, runtime.state_dict(), needed=last))
    if last:
        runtime.on_main(saver.wait)
    return stall


def _resumed(runtime: Runtime, folder: Path) -> TrainProgress:
    """Where training resumes, after loading the state of that moment."""
    if (found := _newest_checkpoint(runtime, folder)) is None:
        return TrainProgress(step=0, samples=0)
    progress, state = found
    runtime.load_state_dict(state)
    return progress


def _newest_checkpoint(runtime: Runtime, folder: Path) -> tuple[TrainProgress, dict[str, Any]] | None:
    """The one that the main process sees, on every process: a shared folder may show it to some of them later."""
    found = checkpoint.restore(folder) if runtime.is_main else None
    step = runtime.on_main(lambda: found[0].step if found else None)
    if runtime.is_main or step is None:
        return found
    disk.wait_for_file(checkpoint.path_of(folder, step) / checkpoint.MANIFEST)
    if (found := checkpoint.restore(folder, step)) is None:
        raise TrainingError(
            f"{folder}: process {runtime.rank} on {os.uname().nodename} cannot read the checkpoint of step {step} that the main "
            "process found; all nodes need to see the run folder"
        )
    return found
