import pytest
import torch

from pipeline.models.layers import ChannelNorm


def test_channel_norm_divides_by_one_less_than_the_channels():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    expected = torch.tensor([-1.1615, -0.3872, 0.3872, 1.1615])  # HiFiC's definition, eps 1e-3
    assert torch.allclose(ChannelNorm(4)(x).flatten(), expected, atol=1e-4)


def test_channel_norm_equals_its_definition():
    torch.manual_seed(0)
    norm = ChannelNorm(5)
    torch.nn.init.normal_(norm.scale)
    torch.nn.init.normal_(norm.shift)
    x = torch.randn(2, 5, 3, 4)
    var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=1)
    expected = norm.scale * (x - mean) / torch.sqrt(var + 1e-3) + norm.shift
    assert torch.allclose(norm(x), expected, atol=1e-5)
    constant = torch.full((1, 5, 1, 1), 3.0)  # where the epsilon alone decides
    assert torch.allclose(norm(constant).flatten(), norm.shift.flatten())
    slight = constant + torch.tensor([0.01, -0.01, 0, 0, 0]).view(1, 5, 1, 1)
    var, mean = torch.var_mean(slight, dim=1, keepdim=True, correction=1)
    assert torch.allclose(norm(slight), norm.scale * (slight - mean) / torch.sqrt(var + 1e-3) + norm.shift, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_no_operation_of_the_norm_works_in_place_on_a_view(activation):
    """Its gradient would be copied twice."""
    x = torch.randn(2, 6, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen, left = set(), [ChannelNorm(6, activation)(x).grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            seen.add(node.name())
            left += [above for above, _ in node.next_functions]
    assert "NativeLayerNormBackward0" in seen
    assert not any("CopySlices" in name for name in seen)
