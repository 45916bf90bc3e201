import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bitstream import container, latents
from pipeline.bitstream.codec import ImageCodec, pad, to_pixels
from pipeline.bitstream.container import Packet
from pipeline.data.transforms import to_float
from pipeline.errors import BitstreamError
from tests.conftest import ROOT, picture
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
@given(hyper=st.binary(min_size=8, max_size=60), latent=st.binary(min_size=8, max_size=400))
def test_streams_of_any_bytes_with_a_right_checksum_decode_to_some_image(codec, hyper, latent):
    """CompressAI's own decoder dies on these with a segmentation fault."""
    content = container.pack(Packet(codec.bitstream_id, 100, 130, hyper, latent))
    assert codec.decompress(content).shape == (100, 130, 3)


@pytest.mark.parametrize(("hyper", "latent"), [(b"", bytes(400)), (bytes(60), b""), (b"1234567", bytes(400))])
def test_a_stream_without_the_coders_final_state_is_refused(codec, hyper, latent):
    with pytest.raises(BitstreamError, match="malformed"):
        codec.decompress(container.pack(Packet(codec.bitstream_id, 100, 130, hyper, latent)))


@pytest.mark.parametrize(("height", "width"), [(2048, 2048), (4096, 4096), (64, 2**20), (11585, 11000)])
def test_few_bytes_cannot_claim_many_pixels(codec, height, width):
    """Refused before memory is asked for: the decoder would need gigabytes for these 40 bytes."""
    content = container.pack(Packet(codec.bitstream_id, height, width, bytes(10), bytes(10)))
    tracemalloc.start()
    with pytest.raises(BitstreamError, match=r"pixels cannot come from a stream of 10 bytes"):
        codec.decompress(content)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.slow
def test_the_shortest_files_that_an_encoder_makes_are_accepted():
    """One color, and a codec that is nearly certain of every symbol: less than a byte per thousand pixels."""
    network = small_codec()
    with torch.no_grad():
        network.analysis[-1].weight.zero_()
        network.analysis[-1].bias.zero_()
        for part in (network.hyper_analysis, network.hyper_synthesis_scale, network.hyper_synthesis_mean):
            part[-1].weight.zero_()
            part[-1].bias.zero_()
    network.hyper_entropy.quantiles.data[:] = torch.tensor([-1.0, 0.0, 1.0])
    network.update_tables()
    network.hyper_entropy._quantized_cdf[:] = 0
    network.hyper_entropy._quantized_cdf[:, :3] = torch.tensor([0, 65535, 65536])
    network.hyper_entropy._cdf_length[:] = 3
    network.hyper_entropy._offset[:] = 0
    codec = ImageCodec(network)
    content = codec.compress(np.zeros((2048, 2048, 3), np.uint8))
    assert len(content) < 2048 * 2048 / 1000
    assert codec.decompress(content).shape == (2048, 2048, 3)


def test_the_shortest_stream_of_a_large_image_is_long_enough(codec):
    """64 megapixels of the most likely symbol of the table that is most certain of it."""
    coder = codec.latents
    surest = int(coder._y.least_bits.argmin())
    row = torch.tensor(coder._y.rows[surest][: coder._y.lengths[surest]])
    likeliest = int(row.diff().argmax()) + coder._y.offsets[surest]
    shape = (1, 8, 8192 // 16, 8192 // 16)
    stream = coder._y.encode(torch.full(shape, likeliest), torch.full(shape, surest))
    assert len(stream) < 40
    latents.check_length(stream, coder._least_y, 16, 8192, 8192)
    with pytest.raises(BitstreamError, match="cannot come from a stream"):
        latents.check_length(stream, coder._least_y, 16, 8192 * 10, 8192 * 10)


def test_an_image_that_needs_more_memory_than_there_is_is_told(codec, monkeypatch):
    assert codec.memory_bytes(100, 130) == int(3.2 * 4 * 4 * 128 * 192)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(
        BitstreamError, match=r"130x100 pixels need about .* GiB of memory with this codec, and 0.0 GiB"
    ):
        codec.compress(picture(1, 100, 130))


def test_want_of_memory_on_the_way_is_one_line():
    """As under `ulimit -v`, where the machine has memory and the process may not have it."""
    script = """
import resource, sys
import numpy as np
from pipeline.bitstream.codec import ImageCodec
from pipeline.errors import BitstreamError
from tests.models.test_networks import small_codec

codec = ImageCodec(small_codec())
codec.compress(np.zeros((64, 64, 3), np.uint8))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
try:
    codec.compress(np.zeros((2048, 2048, 3), np.uint8))
except BitstreamError as error:
    sys.exit(0 if "more than this process may allocate" in str(error) else 3)
sys.exit(4)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0xF0])
def test_long_runs_of_escapes_do_not_leave_the_buffer(codec, fill):
    content = container.pack(Packet(codec.bitstream_id, 64, 64, bytes([fill]) * 4096, bytes([fill]) * 4096))
    assert codec.decompress(content).shape == (64, 64, 3)


def test_pixels_are_clamped_and_rounded_and_what_is_no_number_is_black():
    """Halves go to the even neighbor, as torch and the published evaluation round."""
    levels = torch.tensor([126.4, 126.5, 127.5, 126.6, 300.0, -4.0, float("nan")]) / 255
    assert to_pixels(levels.expand(3, 1, 7))[0, :, 1].tolist() == [126, 126, 128, 127, 255, 0, 0]


def test_only_the_transforms_go_to_another_device():
    """As far as a machine without a GPU can tell: the "meta" device holds no numbers."""
    codec = ImageCodec(small_codec(), torch.device("meta"))
    placed = {name: parameter.device.type for name, parameter in codec.codec.named_parameters()}
    transforms = {name for name in placed if name.startswith(("analysis.", "synthesis."))}
    assert transforms
    assert {placed[name] for name in transforms} == {"meta"}
    assert {placed[name] for name in placed.keys() - transforms} == {"cpu"}
    assert codec.bitstream_id == ImageCodec(small_codec()).bitstream_id
