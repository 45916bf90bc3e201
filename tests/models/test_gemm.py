"""Convolutions as matrix products give the same numbers, but for the order of sums, and the same gradients."""

import copy
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import gemm
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.gemm import pays, use_products
from pipeline.training.engine_config import EngineConfig
from pipeline.training.runtime import Runtime

CL = torch.channels_last


def small_ones_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gemm, "LEAST_WEIGHTS", 0)
    patch.setattr(gemm, "POSITIONS_PER_CHANNEL", math.inf)


@pytest.fixture
def always(monkeypatch):
    small_ones_too(monkeypatch)


def outputs_and_gradients(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    (y * weights[tuple(slice(n) for n in y.shape)]).sum().backward()
    return [y.detach(), x.grad, *(value.grad for value in layer.parameters())]


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    transposed=st.booleans(),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    data=st.randoms(use_true_random=False),
)
@settings(max_examples=150)
def test_any_convolution(transposed, bias, batch, channels, size, kernel, stride, padding, more, data):
    with pytest.MonkeyPatch.context() as patch:
        small_ones_too(patch)
        torch.manual_seed(data.randrange(2**30))
        if transposed:
            # PyTorch wants it below the stride, and padding that leaves something
            more = tuple(min(m, s - 1) for m, s in zip(more, stride, strict=True))
            padding = tuple(min(p, k - 1) for p, k in zip(padding, kernel, strict=True))
            layer = nn.ConvTranspose2d(*channels, kernel, stride, padding, more, bias=bias)
        else:
            layer = nn.Conv2d(*channels, kernel, stride, padding, bias=bias)
        plain = layer.double().to(memory_format=CL)
        other = copy.deepcopy(plain)
        use_products(other)
        x = torch.randn(batch, channels[0], *size, dtype=torch.double).contiguous(memory_format=CL)
        weights = torch.randn(3, 4, 50, 50, dtype=torch.double)
        for ours, theirs in zip(
            outputs_and_gradients(other, x, weights), outputs_and_gradients(plain, x, weights), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_a_hand_computed_window(always):
    layer = nn.Conv2d(1, 1, 3, bias=False)
    layer.weight.data.copy_(torch.arange(9.0).view(1, 1, 3, 3))
    use_products(layer)
    # rows 0 1 2, 3 4 5, 6 7 8 against themselves: the sum of the first eight squares
    assert layer(torch.arange(9.0).view(1, 1, 3, 3)).item() == 204


@pytest.mark.parametrize(
    ("positions", "shape", "expected"),
    [
        (512, (960, 960, 3, 3), True),
        (960, (480, 960, 3, 3), True),
        (961, (960, 480, 3, 3), False),
        (128, (320, 320, 3, 3), False),
        (128, (320, 320, 5, 5), True),
    ],
)
def test_where_it_pays(positions, shape, expected):
    assert pays(positions, torch.empty(shape, device="meta")) is expected


def test_gradients_are_in_the_layout_of_the_weights(always):
    """PyTorch's fused AdamW on a CPU goes through both as they lie in memory, and would mix them up."""
    for layer in (nn.Conv2d(6, 4, 3, padding=1), nn.ConvTranspose2d(6, 4, 3, stride=2)):
        layer = layer.to(memory_format=CL)
        use_products(layer)
        layer(torch.randn(2, 6, 5, 5).contiguous(memory_format=CL)).sum().backward()
        assert layer.weight.grad.stride() == layer.weight.stride() != torch.empty(layer.weight.shape).stride()


def test_what_follows_may_work_in_place(always):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 3, 3), nn.ReLU(inplace=True)
    )
    plain = copy.deepcopy(network)
    use_products(network)
    x, weights = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    for ours, theirs in zip(*(outputs_and_gradients(one, x, weights) for one in (network, plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


class Products(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "mm" in function.__name__
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("of_weight", "of_input"), [(True, True), (True, False), (False, True)])
def test_only_the_gradients_that_are_wanted_are_computed(always, kind, of_weight, of_input):
    layer = kind(3, 4, 3).requires_grad_(of_weight)
    use_products(layer)
    x = torch.randn(1, 3, 5, 5, requires_grad=of_input)
    y = layer(x).sum()
    with Products() as products:
        y.backward()
    assert products.count == of_weight + of_input


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 1),
        nn.ConvTranspose2d(4, 4, 3, dilation=2),
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(always, layer):
    kind = type(layer)
    use_products(layer)
    assert type(layer) is kind


def test_a_compiled_network_has_the_convolution_itself(always):
    layer = nn.Conv2d(3, 4, 3)
    use_products(layer)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.zeros(1, 3, 5, 5))
    with torch.profiler.profile() as profile:
        layer_again = torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.zeros(1, 3, 5, 5))
    torch.testing.assert_close(layer_again, y)
    assert "aten::convolution" in {event.key for event in profile.key_averages()}


def test_overlaps_are_summed_in_fp32_under_bf16(always):
    layer = nn.ConvTranspose2d(1, 1, 17, bias=False)
    nn.init.ones_(layer.weight)
    use_products(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.ones(1, 1, 17, 17))
    # 17 x 17 ones meet in the middle, 288 in bf16, which cannot count beyond 256 by ones
    assert y[0, 0, 16, 16].item() == 288


def test_autocast_computes_in_bf16(always):
    torch.manual_seed(0)
    for layer in (nn.Conv2d(64, 48, 3, padding=1), nn.ConvTranspose2d(64, 48, 3, stride=2, padding=1)):
        plain, precise = copy.deepcopy(layer), copy.deepcopy(layer).double()
        use_products(layer)
        x, weights = torch.randn(2, 64, 8, 8), torch.randn(2, 48, 15, 15).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (outputs_and_gradients(one, x, weights) for one in (layer, plain))
        exact = outputs_and_gradients(precise, x.double(), weights.double())
        assert ours[0].dtype == torch.bfloat16
        for one, other, truth in zip(ours, theirs, exact, strict=True):
            # no further from the truth than PyTorch's own, but for a rounding
            ours_off, theirs_off = ((value.double() - truth).abs().max() for value in (one, other))
            assert ours_off <= 1.5 * theirs_off + 2e-3 * truth.abs().max()


def test_a_weight_under_spectral_norm_is_left_alone(always):
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    plain = copy.deepcopy(layer)
    use_products(layer)
    x = torch.randn(1, 3, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)


def test_a_network_is_freed_at_once():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3))
    use_products(network)
    gc.disable()
    try:
        seen = weakref.ref(network[0].weight)
        del network
        assert seen() is None
    finally:
        gc.enable()


def test_training_on_a_cpu_uses_it_where_it_pays():
    wide = CodecConfig(channels=(4, 8, 16, 24, 352), latent_channels=8, hyper_channels=8, num_residual_blocks=1)
    codec = Runtime(EngineConfig()).place(Codec(wide))
    found = set()
    for name, part in codec.named_modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            part.register_forward_hook(
                lambda layer, given, y, name=name: found.add(name) if "Product" in type(y.grad_fn).__name__ else None
            )
    codec.synthesis(codec.analysis(torch.rand(1, 3, 64, 64)))
    # 352 x 352 x 3 x 3; all others are smaller
    assert found == {"synthesis.residual.0.layers.0", "synthesis.residual.0.layers.3"}
