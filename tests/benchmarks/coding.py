"""Compressing and decompressing at the published size: the entropy coder alone, whole images against the published
implementation, where the time goes, and how long a command takes to start.

IMAGES=folder holds photos, of which the middle 768x512 of four are taken; without it they are synthetic.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.bitstream.codec import ImageCodec
from pipeline.bitstream.latents import Size, padded_pixels, to_symbols
from pipeline.bitstream.symbols import SymbolCoder, Symbols
from pipeline.data import images
from pipeline.data.images import Pixels
from pipeline.data.transforms import to_float
from pipeline.models import reference_keys
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.tables import checked_tables
from tests.benchmarks.evaluation import COUNT, HEIGHT, WIDTH, photos
from tests.benchmarks.measure import Row, faster, pairs, seconds
from tests.conftest import ROOT

REFERENCE_CALLS = "CompressAI's calls"
PUBLISHED = "the published implementation"


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    codec = spread(Codec(CodecConfig()), photos()[0])
    image_codec = ImageCodec(codec)
    yield from coder_alone(image_codec)
    yield from whole_images(image_codec)
    yield from parts(image_codec)
    yield file_against_estimate()
    yield start_up()


def spread(codec: Codec, pixels: object) -> Codec:
    """A random codec whose latents and scales spread over as many symbols and tables as a trained one's."""
    from tests.bitstream.test_round_trip import _spread

    x = to_float(pixels[None])  # type: ignore[index]
    with torch.no_grad():
        _spread(codec.analysis[-1], codec.analysis(x), 0, 1)  # type: ignore[arg-type]
        y = codec.analysis(x)
        _spread(codec.hyper_analysis[-1], codec.hyper_analysis(y), 0, 1.5)  # type: ignore[arg-type]
        z_hat = codec.hyper_analysis(y).round()
        _spread(codec.hyper_synthesis_scale[-1], codec.hyper_synthesis_scale(z_hat), 1.2, 0.3)  # type: ignore[arg-type]
        _spread(codec.hyper_synthesis_mean[-1], codec.hyper_synthesis_mean(z_hat), 0, 0.2)  # type: ignore[arg-type]
    codec.update_tables()
    return codec.eval().requires_grad_(False)


def coder_alone(codec: ImageCodec) -> Iterator[Row]:
    """Symbols of an image of 768x512 at the published width, drawn from their tables: a file of 23 and one of 114 kB."""
    z_tables, y_tables = checked_tables(codec.codec)
    ours, plain = codec.latents.coder, SymbolCoder(z_tables, y_tables, plain=True)
    hyper_entropy, entropy = codec.codec.hyper_entropy, codec.codec.entropy
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 320, 8, 12, generator=generator).round().int()
    unit = "million symbols /s"
    for name, level in (("low rate", -4.0), ("high rate", -0.1)):
        scales = torch.exp(level + 1.5 * torch.randn(1, 220, 32, 48, generator=generator))
        indexes = codec.codec.entropy.build_indexes(scales).int()
        drawn = torch.randn(scales.shape, generator=generator) * scales.clamp(0.11, 250)
        symbols = Symbols(z, drawn.clamp(-4 * scales.clamp(min=0.11), 4 * scales.clamp(min=0.11)).round().int())
        stream, count = ours.encode(symbols, indexes), symbols.y.numel() + z.numel()
        y_float, z_float = symbols.y.float(), z + codec.codec.medians()
        theirs = [hyper_entropy.compress(z_float)[0], entropy.compress(y_float, indexes)[0]]

        def their_encode(y: Tensor = y_float, z: Tensor = z_float, indexes: Tensor = indexes) -> object:
            return hyper_entropy.compress(z), entropy.compress(y, indexes)

        def their_decode(theirs: list[bytes] = theirs, indexes: Tensor = indexes) -> tuple[Tensor, Tensor]:
            return hyper_entropy.decompress(theirs[:1], z.shape[-2:]), entropy.decompress(theirs[1:], indexes)

        def our_encode(symbols: Symbols = symbols, indexes: Tensor = indexes) -> bytes:
            return ours.encode(symbols, indexes)

        def our_decode(stream: bytes = stream, indexes: Tensor = indexes, coder: SymbolCoder = ours) -> Symbols:
            return coder.decode(stream, tuple(z.shape), lambda _: indexes)

        assert our_decode().equals(symbols)
        assert torch.equal(their_decode()[1], symbols.y.float())
        for verb, mine, peer in (("encode", our_encode, their_encode), ("decode", our_decode, their_decode)):
            row = faster(f"entropy coder alone, {name}: {verb}", mine, peer, count, unit, REFERENCE_CALLS, 15)
            yield Row(row.name, row.ours / 1e6, unit, (row.peer or 0) / 1e6, REFERENCE_CALLS)
        slow = seconds(partial(our_decode, coder=plain))
        yield Row(f"entropy coder alone, {name}: decode in plain Python", count / 1e6 / slow, unit)
        yield Row(
            f"entropy coder alone, {name}: size (less is better)",
            len(stream),
            "bytes",
            sum(map(len, theirs)),
            REFERENCE_CALLS,
        )


def whole_images(codec: ImageCodec) -> Iterator[Row]:
    found = photos()
    files = [codec.compress(image) for image in found]
    megapixels = COUNT * WIDTH * HEIGHT / 1e6
    if importlib.util.find_spec("neuralcompression") is None:
        yield Row(
            "compress, published size",
            megapixels / seconds(lambda: [codec.compress(i) for i in found]),
            "megapixels /s",
        )
        yield Row(
            "decompress, published size",
            megapixels / seconds(lambda: [codec.decompress(f) for f in files]),
            "megapixels /s",
        )
        return
    from neuralcompression.models import HiFiCAutoencoder

    theirs = HiFiCAutoencoder().eval().requires_grad_(False)
    state = reference_keys.export_state(codec.codec.state_dict(), codec.codec.cfg, {}, False)
    for bottleneck in ("latent_bottleneck", "hyper_bottleneck"):
        for name in ("_offset", "_quantized_cdf", "_cdf_length", "scale_table"):
            if (value := state.get(f"{bottleneck}.{name}")) is not None:
                setattr(getattr(theirs, bottleneck), name, value)
    theirs.load_state_dict(state)
    theirs.update_tensor_devices("compress")
    floats = [torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in found]
    packets = [theirs.compress(x) for x in floats]

    def peer_compress() -> object:
        return [theirs.compress(x) for x in floats]

    for name, mine, peer in (
        ("compress, published size", lambda: [codec.compress(image) for image in found], peer_compress),
        (
            "decompress, published size",
            lambda: [codec.decompress(f) for f in files],
            lambda: [theirs.decompress(p) for p in packets],
        ),
    ):
        ours_s, theirs_s = pairs(mine, peer, 3)
        yield Row(name, megapixels / ours_s, "megapixels /s", megapixels / theirs_s, PUBLISHED)


def parts(codec: ImageCodec) -> Iterator[Row]:
    """Seconds per megapixel of one photo, part by part; an encoder decodes its stream once more to be sure of it."""
    latents, pixels = codec.latents, photos()[0]
    size, megapixels = Size(HEIGHT, WIDTH), WIDTH * HEIGHT / 1e6
    y = latents._analysis(padded_pixels(pixels))
    z = to_symbols(codec.codec.hyper_analysis(y) - codec.codec.medians())
    indexes, means = latents.indexes(z, size), latents.means(z)
    symbols = Symbols(z, to_symbols(y - means))
    stream = latents.coder.encode(symbols, indexes)
    for name, call in {
        "analysis": lambda: latents._analysis(padded_pixels(pixels)),
        "hyper-analysis": lambda: codec.codec.hyper_analysis(y),
        "means": lambda: latents.means(z),
        "indexes of tables": lambda: latents.indexes(z, size),
        "encode symbols": lambda: latents.coder.encode(symbols, indexes),
        "decode symbols": lambda: latents.coder.decode(stream, tuple(z.shape), lambda _: indexes),
        "synthesis, with means": lambda: latents.restored(symbols, size),
    }.items():
        seconds(call)
        yield Row(f"part: {name}", min(seconds(call) for _ in range(3)) / megapixels, "s/megapixel")


def file_against_estimate() -> Row:
    """Files of all photos in IMAGES, or of the synthetic ones, by the package's codec of medium quality."""
    image_codec = ImageCodec.load("shipped:medium")
    codec = image_codec.codec
    found = all_photos() or photos()
    estimated = sum(float(codec.encode(to_float(padded_pixels(image)[None]))[1]) for image in found) / 8
    written = sum(len(image_codec.compress(image)) for image in found)
    name = f"bytes of {len(found)} files against their likelihood (less is better)"
    return Row(name, written, "bytes", estimated, "likelihood")


def all_photos() -> list[Pixels]:
    folder = os.environ.get("IMAGES")
    paths = (
        [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in images.SUFFIXES] if folder else []
    )
    return [images.decode(path).pixels for path in paths]


def start_up() -> Row:
    """A command as a user starts it, on a small photo and the codec of the tests."""
    golden = ROOT / "tests" / "bitstream" / "golden"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "pipeline", "decompress", str(golden / "version2.illm"), str(Path(folder) / "a.png"),
            "--codec", str(golden / "codec"), "--force",
        ]  # fmt: skip
        times = [seconds(lambda: subprocess.run(command, check=True, capture_output=True, cwd=ROOT)) for _ in range(5)]
    return Row("illm decompress of a 200x150 photo, from start to end (less is better)", min(times), "s")
