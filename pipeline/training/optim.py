"""Optimizers and learning rates."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from pipeline.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamConfig(Config):
    """AdamW, its learning-rate schedule and the bound on its gradient."""

    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_steps: NonNegativeInt = 0  # linear ramp from zero
    decay: Literal["constant", "cosine"] = "constant"  # cosine: a quarter period over the stage's steps, as published
    clip_norm: PositiveFloat = 1.0  # bound on the gradient's 2-norm over the whole network


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
    if cfg.decay == "cosine":
        return cfg.lr * math.cos(math.pi / 2 * (step - cfg.warmup_steps) / total_steps)
    return cfg.lr
