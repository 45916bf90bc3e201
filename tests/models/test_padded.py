"""Padded convolutions give the same numbers, but for the order of sums, and the same gradients."""

import copy

import pytest
import torch
from torch import nn

from pipeline.models.padded import pad_channels

LAYERS = {
    "odd in": lambda: nn.Conv2d(19, 16, 3, padding=1),
    "odd out": lambda: nn.Conv2d(16, 60, 3, stride=2, padding=1),
    "both, without bias": lambda: nn.Conv2d(3, 5, 7, padding=3, bias=False),
    "reflected": lambda: nn.Conv2d(220, 12, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(60, 30, 3, stride=2, padding=1, output_padding=1),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(19, 12, 4, stride=2, padding=1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_what_it_did_before(name):
    torch.manual_seed(0)
    plain = LAYERS[name]().double().eval()
    padded = copy.deepcopy(plain)
    pad_channels(padded)
    inputs = [torch.randn(2, plain.in_channels, 8, 8, dtype=torch.double, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    outputs = [layer(x) for layer, x in zip((plain, padded), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert padded.state_dict().keys() == plain.state_dict().keys()


def test_the_convolution_itself_sees_multiples_of_eight(monkeypatch):
    layer = nn.Conv2d(19, 60, 3)
    pad_channels(layer)
    seen = []
    inner = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *a: seen.append((a[1].shape, a[2].shape)) or inner(*a))
    assert layer(torch.zeros(1, 19, 4, 4)).shape == (1, 60, 2, 2)
    assert seen == [((1, 24, 4, 4), (64, 24, 3, 3))]


def test_only_convolutions_that_need_it_are_padded():
    network = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 20, 3))
    pad_channels(network)
    assert ["forward" in vars(layer) for layer in network] == [False, True]
