"""Means of metrics over the steps between two log lines, kept on the device."""

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.log import logger
from pipeline.training.runtime import REMEDY, Runtime

OR_SPIKES = ", or a spike where skip_grad_spikes is set"


class MetricAverager:
    """Sums of metrics since they were last taken, kept on the device; values that are not finite are left out.

    A step with such a value is a bad one: its update changed nothing (Trainable.update). `sound` is whether the last
    step before metrics were taken was a good one: within a row of bad ones the weights may be corrupted already, though finite.
    """

    def __init__(self, runtime: Runtime, max_skipped_steps: int):
        self.runtime, self.max_skipped_steps = runtime, max_skipped_steps
        # Bad steps in a row until now
        self.bad_row = torch.zeros((), device=runtime.device)
        self.count, self.sound = 0, True

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
        ours = torch.cat([self.sums, self.finite, torch.stack([self.bad_steps, self.longest_row, self.bad_row])])
        everyones = self.runtime.gather(ours[None]).cpu()  # (processes, 2 names + 3)
        sums, finite = everyones[:, :-3].sum(0).reshape(2, -1).tolist()
        bad_steps, longest, row = (int(n) for n in everyones[:, -3:].amax(0))
        self.sound = not row
        expected = self.count * len(everyones)
        blamed = ", ".join(name for name, count in zip(self.names, finite, strict=True) if count < expected)
        if longest > self.max_skipped_steps:
            raise TrainingError(
                f"{longest} steps in a row before step {step} had to be skipped: {blamed} not finite{OR_SPIKES}. Their updates "
                f"were refused, and the last checkpoint from before them is kept. {REMEDY}"
            )
        means = {name: s / n for name, s, n in zip(self.names, sums, finite, strict=True) if n}
        if bad_steps:
            logger.warning(
                f"skipped {bad_steps} of {self.count} steps before step {step}: {blamed} not finite{OR_SPIKES}"
            )
        self.count = 0
        return means | ({"train/skipped_steps": float(bad_steps)} if bad_steps else {})
