"""Files of real photos decode to the symbols that the encoder meant."""

import os

import numpy as np
import pytest
import torch

from pipeline.bitstream import container
from pipeline.bitstream.codec import ImageCodec
from pipeline.bitstream.latents import Size, padded_pixels
from pipeline.data.transforms import to_float
from pipeline.errors import BitstreamError
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.tables import MAX_SYMBOL
from tests.support.photos import crops

DEMO = CodecConfig(channels=(8, 24, 48, 96, 128), latent_channels=64, hyper_channels=48, num_residual_blocks=2)
WIDE = CodecConfig(channels=(8, 16, 24, 32, 48), latent_channels=192, hyper_channels=128, num_residual_blocks=1)


@pytest.fixture(autouse=True)
def several_threads():
    """As a user's process has, unlike the rest of the suite: how work is divided among threads decides how sums round."""
    kept = torch.get_num_threads()
    torch.set_num_threads(max(2, os.cpu_count() or 1))
    yield
    torch.set_num_threads(kept)


@pytest.fixture(scope="module")
def photos():
    return crops(2, 384)


def trained_like(cfg: CodecConfig, pixels: np.ndarray) -> Codec:
    """A random codec whose latents, hyper-latents and scales spread over as many symbols and tables as a trained one's."""
    torch.manual_seed(0)
    codec = Codec(cfg)
    x = to_float(padded_pixels(pixels)[None])
    with torch.no_grad():
        _spread(codec.analysis[-1], codec.analysis(x), 0, 4)
        y = codec.analysis(x)
        _spread(codec.hyper_analysis[-1], codec.hyper_analysis(y), 0, 3)
        z_hat = codec.hyper_analysis(y).round()
        _spread(codec.hyper_synthesis_scale[-1], codec.hyper_synthesis_scale(z_hat), 2, 2)
        _spread(codec.hyper_synthesis_mean[-1], codec.hyper_synthesis_mean(z_hat), 0, 2)
    codec.update_tables()
    return codec


def _spread(layer: torch.nn.Conv2d, output: torch.Tensor, mean: float, deviation: float) -> None:
    factor = deviation / output.std()
    layer.weight.mul_(factor)
    layer.bias.mul_(factor).add_(mean - output.mean() * factor)


@pytest.mark.parametrize(
    ("cfg", "side", "memory_format"),
    [(DEMO, 384, torch.contiguous_format), (WIDE, 256, torch.channels_last)],
    ids=["demo", "wide, channels last"],
)
def test_the_decoded_symbols_of_a_hundred_photos_are_the_encoders(cfg, side, memory_format):
    photos = crops(104, side)
    codec = trained_like(cfg, photos[0])
    writer = ImageCodec(codec.to(memory_format=memory_format))
    reader = ImageCodec(trained_like(cfg, photos[0]))
    wrong, tables = [], set()
    for number, pixels in enumerate(photos):
        content, meant = writer.encode(pixels)
        found = reader.latents.decode(container.unpack(content).streams[0], Size(*pixels.shape[:2]))
        if not found.equals(meant):
            wrong.append(number)
        if number % 10 == 0:  # what the encoder means is what the network computes
            with torch.no_grad():
                y = codec.analysis(to_float(padded_pixels(pixels)[None]).contiguous(memory_format=memory_format))
                assert torch.equal((codec.hyper_analysis(y) - codec.medians()).round().int(), found.z)
                rows, columns = found.y.shape[-2:]
                y_hat = reader.latents.means(found.z)[..., :rows, :columns] + found.y
            assert (y_hat - y[..., :rows, :columns]).abs().max() <= 0.5 + 1e-4
            tables |= set(reader.latents.exact_scales.indexes(found.z).unique().tolist())
    assert not wrong
    assert len(tables) > 30  # else few scales were near a border of tables


def test_what_does_not_come_back_is_not_written(photos, monkeypatch):
    """As if integers were not exact: one table of many is another for the encoder than for the decoder."""
    codec = ImageCodec(trained_like(DEMO, photos[0]))
    computed, calls = codec.latents.indexes, []

    def differing(z, size):
        indexes = computed(z, size)
        calls.append(z)
        if len(calls) == 1:  # the encoder's
            indexes.view(-1)[1000] ^= 1
        return indexes

    monkeypatch.setattr(codec.latents, "indexes", differing)
    with pytest.raises(BitstreamError, match="do not decode to what was encoded"):
        codec.compress(photos[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9, 1.2e9, MAX_SYMBOL + 1.0])
def test_a_diverged_codec_is_refused_and_does_not_hang(photos, value):
    codec = ImageCodec(trained_like(DEMO, photos[0]))
    with torch.no_grad():
        codec.codec.analysis[-1].bias[3] = value
    with pytest.raises(BitstreamError, match=r"can be coded: its training diverged"):
        codec.compress(photos[0])


def test_a_digest_names_the_latent_and_not_the_file(photos):
    codec = ImageCodec(trained_like(DEMO, photos[0]))
    content, meant = codec.encode(photos[1])
    assert codec.decode(content).symbols.digest() == meant.digest()
    other = meant.y.clone()
    other[0, 5, 2, 1] += 1
    assert meant._replace(y=other).digest() != meant.digest()
