import math

import pytest
import torch

from pipeline.training import optim
from pipeline.training.optim import AdamConfig


def test_the_published_schedule_ramps_and_follows_a_quarter_cosine():
    cfg = AdamConfig(lr=3e-4, warmup_steps=10_000, schedule="cosine")
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


def norms(guard: optim.GradientGuard, *values: float) -> list[float]:
    return [guard.refuses(torch.tensor(value)).item() for value in values]


def test_the_guard_refuses_what_is_not_finite_and_nothing_else_by_default():
    guard = optim.GradientGuard(None, torch.device("cpu"))
    assert norms(guard, 1.0, float("nan"), float("inf"), 1e30) == [0, 1, 1, 0]


def test_the_guard_refuses_spikes_once_it_knows_what_is_usual():
    guard = optim.GradientGuard(10.0, torch.device("cpu"))
    assert sum(norms(guard, 1e6, *[1.0] * 99)) == 0  # it takes a hundred norms to know
    guard = optim.GradientGuard(10.0, torch.device("cpu"))
    norms(guard, *[2.0, 0.5] * 100)
    assert norms(guard, 9.0, 11.5, float("nan"), 1.0) == [0, 1, 1, 0]  # around a geometric mean of 1


def test_the_guard_accepts_a_lasting_change_after_a_while():
    guard = optim.GradientGuard(4.0, torch.device("cpu"))
    norms(guard, *[1.0] * 200)
    refused = norms(guard, *[100.0] * 400)
    assert refused[0] == 1
    assert refused[-1] == 0
    assert 100 < sum(refused) < 400  # each counts as the bound itself: the mean rises by a factor of 4 in 100 steps


def test_the_guard_goes_on_where_it_was():
    first, second = (optim.GradientGuard(4.0, torch.device("cpu")) for _ in range(2))
    norms(first, *[1.0] * 150)
    second.load_state_dict(first.state_dict())
    assert norms(first, 3.0, 5.0) == norms(second, 3.0, 5.0) == [0, 1]
    assert torch.equal(first.mean_log, second.mean_log)


def test_averaged_weights_by_hand():
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    ema = optim.Ema(network, decay=0.9)
    for value in (2.0, 3.0):
        with torch.no_grad():
            network.weight.fill_(value)
        ema.update()
    average = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 3.0
    with ema.applied():
        assert network.weight.item() == pytest.approx(average)
    assert network.weight.item() == 3.0
    other = optim.Ema(torch.nn.Linear(1, 1, bias=False), decay=0.9)
    other.load_state_dict(ema.state_dict())
    with other.applied():
        assert other.current[0].item() == pytest.approx(average)


def test_the_guards_running_mean_counts_the_newest_by_its_share():
    guard = optim.GradientGuard(1e6, torch.device("cpu"))
    expected = torch.zeros(())
    for number, log_norm in enumerate(torch.linspace(-1, 1, 120)):
        norms(guard, log_norm.exp().item())
        share = torch.maximum(1 / torch.tensor(number + 1.0), torch.tensor(1 - optim.GUARD_DECAY))
        expected = expected + share * (log_norm.exp().clamp_min(1e-12).log() - expected)
        assert torch.equal(guard.mean_log, expected)
