"""What a codec must fulfil to be promoted: alone, and against the champion on the same images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator
from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from pipeline.evaluation import comparison
from pipeline.evaluation.comparison import Difference, Interval
from pipeline.evaluation.measurement import Measurement
from pipeline.evaluation.metric_table import METRICS, TIMES

RELATIVE = (*METRICS, *TIMES)
# Images below which an interval says little
MIN_IMAGES = 8


class Gate(Config):
    """Bounds on one metric, inclusive; a bound or two, or a target with its tolerance."""

    at_least: float | None = None
    at_most: float | None = None
    target: PositiveFloat | None = None
    within_percent: PositiveFloat | None = None
    """Tolerance in percent of the target."""

    @model_validator(mode="after")
    def has_a_bound(self) -> "Gate":
        if (self.target is None) != (self.within_percent is None):
            raise ValueError("target and within_percent belong together")
        if self.at_least is None and self.at_most is None and self.target is None:
            raise ValueError("needs at_least, at_most, or target with within_percent")
        return self

    def holds(self, value: float) -> bool:
        return all(low <= value <= high for low, high in self._ranges())

    def _ranges(self) -> list[tuple[float, float]]:
        inf = float("inf")
        found = [(-inf if self.at_least is None else self.at_least, inf if self.at_most is None else self.at_most)]
        if self.target is not None and self.within_percent is not None:
            reach = self.target * self.within_percent / 100
            found.append((self.target - reach, self.target + reach))
        return found

    def __str__(self) -> str:
        bounds = [f">= {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"<= {self.at_most:g}"] if self.at_most is not None else []
        bounds += [f"{self.target:g} +- {self.within_percent:g} %"] if self.target is not None else []
        return " and ".join(bounds)


class RelativeGate(Config):
    """How much worse than the champion's the mean over the same images may be, with 95 % confidence.

    The gate holds if the whole interval of the difference is within the bound: noise counts against the candidate.
    """

    max_regression: float | None = None
    """Largest regression in the metric's unit; negative: it must be better by so much."""
    max_regression_percent: float | None = None
    """Largest regression in percent of the champion's mean."""

    @model_validator(mode="after")
    def has_one_bound(self) -> "RelativeGate":
        if (self.max_regression is None) == (self.max_regression_percent is None):
            raise ValueError("needs max_regression or max_regression_percent, and not both")
        return self

    def bound(self, theirs: float) -> float:
        """In the metric's unit."""
        if self.max_regression is not None:
            return self.max_regression
        return abs(theirs) * (self.max_regression_percent or 0.0) / 100

    def __str__(self) -> str:
        if self.max_regression is not None:
            return f"worse by <= {self.max_regression:g}"
        return f"worse by <= {self.max_regression_percent:g} %"


class BdRateGate(Config):
    """Bits at equal quality, between two families of codecs in the evaluation: at least two rates each."""

    ours: Annotated[tuple[str, ...], Field(min_length=2)]
    """Names of our codecs in the evaluation, one per rate."""
    theirs: Annotated[tuple[str, ...], Field(min_length=2)]
    quality: Literal["psnr_db", "ms_ssim"] = "psnr_db"
    at_most_percent: float = 0.0
    """Largest increase in bits with 95 % confidence; negative: it must need so many fewer."""


@dataclass(frozen=True)
class GateResult:
    """One gate and what came of it. holds: None if it cannot be judged, for instance since there is no champion yet."""

    # For instance "psnr_db" or "psnr_db against champion"
    gate: str
    value: str
    bound: str
    holds: bool | None

    def __str__(self) -> str:
        return f"{self.gate} is {self.value}, expected {self.bound}"


def own(gates: Mapping[str, Gate], values: Mapping[str, float], intervals: Mapping[str, Interval]) -> list[GateResult]:
    """Verdicts on the candidate alone; values has every metric that is gated."""
    return [
        GateResult(name, str(intervals.get(name, f"{values[name]:.4g}")), str(gate), gate.holds(values[name]))
        for name, gate in gates.items()
    ]


def against_champion(
    gates: Mapping[str, RelativeGate], found: Sequence[Difference], champion: str, num_images: int
) -> list[GateResult]:
    """Verdicts on the differences from the champion, a version; without one the gates are open."""
    by_name = {difference.metric: difference for difference in found}
    result = []
    for name, gate in gates.items():
        if not champion:
            result.append(GateResult(f"{name} against champion", "-", f"{gate} (no champion yet)", None))
            continue
        difference = by_name.get(name)
        if difference is None:
            result.append(GateResult(f"{name} against champion", "not measured", str(gate), False))
            continue
        few = f", {num_images} image(s) only" if num_images < MIN_IMAGES else ""
        told = f"{difference.ours:.4g} against {difference.theirs:.4g}: worse by {difference.worse_by}{few}"
        holds = difference.worse_by.high <= gate.bound(difference.theirs) + 1e-12
        result.append(GateResult(f"{name} against champion", told, str(gate), holds))
    return result


def bd_rate(gate: BdRateGate, measured: Mapping[str, Sequence[Measurement]]) -> GateResult:
    """Verdict on two families of codecs in an evaluation: name -> measurements in the order of the images."""
    ours, theirs = ([measured[name] for name in names] for names in (gate.ours, gate.theirs))
    found = comparison.bd_rate_interval(ours, theirs, gate.quality)
    bound = f"<= {gate.at_most_percent:g} %"
    if found is None:
        return GateResult(
            "BD-rate", f"not measured: {gate.quality} of the two families has no common range", bound, False
        )
    return GateResult("BD-rate", f"{found} %", bound, found.high <= gate.at_most_percent)


def print_table(title: str, verdicts: Sequence[GateResult]) -> None:
    """One row per gate."""
    table = Table(title=title)
    for heading in ("gate", "value", "bound", "holds"):
        table.add_column(heading)
    for verdict in verdicts:
        table.add_row(verdict.gate, verdict.value, verdict.bound, {True: "yes", False: "NO", None: "-"}[verdict.holds])
    Console(width=132).print(table)
