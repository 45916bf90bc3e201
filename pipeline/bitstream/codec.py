"""Image pixels to a compressed file and back, with the codec of an artifact."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.bitstream import container, latents, version1
from pipeline.bitstream.container import Packet, padded
from pipeline.bitstream.latents import LatentCoder, Size
from pipeline.bitstream.symbols import Symbols
from pipeline.data.images import DAMAGE, Pixels
from pipeline.errors import BitstreamError, is_out_of_memory
from pipeline.log import logger
from pipeline.models import serialization
from pipeline.models.codec import LATENT_STRIDE, Codec
from pipeline.registry import resolve

CPU = torch.device("cpu")
# Bytes per element of a window's largest map, per coded symbol, and per pixel of what the residual blocks see at once; measured
# images took half to all of the estimate made of them
PER_WINDOW_ELEMENT, PER_SYMBOL, PER_PIXEL = 13, 40, 12


class CompressedImage(NamedTuple):
    """A file's bytes, and the latent that the encoder coded."""

    content: bytes
    symbols: Symbols


class DecompressedImage(NamedTuple):
    """Pixels (H, W, 3) uint8 RGB, opacity (H, W) uint8 if the image has any, and the latent decoded from the file."""

    pixels: Pixels
    symbols: Symbols
    opacity: NDArray[np.uint8] | None = None


class ImageCodec:
    """Compresses and decompresses 8-bit RGB images of any size.

    The hyperprior runs on the CPU. So do analysis and synthesis, unless another device is given for them.
    """

    def __init__(self, codec: Codec, transforms_on: torch.device = CPU):
        self.codec = codec.eval()
        # in this layout, convolutions take about a tenth less time on a CPU
        for network in (codec.analysis, codec.synthesis):
            network.to(transforms_on)
            network.to(memory_format=torch.channels_last)
        self.latents = LatentCoder(codec, transforms_on)
        self.bitstream_id = codec.bitstream_id()

    @classmethod
    def load(cls, name: str, transforms_on: torch.device = CPU) -> "ImageCodec":
        """From an artifact: a run folder or a models:/ URI. Raises: ArtifactError."""
        return cls(serialization.load_codec(resolve.read(name, "codec")), transforms_on)

    def compress(self, pixels: Pixels, opacity: NDArray[np.uint8] | None = None) -> bytes:
        """The compressed file of an image. Shapes: pixels (H, W, 3) uint8 RGB, any sides of at least 1; opacity (H, W).

        Raises: BitstreamError as `encode` does.
        """
        return self.encode(pixels, opacity).content

    def decompress(self, content: bytes) -> Pixels:
        """The image in a compressed file. Shapes: returns (H, W, 3) uint8 RGB.

        Raises: BitstreamError as `decode` does.
        """
        return self.decode(content).pixels

    def encode(self, pixels: Pixels, opacity: NDArray[np.uint8] | None = None) -> CompressedImage:
        """The compressed file of an image, verified by decoding its latent again.

        Shapes: pixels (H, W, 3) uint8 RGB, any sides of at least 1; opacity (H, W) uint8, stored without loss.
        Raises: BitstreamError if its latent is not finite or too large, or memory does not suffice.
        """
        height, width = pixels.shape[:2]
        if padded(height) * padded(width) > container.MAX_PIXELS:
            raise BitstreamError(
                f"{width}x{height} pixels are more than the {container.MAX_PIXELS} that a file can hold"
            )
        with self._memory_for(height, width):
            stream, symbols = self.latents.encode(pixels)
            transparency = b"" if opacity is None else _png(opacity)
            packet = Packet(
                container.VERSION, self.bitstream_id, height, width, (stream,), _is_gray(pixels), transparency
            )
        return CompressedImage(container.pack(packet), symbols)

    def decode(self, content: bytes) -> DecompressedImage:
        """The image in a compressed file and the latent it was made from.

        Raises: BitstreamError if the file is damaged, foreign, or made by a codec with other entropy models, or memory does
        not suffice.
        """
        packet = container.unpack(content)
        ours = self.codec.version_1_id() if packet.version == 1 else self.bitstream_id
        if packet.bitstream_id != ours[: len(packet.bitstream_id)]:
            raise BitstreamError(
                f"made by another model: bitstream id {packet.bitstream_id.hex()}, this codec reads "
                f"{ours[: len(packet.bitstream_id)].hex()}; name the codec it was made with, or one fine-tuned from it"
            )
        size = Size(packet.height, packet.width)
        with self._memory_for(*size):
            if packet.version == 1:
                logger.warning(
                    "a file of format version 1: it may decode to garbage on another machine than it was made on; look at the "
                    "image, and compress the original again"
                )
                symbols = version1.decode(self.codec, packet)
            else:
                symbols = self.latents.decode(packet.streams[0], size)
            opacity = _opacity(packet) if packet.transparency else None
            pixels = self.latents.restored(symbols, size)
            if packet.is_gray:
                pixels = _gray(pixels)
            return DecompressedImage(pixels, symbols, opacity)

    def memory_bytes(self, height: int, width: int) -> int:
        """Estimated memory to compress or decompress an image, without the weights."""
        cfg, synthesis, (rows, columns) = self.codec.cfg, self.codec.synthesis, Size(height, width).y_padded
        side = LATENT_STRIDE * (latents.UP + 2 * synthesis.up_halo)
        window = min(side, rows * LATENT_STRIDE) * min(side, columns * LATENT_STRIDE)
        inner = latents.RESIDUAL + 2 * synthesis.halo
        features = min(inner, rows) * min(inner, columns) * cfg.channels[-1] * 16
        part = min(latents.RESIDUAL, rows) * min(latents.RESIDUAL, columns) * LATENT_STRIDE**2 * PER_PIXEL
        whole = rows * columns * (PER_SYMBOL * cfg.latent_channels + 8 * LATENT_STRIDE**2)
        return int(window * PER_WINDOW_ELEMENT * cfg.elements_per_pixel) + features + part + whole

    @contextmanager
    def _memory_for(self, height: int, width: int) -> Iterator[None]:
        """Raises: BitstreamError if an image needs more memory than there is, before it is allocated, or when that fails."""
        needed, free = self.memory_bytes(height, width), psutil.virtual_memory().available
        told = f"{width}x{height} pixels need about {needed / 2**30:.1f} GiB of memory with this codec"
        if needed > free:
            raise BitstreamError(
                f"{told}, and {free / 2**30:.1f} GiB are free; use a larger machine or a smaller image"
            )
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise BitstreamError(
                f"{told}, more than this process may allocate; use a larger machine or a smaller image"
            ) from None


def _is_gray(pixels: Pixels) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())


def _gray(pixels: Pixels) -> Pixels:
    """All three channels at their mean, rounded."""
    mean = (pixels.sum(axis=2, dtype=np.uint16) + 1) // 3
    return np.repeat(mean.astype(np.uint8)[..., None], 3, axis=2)


def _png(opacity: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(opacity).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _opacity(packet: Packet) -> NDArray[np.uint8]:
    """Raises: BitstreamError if it is not a PNG file of the image's size."""
    told = f"malformed: its transparency is not a grayscale PNG file of {packet.width}x{packet.height} pixels"
    try:
        with Image.open(io.BytesIO(packet.transparency), formats=["PNG"]) as image:
            if image.mode != "L" or image.size != (packet.width, packet.height):
                raise BitstreamError(told)
            return np.array(image)
    except DAMAGE:
        raise BitstreamError(told) from None
