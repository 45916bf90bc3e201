"""Weights in 8 bits."""

from functools import partial

import pytest
import torch

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest
from pipeline.bitstream.codec import ImageCodec
from pipeline.models import compact, serialization
from pipeline.registry import resolve
from tests.conftest import assert_one_clear_line, illm_here, picture
from tests.models.test_networks import SMALL_LIGHT, small_codec

pytestmark = pytest.mark.quick


def test_weights_become_integers_with_a_scale_per_slice():
    weight = torch.tensor([1.27, -0.62, 0.004, 0.0]).reshape(2, 2, 1, 1)
    packed = compact.compacted({"a.weight": weight, "a.bias": torch.tensor([0.5, 0.25])})
    assert packed["a.weight"].flatten().tolist() == [127, -62, 127, 0]
    assert packed["a.weight.scales"].tolist() == pytest.approx([0.01, 0.004 / 127])
    assert packed["a.bias"].tolist() == [0.5, 0.25]
    full = compact.expanded(packed)
    assert full.keys() == {"a.weight", "a.bias"}
    assert full["a.weight"].flatten().tolist() == pytest.approx([1.27, -0.62, 0.004, 0.0])


def test_a_slice_of_zeros_stays_zero():
    full = compact.expanded(compact.compacted({"w": torch.zeros(2, 1, 3, 3)}))
    assert torch.equal(full["w"], torch.zeros(2, 1, 3, 3))


def test_weights_change_by_at_most_half_a_step_and_nothing_else_changes():
    state = small_codec(cfg=SMALL_LIGHT).state_dict()
    full = compact.expanded(compact.compacted(state))
    assert full.keys() == state.keys()
    for name, value in state.items():
        if value.dim() == 4 and value.is_floating_point():
            step = value.abs().amax((1, 2, 3), keepdim=True) / 127
            assert ((full[name] - value).abs() <= 0.501 * step).all(), name
        else:
            assert torch.equal(full[name], value), name


def test_a_second_time_changes_nothing():
    once = compact.expanded(compact.compacted(small_codec().state_dict()))
    twice = compact.expanded(compact.compacted(once))
    assert all(torch.equal(twice[name], value) for name, value in once.items())


def test_scales_that_do_not_fit_are_refused():
    packed = compact.compacted({"w": torch.ones(2, 1, 3, 3)})
    with pytest.raises(RuntimeError, match=r"w is .* with scales"):
        compact.expanded(packed | {"w.scales": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"v.scales has no weights"):
        compact.expanded(packed | {"v.scales": torch.ones(2)})


def test_weights_in_16_bits_are_widened():
    full = compact.expanded({"w": torch.tensor([0.1, 65504.0]).half(), "n": torch.tensor([3])})
    assert full["w"].dtype == torch.float32
    assert full["w"].tolist() == [0.0999755859375, 65504.0]
    assert full["n"].dtype == torch.int64


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        (None, "needs the lengths"),
        (torch.tensor([3.0]), "needs the lengths"),
        (torch.tensor([[3]], dtype=torch.int32), "needs the lengths"),
        (torch.tensor([2], dtype=torch.int32), "not rows of the lengths"),
        (torch.tensor([4, -1], dtype=torch.int32), "not rows of the lengths"),
    ],
)
def test_tables_whose_rows_do_not_fit_are_refused(lengths, told):
    state = {"a._quantized_cdf": torch.tensor([0, 5, 65536], dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=told):
        compact.expanded(state if lengths is None else state | {"a._cdf_length": lengths})


def test_few_bytes_do_not_become_a_large_table():
    lengths = torch.ones(20001, dtype=torch.int32)
    lengths[0] = 20000
    state = {"a._quantized_cdf": torch.zeros(40000, dtype=torch.int32), "a._cdf_length": lengths}
    with pytest.raises(RuntimeError, match="not rows of the lengths"):
        compact.expanded(state)


def test_the_command_makes_one_and_never_overwrites(tmp_path):
    codec = small_codec(cfg=SMALL_LIGHT)
    save = partial(serialization.save_codec, codec=codec, cfg=codec.cfg)
    publish(tmp_path / "full" / "artifact", Manifest(kind="codec", stage="pretrain"), save)
    ended = illm_here("compact", "full", "small", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert f"bitstream id {serialization.compact_codec(codec).bitstream_id().hex()}" in ended.out
    assert_one_clear_line(illm_here("compact", "full", "small", cwd=tmp_path), "never overwritten")


def test_a_compact_artifact_is_the_codec_with_rounded_weights(tmp_path):
    codec = small_codec(cfg=SMALL_LIGHT)
    save = partial(serialization.save_codec, codec=codec, cfg=codec.cfg)
    full = publish(tmp_path / "full" / "artifact", Manifest(kind="codec", stage="pretrain"), save)
    small = serialization.publish_compact(full, "runs/full", tmp_path / "small")
    assert small.manifest.parents["codec"].digest == full.digest
    sizes = [artifact.manifest.files["weights.safetensors"].size for artifact in (small, full)]
    assert sizes[0] < sizes[1] / 2
    loaded = serialization.load_codec(resolve.read(str(tmp_path / "small"), "codec"))
    expected = serialization.compact_codec(codec)
    assert loaded.bitstream_id() == expected.bitstream_id() != codec.bitstream_id()
    assert small.manifest.config["bitstream_id"] == loaded.bitstream_id().hex()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in loaded.state_dict().items())
    pixels = picture(1, 70, 90)
    assert ImageCodec(loaded).decompress(ImageCodec(expected).compress(pixels)).shape == pixels.shape
