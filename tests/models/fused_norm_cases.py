"""The kernels of fused_norm.py in Triton's interpreter, against their definition. test_fused_norm.py runs it, on its own."""

import pytest
import torch

from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.fused_norm import fused_norm
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.models.layers import ChannelNorm
from pipeline.training.engine_config import EngineConfig, choose_kernels


def norm_of(channels: int, activation) -> ChannelNorm:
    torch.manual_seed(channels)
    norm = ChannelNorm(channels, activation)
    torch.nn.init.normal_(norm.scale)
    torch.nn.init.normal_(norm.shift)
    return norm


def both(x, norm, weights):
    """Output and gradients by the definition in float64, and by the kernels."""
    results = []
    exact = ChannelNorm(norm.channels, norm.activation).double()
    exact.load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    for layer, given in ((exact, x.double()), (norm, x)):
        given = given.clone().requires_grad_()
        y = fused_norm(given, norm.scale, norm.shift, norm.eps, norm.activation) if layer is norm else layer(given)
        (y * weights.to(y.dtype)).sum().backward()
        results.append([y.detach().double(), *(t.grad.double() for t in (given, layer.scale, layer.shift))])
        layer.zero_grad()
    return results


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (2, 3, 5, 4), (1, 60, 9, 7), (1, 220, 3, 3), (1, 960, 2, 3)])
def test_values_and_gradients_are_those_of_the_definition(shape, activation):
    norm = norm_of(shape[1], activation)
    x = 3 + 2 * torch.randn(shape)
    for exact, ours in zip(*both(x, norm, torch.randn(shape)), strict=True):
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_more_pixels_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr("pipeline.models.fused_norm.PROGRAMS", 3)
    monkeypatch.setattr("pipeline.models.fused_norm.TILE", 32)
    norm = norm_of(12, "relu")
    shape = (2, 12, 11, 5)
    for exact, ours in zip(*both(torch.randn(shape), norm, torch.randn(shape)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_bf16_comes_and_goes_and_is_computed_in_fp32():
    norm = norm_of(60, "silu")
    x = (3 + torch.randn(2, 60, 8, 8)).bfloat16().requires_grad_()
    y = fused_norm(x, norm.scale, norm.shift, norm.eps, "silu")
    assert y.dtype == torch.bfloat16
    exact = norm(x.detach().float())
    # The interpreter cuts where a GPU rounds, which is half as exact
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=1e-4)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert norm.scale.grad.dtype == torch.float32


def test_autocast_gives_bf16_from_fp32():
    norm = norm_of(8, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_norm(torch.randn(1, 8, 2, 2), norm.scale, norm.shift, norm.eps, None).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_what_is_not_a_number_stays_so(activation):
    x = torch.randn(1, 4, 2, 2)
    x[0, 2, 0, 1] = torch.nan
    y = fused_norm(x, *norm_of(4, activation).parameters(), 1e-3, activation)
    assert y[0, :, 0, 1].isnan().all()
    assert y[0, :, 1].isfinite().all()


def test_the_layout_of_the_input_does_not_matter():
    norm = norm_of(6, "relu")
    x = torch.randn(2, 6, 5, 3)
    args = norm.scale, norm.shift, norm.eps, "relu"
    assert torch.equal(fused_norm(x, *args), fused_norm(x.to(memory_format=torch.channels_last), *args))
    assert fused_norm(x, *args).is_contiguous(memory_format=torch.channels_last)


def test_equal_inputs_give_equal_bits():
    norm, shape = norm_of(20, "silu"), (2, 20, 16, 16)
    x, weights = torch.randn(shape), torch.randn(shape)
    assert all(torch.equal(a, b) for a, b in zip(both(x, norm, weights)[1], both(x, norm, weights)[1], strict=True))


def test_no_pixels():
    norm = norm_of(4, None)
    x = torch.randn(0, 4, 2, 2, requires_grad=True)
    fused_norm(x, norm.scale, norm.shift, norm.eps, None).sum().backward()
    assert norm.scale.grad.abs().sum() == 0


def test_whole_networks_compute_the_same_with_it():
    torch.manual_seed(0)
    codec = Codec(CodecConfig(channels=(4, 6, 6, 8, 12), latent_channels=10, hyper_channels=8, num_residual_blocks=1))
    labeler = Labeler(LabelerConfig(channels=4, embedding_channels=8, code_dim=4, num_codes=16, num_blocks=1))
    x, weights = torch.rand(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    results = []
    for fused in (False, True):
        result = []
        for network, passes in (
            (codec, lambda x: codec.synthesis(codec.analysis(x))),
            (labeler, lambda x: labeler(x, quantise=False).x_hat),
        ):
            choose_kernels(network, EngineConfig(fused_norms=fused))
            network.zero_grad()
            (passes(x) * weights).sum().backward()
            result += [passes(x).detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
        results.append(result)
    assert len(results[0]) > 60
    for plain, ours in zip(*results, strict=True):
        assert (ours - plain).abs().max() <= 1e-3 * plain.abs().max().clamp_min(1e-3)
