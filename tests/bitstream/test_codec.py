import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bitstream import container
from pipeline.bitstream.codec import ImageCodec, pad, to_pixels
from pipeline.bitstream.container import Packet
from pipeline.data.loader import to_float
from pipeline.errors import BitstreamError
from tests.conftest import picture
from tests.models.test_networks import small_codec


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec(small_codec())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 200), (31, 33), (64, 64), (65, 127), (180, 70)])
def test_decompression_equals_the_forward_pass_for_any_size(codec, height, width):
    pixels = picture(1, height, width)
    restored = codec.decompress(codec.compress(pixels))
    y_hat, _ = codec.codec.encode(pad(to_float(pixels[None])))
    expected = to_pixels(codec.codec.synthesis(y_hat)[0, :, :height, :width])
    assert np.array_equal(restored, expected)


def test_the_file_is_as_long_as_its_ideal_code_says():
    network = small_codec()
    with torch.no_grad():  # scales that suit the latents, as after training
        network.analysis[-1].weight.mul_(20)
        network.hyper_synthesis_scale[-1].weight.zero_()
        network.hyper_synthesis_scale[-1].bias.fill_(9.6)
    pixels = picture(2, 256, 256)
    _, bits = network.encode(to_float(pixels[None]))
    assert len(ImageCodec(network).compress(pixels)) == pytest.approx(bits.item() / 8, rel=0.03)


def test_a_file_made_by_another_model_is_refused(codec):
    content = ImageCodec(small_codec(seed=1)).compress(picture(0))
    with pytest.raises(BitstreamError, match="made by another model"):
        codec.decompress(content)


def test_another_synthesis_reads_the_same_files_and_another_table_does_not(codec):
    tuned = small_codec()
    with torch.no_grad():
        tuned.synthesis.up[-1].bias.add_(0.5)
    assert ImageCodec(tuned).bitstream_id == codec.bitstream_id
    assert ImageCodec(tuned).compress(picture(0)) == codec.compress(picture(0))
    with torch.no_grad():
        tuned.hyper_entropy._quantized_cdf[0, 1] += 1
    assert ImageCodec(tuned).bitstream_id != codec.bitstream_id


@settings(max_examples=60, deadline=None)
@given(hyper=st.binary(max_size=60), latent=st.binary(max_size=400))
def test_streams_of_any_bytes_with_a_right_checksum_decode_to_some_image(codec, hyper, latent):
    """CompressAI's own decoder dies on these with a segmentation fault."""
    content = container.pack(Packet(codec.bitstream_id, 100, 130, hyper, latent))
    assert codec.decompress(content).shape == (100, 130, 3)


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0xF0])
def test_long_runs_of_escapes_do_not_leave_the_buffer(codec, fill):
    content = container.pack(Packet(codec.bitstream_id, 64, 64, bytes([fill]) * 4096, bytes([fill]) * 4096))
    assert codec.decompress(content).shape == (64, 64, 3)
