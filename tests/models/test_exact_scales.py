"""Which table codes a symbol is decided in integers, the same in every way of computing it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ArtifactError
from pipeline.models import exact_scales, fixed_point, serialization
from pipeline.models.codec import SCALE_TABLE, Codec, CodecConfig
from pipeline.models.exact_scales import ExactScales, Layer
from pipeline.models.tables import checked_tables
from tests.bitstream import matrix
from tests.models.test_networks import SMALL, small_codec

WAYS = [torch.float64, torch.int64]


def random_exact(seed: int, channels: int, width: int) -> ExactScales:
    """Weights, biases and activations of any size that the check allows: many at their limits, so that sums are large."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(shape: tuple[int, ...], limit: int) -> torch.Tensor:
        values = torch.randint(-limit, limit + 1, shape, generator=generator)
        extreme = torch.rand(shape, generator=generator) < 0.5
        return torch.where(extreme, values.sign() * limit, values)

    layers = []
    largest = 2**23 - 1
    for i, (shape, out) in enumerate(
        [
            ((channels, channels, 5, 5), channels),
            ((channels, channels, 5, 5), channels),
            ((width, channels, 3, 3), width),
        ]
    ):
        weight = numbers(shape, 2**15 - 1).to(torch.int16)
        # as large as the sums, or far smaller: else one of them decides alone
        bias = numbers((out,), 2 ** int(torch.randint(0, 50, (), generator=generator)))
        shift = torch.randint(10, 40, (out,), generator=generator)
        limit = None if i == 2 else 2**23 - 1
        layers.append(Layer(weight, bias, shift, limit))
    thresholds = numbers((63,), 2**30).unique()
    exact = ExactScales(numbers((channels,), 2**12), largest, tuple(layers), thresholds)
    exact.check()
    return exact


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 12),
    width=st.integers(1, 9),
    height=st.integers(1, 7),
    columns=st.integers(1, 7),
    spread=st.sampled_from([1, 30, 8000, 2**31 - 1]),
)
def test_both_ways_agree_for_any_weights_and_any_symbols(seed, channels, width, height, columns, spread):
    exact = random_exact(seed, channels, width)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-spread, spread + 1, (1, channels, height, columns), generator=generator).to(torch.int32)
    in_float, in_integers = (exact.indexes(z, dtype) for dtype in WAYS)
    assert in_float.shape == (1, width, 4 * height, 4 * columns)
    assert torch.equal(in_float, in_integers)
    # the other memory layout, and the sums in another order: as a product of matrices
    assert torch.equal(exact.indexes(z.contiguous(memory_format=torch.channels_last)), in_integers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_scales, "accumulated", matrix.by_products)
        assert torch.equal(exact.indexes(z), in_integers)


def sensitive_codec() -> Codec:
    """Scales that change with every symbol around them."""
    codec = small_codec()
    with torch.no_grad():
        for layer in list(codec.hyper_synthesis_scale)[::2]:
            layer.weight.mul_(4)
    codec.update_tables()
    return codec


@pytest.mark.parametrize("positions", [1, 9, 40, 10**6])
def test_strips_of_an_image_are_the_image(monkeypatch, positions):
    exact = sensitive_codec().exact_scales
    z = torch.randint(-9, 10, (1, 6, 11, 7), dtype=torch.int32)
    whole = exact._indexes(z, torch.int64)
    assert len(whole.unique()) > 20
    monkeypatch.setattr(exact_scales, "STRIP_POSITIONS", positions)
    assert torch.equal(exact.indexes(z), whole)


def test_a_layer_by_hand():
    """(3 * 7 - 5) / 2**3 is 2, (3 * -7 - 5) / 8 is -3.25; halves go up: 20 / 8 becomes 3, -20 / 8 becomes -2."""
    layer = Layer(torch.zeros(1, 1, 3, 3, dtype=torch.int16), torch.tensor([-5]), torch.tensor([3]), None)
    layer.weight[0, 0, 1, 1] = 3
    for dtype in WAYS:
        sums = exact_scales.accumulated(layer, torch.tensor([[[[7, -7]]]]).to(dtype), False)
        assert sums.flatten().tolist() == [16, -26]
        assert exact_scales.rounded(sums, layer).flatten().tolist() == [2, -3]
        halves = torch.tensor([[[[20, -20, 12, 100]]]]).to(dtype)
        assert exact_scales.rounded(halves, layer).flatten().tolist() == [3, -2, 2, 13]
        limited = Layer(layer.weight, layer.bias, layer.shift, 4)
        assert exact_scales.rounded(halves, limited).flatten().tolist() == [3, 0, 2, 4]


def test_the_first_activation_by_hand():
    """Symbol 3 and median 0.25, with 10 fractional bits; what is too large counts as the limit."""
    exact = ExactScales(torch.tensor([256]), 2**23 - 1, (), torch.zeros(0).long())
    z = torch.tensor([3, -3, 2**31 - 1, -(2**31), 8191, 8192]).int().reshape(1, 1, 1, 6)
    expected = [3 * 1024 + 256, -3 * 1024 + 256, 2**23 - 1, 1 - 2**23, 8191 * 1024 + 256, 2**23 - 1]
    assert exact.first_activation(z).flatten().tolist() == expected


def test_indexes_are_those_of_floating_point_but_for_scales_at_a_threshold():
    """So for symbols three times as large as those that their tables have."""
    codec = sensitive_codec()
    largest = int(fixed_point.samples(checked_tables(codec)[0]).max())
    z = torch.randint(-3 * largest, 3 * largest + 1, (1, 6, 6, 6), dtype=torch.int32)
    _, scales = codec.means_and_scales(z + codec.medians())
    wanted, found = codec.entropy.build_indexes(scales), codec.exact_scales.indexes(z)
    relative = (scales.unsqueeze(-1) / torch.tensor(SCALE_TABLE[:-1]) - 1).abs().amin(-1)
    assert torch.equal(wanted[relative > 1e-3], found[relative > 1e-3])
    assert len(found.unique()) > 10


def test_one_bit_of_one_weight_is_another_codec():
    codec = small_codec()
    with torch.no_grad():
        codec.hyper_synthesis_scale[-1].weight.mul_(30)
    codec.update_tables()
    state = codec.exact_scales.state_dict()
    before = codec.bitstream_id()
    state["1.weight"] = state["1.weight"].clone()
    state["1.weight"][0, 0, 2, 2] ^= 1
    codec.exact_scales = ExactScales.from_state(state)
    assert codec.bitstream_id() != before


def test_the_same_integers_are_made_of_the_same_weights():
    assert small_codec().bitstream_id() == small_codec().bitstream_id()
    codec = small_codec()
    again = ExactScales.from_state(codec.exact_scales.state_dict())
    z = torch.randint(-4, 5, (1, 6, 6, 6), dtype=torch.int32)
    assert torch.equal(again.indexes(z), codec.exact_scales.indexes(z))


def test_the_cost_of_a_codec_is_far_below_what_is_allowed():
    codec = small_codec()
    assert fixed_point.cost(codec, codec.exact_scales, *checked_tables(codec)) < 1e-4


def test_a_cost_by_hand():
    """Symbols of a table of 0 and 1 by halves, coded with one of 3/4 and 1/4: half a bit of log2(4/3) less, and of 1 more."""
    from pipeline.models.tables import Tables

    tables = Tables([[0, 32767, 65534, 65536], [0, 49151, 65534, 65536]], [4, 4], [0, 0])
    expected = 0.5 * torch.tensor(2 / 3).log2() + 0.5 * torch.tensor(2.0).log2()
    assert fixed_point._divergence(tables, 0, 1) == pytest.approx(float(expected), abs=1e-3)
    assert fixed_point._divergence(tables, 0, 0) == 0


def test_a_codec_whose_integers_cost_too_much_is_not_saved(tmp_path):
    codec = small_codec()
    with torch.no_grad():
        codec.hyper_synthesis_scale[-1].bias.fill_(3.0)
    # the integers are still those of smaller scales
    with pytest.raises(ArtifactError, match=r"would cost .* % of a file's bits, expected at most 0.5 %"):
        serialization.save_codec(tmp_path, codec, SMALL)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("medians", lambda t: t + 2**24, "medians"),
        ("medians", lambda t: t[:-1], "layer 0"),
        ("limit", lambda t: t * 0, "limit"),
        ("limit", lambda t: t.repeat(2), "limit: is 2 numbers"),
        ("0.weight", lambda t: t.long(), "layer 0: expected int16"),
        ("0.weight", lambda t: t[..., :4], "layer 0: expected int16"),
        ("1.bias", lambda t: t.flatten()[0], "layer 1: expected int16"),
        ("1.bias", lambda t: t + 2**52, "layer 1: sums can reach"),
        ("2.weight", lambda t: t * 0 + 32767, None),
        ("0.limit", lambda t: t * 0 + 2**40, "layer 1: sums can reach"),
        ("0.limit", lambda t: t * 0, "layer 0: expected a positive limit"),
        ("0.shift", lambda t: t - 60, "layer 0: expected shifts"),
        ("2.shift", lambda t: t + 60, "layer 2: expected shifts"),
        ("thresholds", lambda t: t.flip(0), "thresholds"),
        ("thresholds", lambda t: t.double(), "thresholds"),
        ("thresholds", lambda t: t[:5], "5 tables|6 tables"),
    ],
)
def test_hostile_integers_are_refused(tmp_path, name, change, told):
    from safetensors.torch import load_file, save_file

    from pipeline.artifacts.artifact import publish
    from pipeline.artifacts.manifest import Manifest

    def write(folder):
        serialization.save_codec(folder, small_codec(), SMALL)
        state = load_file(folder / serialization.EXACT_SCALES)
        state[name] = change(state[name]).contiguous()
        save_file(state, folder / serialization.EXACT_SCALES)

    artifact = publish(tmp_path / "artifact", Manifest(kind="codec"), write)
    if told is None:
        serialization.load_codec(artifact)
        return
    with pytest.raises(ArtifactError, match=told) as refused:
        serialization.load_codec(artifact)
    assert "exact_scales.safetensors" in str(refused.value)


def test_an_artifact_without_them_gets_the_same_ones(tmp_path):
    from pipeline.artifacts.artifact import publish
    from pipeline.artifacts.manifest import Manifest

    codec = small_codec()
    for save, place in ((serialization.save, "old"), (serialization.save_codec, "new")):
        artifact = publish(tmp_path / place, Manifest(kind="codec"), lambda d, save=save: save(d, codec, SMALL))
        assert serialization.load_codec(artifact).bitstream_id() == codec.bitstream_id()


@pytest.mark.parametrize("hyper_channels", [320, 2048])
def test_wide_codecs_are_converted_with_fewer_bits(hyper_channels):
    cfg = CodecConfig(channels=(4, 4, 4, 4, 4), latent_channels=4, hyper_channels=hyper_channels, num_residual_blocks=1)
    if hyper_channels > 320:
        # 2 * 25 * 2048**2 weights take long to draw
        room = fixed_point._room(torch.nn.Conv2d(hyper_channels, 1, 3), 24)
        assert 9 * hyper_channels * 2 ** (room + fixed_point.WEIGHT_BITS) < 2 ** (exact_scales.SUM_BITS - 1)
        return
    codec = Codec(cfg)
    codec.update_tables()
    assert codec.exact_scales.layers[0].limit == 2**23 - 1
