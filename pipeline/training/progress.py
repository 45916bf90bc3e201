"""What a person sees while a stage trains: a bar in a terminal, a line per `log_every` steps in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# name of the metric -> how it is shown
SHOWN = {
    "train/loss": "loss {:.4g}",
    "train/bpp": "{:.3f} bpp",
    "train/psnr_db": "{:.2f} dB",
    "train/generator": "G {:.3f}",
    "train/discriminator": "D {:.3f}",
    "train/codes_used": "{:.0f} codes",
}


def shown(metrics: dict[str, float]) -> str:
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
        speed = f"{1 / per_step:.2f}/s"
        self.bar.update(self.task, completed=step, metrics=shown(metrics), speed=speed)
        if self.bar.disable:
            left = int(per_step * (self.steps - step))
            self._line(f"step {step}/{self.steps} {shown(metrics)} {speed} left {left // 60}:{left % 60:02d}")

    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Shows validation metrics, on a line that stays."""
        listed = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._line(f"validated at step {step}: {listed}")

    def _line(self, text: str) -> None:
        if self.enabled:
            self.console.print(f"{self.title}: {text}", highlight=False, soft_wrap=True)
            sys.stderr.flush()
