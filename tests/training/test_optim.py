import math

import pytest
import torch

from pipeline.training import optim
from pipeline.training.optim import AdamConfig


def test_the_published_schedule_ramps_and_follows_a_quarter_cosine():
    cfg = AdamConfig(lr=3e-4, warmup_steps=10_000, decay="cosine")
    rate = lambda step: optim.learning_rate(cfg, step, 1_000_000)
    assert rate(0) == pytest.approx(3e-8)
    assert rate(4_999) == pytest.approx(1.5e-4)
    assert rate(10_000) == pytest.approx(3e-4)
    assert rate(510_000) == pytest.approx(3e-4 * math.cos(math.pi / 4))
    assert rate(1_000_000) / 3e-4 == pytest.approx(0.0157, abs=1e-4)  # the release ends at 1.6 % of its rate


def test_a_constant_rate_stays():
    assert optim.learning_rate(AdamConfig(lr=1e-4), 10**6, 10) == 1e-4


def test_frozen_parameters_get_no_optimizer_state():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    optimizer = optim.adam(module, AdamConfig(lr=1, betas=(0.5, 0.9), weight_decay=0.1))
    group = optimizer.param_groups[0]
    assert group["params"] == [module.weight]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.9), 0.1)
