"""Optimizers, learning rates, the guard against bad updates, and averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from pipeline.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]
# Updates before the running mean of the gradient's norm means something
GUARD_AFTER = 100
# Decay of the gradient norm's running mean
GUARD_DECAY = 0.99


class AdamConfig(Config):
    """AdamW, its learning-rate schedule and the bounds on its gradient."""

    lr: PositiveFloat
    """Learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the gradient moments."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps in which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the steps; cosine: a quarter period over the stage's steps, as published."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest 2-norm of the gradient over the whole network; larger ones are scaled down."""
    skip_grad_spikes: Annotated[float, Field(gt=1)] | None = None
    """Skip updates whose gradient norm is so many times the usual one; null: none."""


def adam(module: nn.Module, cfg: AdamConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    # fused: fastest on both kinds of device, and the only kind that can skip a step without asking the device first
    return torch.optim.AdamW(wanted, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)


def learning_rate(cfg: AdamConfig, step: int, total_steps: int) -> float:
    """The rate for the update that follows `step` finished ones: a pure function, so nothing needs saving.

    Source: cosine as in Muckley et al. 2023: cos(pi / 2 * (step - warmup) / total_steps).
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        return cfg.lr * math.cos(math.pi / 2 * (step - cfg.warmup_steps) / total_steps)
    return cfg.lr


class GradientGuard:
    """Decides on the device, without anybody waiting for it, whether an update is to be skipped.

    Skipped are gradients that are not finite and, with `skip_grad_spikes`, those whose norm is so many times the running
    geometric mean of earlier norms. A spike counts as the bound itself in that mean, so a lasting change is accepted
    after a while. The norm is the same on every process, and so is the verdict.
    """

    def __init__(self, skip_grad_spikes: float | None, device: torch.device):
        self.log_factor = math.log(skip_grad_spikes) if skip_grad_spikes else None
        self.mean_log = torch.zeros((), device=device)
        self.seen = torch.zeros((), device=device)

    @torch.no_grad()
    def refuses(self, norm: Tensor) -> Tensor:
        """1.0 if the update with this gradient norm is to be skipped, else 0.0. Shapes: scalars."""
        bad = ~norm.isfinite()
        if self.log_factor is None:
            return bad.float()
        log_norm = norm.float().clamp_min(1e-12).log()
        bound = torch.where(self.seen >= GUARD_AFTER, self.mean_log + self.log_factor, torch.inf)
        spike = ~bad & (log_norm > bound)
        share = (1 / (self.seen + 1)).clamp_min(1 - GUARD_DECAY)
        moved = self.mean_log + share * (torch.minimum(log_norm, bound) - self.mean_log)
        self.mean_log = torch.where(bad, self.mean_log, moved)
        self.seen = self.seen + (~bad).float()
        return (bad | spike).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean_log": self.mean_log, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean_log, self.seen = (state[name].to(self.seen.device) for name in ("mean_log", "seen"))


class Ema:
    """The exponential moving average of a network's parameters: what is validated and published where it is on."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.current: list[Tensor] = list(module.parameters())
        self.average = [p.detach().clone(memory_format=torch.preserve_format) for p in self.current]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of one more step."""
        torch._foreach_lerp_(self.average, self.current, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the network has its average weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for current, average in zip(self.current, self.average, strict=True):
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"average": list(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)
