import copy

import torch

from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime, mix_seed


def test_a_backward_pass_touches_the_gradients_of_its_own_network_alone():
    runtime = Runtime()
    inner, outer = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    trainable = runtime.trainable("inner", inner, AdamConfig(lr=0.1), 10)
    trainable.backward(outer(trainable.model(torch.ones(1, 2))).sum())
    assert inner.weight.grad.abs().sum() > 0
    assert outer.weight.grad is None


def test_an_update_clips_the_gradient_and_uses_the_schedule():
    module = torch.nn.Linear(1, 1, bias=False)
    before = module.weight.item()
    cfg = AdamConfig(lr=0.5, warmup_steps=10, max_grad_norm=1.0)
    trainable = Runtime().trainable("net", module, cfg, 100)
    trainable.backward(1000 * module.weight.sum())
    norm = trainable.update(step=0)
    assert norm.item() == 1000
    assert abs(before - module.weight.item() - 0.05) < 1e-4  # a tenth of the rate: Adam's first step is one rate long
    assert module.weight.grad is None


def test_state_round_trips():
    def made() -> Runtime:
        torch.manual_seed(0)
        runtime = Runtime()
        runtime.net = runtime.trainable("net", torch.nn.Linear(2, 2), AdamConfig(lr=0.1), 10)
        return runtime

    first, second = made(), made()
    x = torch.ones(1, 2)
    first.net.backward(first.net.model(x).sum())
    first.net.update(0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for runtime in (first, second):
        runtime.net.backward(runtime.net.model(x).square().sum())
        runtime.net.update(1)
    assert torch.equal(first.net.module.weight, second.net.module.weight)


def test_seeds_of_neighbouring_positions_are_unrelated():
    seeds = [mix_seed(s, n) for s in range(50) for n in range(50)]
    assert len(set(seeds)) == 2500
    assert all(0 <= s < 2**63 for s in seeds)
    bits = [bin(mix_seed(0, n) ^ mix_seed(0, n + 1)).count("1") for n in range(500)]
    assert 28 < sum(bits) / len(bits) < 35  # about half of 63 bits differ
