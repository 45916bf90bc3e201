"""What a person sees while a stage trains: a bar in a terminal, a line per `log_every` steps in a log, a trace on request."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.log import logger

# name of the metric -> how it is shown
SHOWN = {
    "train/loss": "loss {:.4g}",
    "train/bpp": "{:.3f} bpp",
    "train/psnr_db": "{:.2f} dB",
    "train/generator": "G {:.3f}",
    "train/discriminator": "D {:.3f}",
    "train/codes_used": "{:.0f} codes",
    "system/images_per_s": "{:.1f} img/s",
    "system/peak_memory_gb": "{:.1f} GB",
}
# Steps of a process before a trace begins: the first ones allocate and tune
TRACE_AFTER = 3


def format_metrics(metrics: dict[str, float]) -> str:
    """The metrics that matter, in one short line."""
    return " ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)


class ProgressDisplay:
    """Shows steps done, metrics, speed and time left on standard error; does nothing on ranks other than the main one."""

    def __init__(self, title: str, step: int, steps: int, enabled: bool):
        self.title, self.first, self.steps, self.enabled = title, step, steps, enabled
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[metrics]} {task.fields[speed]} left"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self.task = self.bar.add_task(title, total=steps, completed=step, metrics="", speed="")

    def __enter__(self) -> "ProgressDisplay":
        self.started = time.perf_counter()
        if self.enabled and self.first:
            self._line(f"resumed at step {self.first}")
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows training metrics."""
        per_step = (time.perf_counter() - self.started) / (step - self.first)
        speed = f"{1 / per_step:.2f} steps/s"
        self.bar.update(self.task, completed=step, metrics=format_metrics(metrics), speed=speed)
        if self.bar.disable:
            left = int(per_step * (self.steps - step))
            self._line(f"step {step}/{self.steps} {format_metrics(metrics)} {speed} left {left // 60}:{left % 60:02d}")

    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Shows validation metrics, on a line that stays."""
        listed = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._line(f"validated at step {step}: {listed}")

    def _line(self, text: str) -> None:
        if self.enabled:
            logger.info(f"{self.title}: {text}")


class ThroughputMeter:
    """How fast training goes, how long it waits for data, and how much memory it took at most."""

    def __init__(self, device: torch.device):
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self.started, self.num_samples, self.waited, self.away = time.perf_counter(), 0, 0.0, 0.0

    @contextmanager
    def not_training(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.away += time.perf_counter() - started

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def count(self, num_samples: int) -> None:
        self.num_samples += num_samples

    def take(self) -> dict[str, float]:
        """Rates since the last call. Samples of all processes; memory of this process: on the GPU, or else resident."""
        seconds = time.perf_counter() - self.started - self.away
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        metrics = {
            "system/images_per_s": self.num_samples / seconds,
            "system/data_wait_fraction": self.waited / seconds,
            "system/peak_memory_gb": peak / 1e9,
        }
        self._begin()
        return metrics


class Profiler:
    """Writes a trace of `num_steps` steps into the run folder, for chrome://tracing, Perfetto or TensorBoard."""

    def __init__(self, folder: Path, num_steps: int, step: int):
        self.folder, self.first, self.last = folder, step + TRACE_AFTER, step + TRACE_AFTER + num_steps
        self.profiler = torch.profiler.profile(record_shapes=True) if num_steps else None

    def after(self, step: int) -> None:
        """To be called after each step."""
        if self.profiler is None:
            return
        if step == self.first:
            self.profiler.start()
        if step == self.last:
            self.profiler.stop()
            target = self.folder / f"trace-step-{self.first}-{self.last}.json.gz"
            self.profiler.export_chrome_trace(str(target))
            costliest = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            logger.info(self.profiler.key_averages().table(sort_by=costliest, row_limit=12))
            logger.info(f"trace of steps {self.first + 1} to {self.last}: {target}; open it in https://ui.perfetto.dev")
            self.profiler = None
