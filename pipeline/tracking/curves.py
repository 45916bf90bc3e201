"""Curves of a training run, as a file that other runs are compared with, and where another run leaves them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import config
from pipeline.artifacts.run_folder import RECORDS
from pipeline.errors import ArtifactError
from pipeline.text import timestamp
from pipeline.tracking import provenance

# What says how well a run trains, not how fast
KINDS = ("train/", "val/")
# Windows of steps in which two curves are compared by their means
WINDOWS = 20
# Standard errors of a window's mean that are noise
NOISE = 4.0
# Fraction of the reference's range, after its first quarter, that is no departure
TOLERANCE = 0.1

Point = tuple[int, float]


class Curves(BaseModel):
    """A run's stage, configuration, how it was made, and metric -> (step, value) in the order of steps."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    config: dict[str, Any]
    made: dict[str, str]
    curves: dict[str, list[Point]]

    @field_validator("curves", mode="before")
    @classmethod
    def null_is_not_a_number(cls, curves: Any) -> Any:
        return {
            name: [(step, math.nan if v is None else v) for step, v in points] for name, points in dict(curves).items()
        }


@dataclass(frozen=True)
class Departure:
    """One metric of a run and its reference: means of the windows in which both have points, and those that are outside.

    steps: the middle of each window. outside: -1 below the reference, 1 above it, 0 within.
    """

    metric: str
    steps: list[int]
    ours: list[float]
    theirs: list[float]
    outside: list[int]

    @property
    def verdict(self) -> str:
        """In words: where the run last left the reference for two windows or more, and whether it came back."""
        if not all(map(math.isfinite, self.ours)):
            first = next(n for n, value in enumerate(self.ours) if not math.isfinite(value))
            return f"not a number from step {self.steps[first]} on"
        stretches = [list(group) for _, group in groupby(range(len(self.outside)), key=lambda n: self.outside[n])]
        # one window alone is a spike, unless there is no other
        away = [s for s in stretches if self.outside[s[0]] and (len(s) > 1 or len(self.outside) == 1)]
        if not away:
            return "as the reference"
        first, last = away[-1][0], away[-1][-1]
        side = "above" if self.outside[first] > 0 else "below"
        gap = f"{self.ours[first]:.4g} there, {self.theirs[first]:.4g} in the reference"
        if last == len(self.outside) - 1:
            return f"{side} from step {self.steps[first]} on: {gap}"
        return f"{side} at step {self.steps[first]}: {gap}; back at step {self.steps[last + 1]}"


def of_run(folder: Path) -> Curves:
    """The curves of a run folder, from its records. Raises: ArtifactError if there are none."""
    path = folder / RECORDS
    if not path.is_file():
        raise ArtifactError(f"{folder}: expected a run folder with {RECORDS}; name the folder that run= named")
    found: dict[str, dict[int, float]] = {}
    values: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            # a line that is being written
            continue
        if record["kind"] == "params":
            values |= record["params"]
        elif record["kind"] == "metrics":
            for name, value in record["metrics"].items():
                if name.startswith(KINDS):
                    # a resumed run repeats some steps: the last value counts
                    found.setdefault(name, {})[record["step"]] = value
    if not found:
        raise ArtifactError(f"{folder}: has recorded no {' or '.join(KINDS)} metric yet; train first")
    made = _made(folder) | {"written": timestamp()}
    return Curves(
        stage=str(values.get("stage", "")),
        config=values,
        made=made,
        curves={n: sorted(p.items()) for n, p in found.items()},
    )


def _made(folder: Path) -> dict[str, str]:
    """Command, code, machine and packages of the first attempt; nothing of a run of an earlier version."""
    files = sorted((folder / "provenance").glob(f"*/{provenance.ABOUT}"))
    about = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    wanted = ("command", "code", "machine", "packages", "mlflow.source.git.commit")
    return {name.removeprefix("mlflow.source."): about[name] for name in wanted if name in about}


def read(path: Path) -> Curves:
    """A file that `as_json` made. Raises: ArtifactError."""
    try:
        return Curves.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not curves of a run"
        raise ArtifactError(f"{path}: {why}; `illm export-run` makes such a file") from None


def of(name: str) -> Curves:
    """The curves of a run folder or of a file. Raises: ArtifactError."""
    return of_run(Path(name)) if Path(name).is_dir() else read(Path(name))


def as_json(curves: Curves) -> str:
    """One line per metric, so that versions of the file can be compared."""
    head = curves.model_dump(exclude={"curves"})
    # JSON has no numbers that are not finite
    finite = {name: [(s, v if math.isfinite(v) else None) for s, v in points] for name, points in curves.curves.items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(points)}" for name, points in sorted(finite.items())]
    return json.dumps(head, indent=1)[:-2] + ',\n "curves": {\n' + ",\n".join(lines) + "\n }\n}\n"


def compare(ours: Curves, theirs: Curves) -> list[Departure]:
    """Every metric that both have, on the steps that both have. Raises: ArtifactError if they are of different stages."""
    if ours.stage != theirs.stage:
        raise ArtifactError(
            f"a {ours.stage} run cannot be compared with a {theirs.stage} run; name two of the same stage"
        )
    shared = [name for name in theirs.curves if name in ours.curves]
    return [found for name in shared if (found := _compare(name, ours.curves[name], theirs.curves[name])) is not None]


def _compare(metric: str, ours: Sequence[Point], theirs: Sequence[Point]) -> Departure | None:
    a, b = (np.array(points, np.float64) for points in (ours, theirs))
    last = min(a[-1, 0], b[-1, 0])
    first = max(a[0, 0], b[0, 0])
    edges = np.linspace(first, last, WINDOWS + 1) if last > first else np.array([first, first])
    edges[-1] += 1
    noise = [_noise(points[:, 1]) for points in (a, b)]
    band = TOLERANCE * _range(b)
    found = Departure(metric, [], [], [], [])
    for low, high in pairwise(edges):
        x, y = (points[(points[:, 0] >= low) & (points[:, 0] < high), 1] for points in (a, b))
        if not len(x) or not len(y):
            continue
        gap = float(x.mean() - y.mean())
        error = NOISE * (noise[0] ** 2 / len(x) + noise[1] ** 2 / len(y)) ** 0.5
        found.steps.append(round((low + high - (high == edges[-1])) / 2))
        found.ours.append(float(x.mean()))
        found.theirs.append(float(y.mean()))
        found.outside.append(0 if abs(gap) <= max(band, error) else 1 if gap > 0 else -1)
    return found if found.steps else None


def _noise(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Standard deviation around a trend, from differences of successive values; robust against single spikes."""
    return float(1.4826 * np.median(np.abs(np.diff(values))) / 2**0.5) if len(values) > 2 else 0.0


def _range(points: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """How far the curve goes after its first quarter; of a constant one, half its value."""
    late = points[points[:, 0] >= points[0, 0] + (points[-1, 0] - points[0, 0]) / 4, 1]
    return float(np.ptp(late)) or float(np.abs(late).max()) / 2


def as_text(ours: Curves, theirs: Curves, name: str, reference: str) -> str:
    """For people: keys that differ, and a table with one line per metric."""
    found = compare(ours, theirs)
    if not found:
        raise ArtifactError(f"{name}: has no metric at steps that {reference} has too; train longer")
    title = escape(f"{name} and {reference}, up to step {max(d.steps[-1] for d in found)}")
    table = Table(title=title)
    for heading in ("metric", "this run", "reference", "verdict"):
        table.add_column(heading)
    for departure in found:
        ends = (f"{departure.ours[-1]:.4g}", f"{departure.theirs[-1]:.4g}")
        table.add_row(departure.metric, *ends, departure.verdict)
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table)
    plain = [{k: str(v) for k, v in curves.config.items()} for curves in (ours, theirs)]
    unlike = config.differences(*plain)
    return "\n".join([*(f"differs: {line}" for line in unlike), captured.get().rstrip()])
