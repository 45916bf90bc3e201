import dataclasses
import io
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipeline.bitstream import container, latents
from pipeline.bitstream.codec import ImageCodec
from pipeline.bitstream.container import Packet
from pipeline.bitstream.latents import padded_pixels, to_pixels
from pipeline.bitstream.tiling import tiled
from pipeline.data.transforms import to_float
from pipeline.errors import BitstreamError
from pipeline.models import fixed_point
from pipeline.models.codec import Codec, round_around
from pipeline.models.tables import checked_tables
from tests.conftest import ROOT, picture
from tests.models.test_networks import SMALL, SMALL_LIGHT, small_codec


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec(small_codec())


def forward_pass(codec: Codec, pixels: np.ndarray) -> np.ndarray:
    """What the networks make of an image, without a file; symbols of positions that lie in padding are zero."""
    height, width = pixels.shape[:2]
    with torch.no_grad():
        y = codec.analysis(to_float(padded_pixels(pixels)[None]))
        z_hat = round_around(codec.hyper_analysis(y), codec.medians())
        means, _ = codec.means_and_scales(z_hat)
        y_hat, rows, columns = means.clone(), -(-height // 16), -(-width // 16)
        y_hat[..., :rows, :columns] = round_around(y, means)[..., :rows, :columns]
        return to_pixels(codec.synthesis(y_hat)[0, :, :height, :width])


def test_a_light_codec_decompresses_to_its_forward_pass():
    light, pixels = ImageCodec(small_codec(cfg=SMALL_LIGHT)), picture(1, 65, 127)
    restored = light.decompress(light.compress(pixels))
    assert np.abs(restored.astype(int) - forward_pass(light.codec, pixels)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 200), (31, 33), (64, 64), (65, 127), (180, 70)])
def test_decompression_equals_the_forward_pass_for_any_size(codec, height, width):
    pixels = picture(1, height, width)
    restored = codec.decompress(codec.compress(pixels))
    assert restored.shape == pixels.shape
    # the networks round differently if they see another memory layout
    assert np.abs(restored.astype(int) - forward_pass(codec.codec, pixels)).max() <= 1


@pytest.mark.parametrize(
    ("cfg", "height", "width"), [(SMALL, 64, 64), (SMALL, 300, 400), (SMALL, 257, 800), (SMALL_LIGHT, 300, 400)]
)
def test_an_image_in_windows_is_the_image_without_seams(monkeypatch, cfg, height, width):
    """But for rounding: a window sees what it would see in the whole image."""
    codec = ImageCodec(small_codec(cfg=cfg))
    pixels = picture(3, height, width)
    monkeypatch.setattr(latents, "PIXELS", 128)
    monkeypatch.setattr(latents, "HYPER", 2)
    monkeypatch.setattr(latents, "RESIDUAL", 12)
    monkeypatch.setattr(latents, "UP", 5)
    restored = codec.decompress(codec.compress(pixels)).astype(int)
    assert np.abs(restored - forward_pass(codec.codec, pixels)).max() <= 1


@pytest.mark.parametrize("cfg", [SMALL, SMALL_LIGHT])
def test_windows_of_each_network_see_far_enough(cfg):
    """Windows of a few positions give what the whole gives, for networks that look as far as they can."""
    network = small_codec(cfg=cfg)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                part.weight.abs_()
    y, z = torch.rand(1, 8, 40, 56), torch.rand(1, 6, 10, 14)
    with torch.no_grad():
        for part, x, side, halo, scale in (
            (network.hyper_analysis, y, 8, latents.HYPER_ANALYSIS_HALO, {"down": latents.RATIO}),
            (network.hyper_synthesis_mean, z, 3, latents.HYPER_HALO, {"up": latents.RATIO}),
            (network.analysis, torch.rand(1, 3, 128, 192), 32, network.analysis.halo, {"down": 16}),
            (network.synthesis.features, y, 4, network.synthesis.halo - network.synthesis.up_halo, {}),
            (network.synthesis.up, torch.rand(1, 12, 10, 9), 4, network.synthesis.up_halo, {"up": 16}),
        ):
            whole = part(x)
            assert torch.allclose(tiled(part, x, side, halo, **scale), whole, rtol=1e-4, atol=1e-5)
            # and it shows where they do not
            assert not torch.allclose(tiled(part, x, side, 0, **scale), whole, rtol=1e-4, atol=1e-5)


def test_padding_repeats_the_border():
    pixels = picture(1, 70, 100)
    padded = padded_pixels(pixels)
    assert padded.shape == (128, 128, 3)
    assert np.array_equal(padded[:70, :100], pixels)
    assert (padded[70:, :100] == pixels[69]).all()
    assert (padded[:70, 100:] == pixels[:, 99:]).all()
    assert (padded[70:, 100:] == pixels[69, 99]).all()


def test_gray_comes_back_gray(codec):
    gray = np.repeat(picture(1)[..., :1], 3, axis=2)
    assert container.unpack(codec.compress(gray)).is_gray
    restored = codec.decompress(codec.compress(gray))
    assert np.array_equal(restored[..., 0], restored[..., 1])
    assert np.array_equal(restored[..., 0], restored[..., 2])
    in_color = forward_pass(codec.codec, gray).astype(float).mean(axis=2)
    assert np.abs(restored[..., 0] - in_color).max() <= 0.5
    assert not container.unpack(codec.compress(picture(1))).is_gray


def test_opacity_comes_back_without_loss(codec):
    pixels, opacity = picture(1, 70, 90), np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8)
    restored = codec.decode(codec.compress(pixels, opacity))
    assert np.array_equal(restored.opacity, opacity)
    assert np.array_equal(restored.pixels, codec.decompress(codec.compress(pixels)))
    assert codec.decode(codec.compress(pixels)).opacity is None


@pytest.mark.parametrize("transparency", [b"PNG", "small", "color"])
def test_a_transparency_of_another_kind_is_refused(codec, transparency):
    packet = container.unpack(codec.compress(picture(1, 70, 90)))
    if isinstance(transparency, str):
        stream = io.BytesIO()
        Image.new("L" if transparency == "small" else "RGB", (90, 69 + (transparency == "color"))).save(stream, "PNG")
        transparency = stream.getvalue()
    content = container.pack(dataclasses.replace(packet, transparency=transparency))
    with pytest.raises(BitstreamError, match="not a grayscale PNG file of 90x70"):
        codec.decode(content)


def test_the_file_is_as_long_as_its_ideal_code_says():
    network = small_codec()
    with torch.no_grad():  # scales that suit the latents, as after training
        network.analysis[-1].weight.mul_(20)
        network.hyper_synthesis_scale[-1].weight.zero_()
        network.hyper_synthesis_scale[-1].bias.fill_(9.6)
    network.update_tables()
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


@pytest.mark.parametrize(("height", "width"), [(2048, 2048), (4096, 4096), (64, 2**20), (11585, 11000)])
def test_few_bytes_cannot_claim_many_pixels(codec, height, width):
    """Refused before memory is asked for: the decoder would need gigabytes for these 10 bytes."""
    content = container.pack(Packet(2, codec.bitstream_id, height, width, (b"123456789\1",)))
    tracemalloc.start()
    with pytest.raises(BitstreamError, match=r"a stream of 10 bytes is too short for its image"):
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
    network.exact_scales = fixed_point.exact_scales(network, checked_tables(network)[0])
    codec = ImageCodec(network)
    content = codec.compress(np.zeros((2048, 2048, 3), np.uint8))
    assert len(content) < 2048 * 2048 / 1000
    assert codec.decompress(content).shape == (2048, 2048, 3)


def test_an_image_that_needs_more_memory_than_there_is_is_told(codec, monkeypatch):
    assert (
        codec.memory_bytes(100, 130)
        == 128 * 192 * (13 * 4) + 8 * 12 * (12 * 16) + 8 * 12 * (40 * 8 + 8 * 256) + 8 * 12 * 256 * 12
    )
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
from pipeline.models import fixed_point
from pipeline.models.codec import Codec, round_around
from pipeline.models.tables import checked_tables
from tests.models.test_networks import SMALL, SMALL_LIGHT, small_codec

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
