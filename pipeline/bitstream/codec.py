"""Image pixels to a compressed file and back, with the codec of an artifact."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.bitstream import container
from pipeline.bitstream.container import Packet, padded
from pipeline.bitstream.latents import LatentCoder, Symbols
from pipeline.data.images import Pixels
from pipeline.data.transforms import to_float
from pipeline.errors import BitstreamError, is_out_of_memory
from pipeline.models import serialization
from pipeline.models.codec import Codec
from pipeline.registry import resolve

CPU = torch.device("cpu")


class CompressedImage(NamedTuple):
    """A file's bytes, and the latent that the encoder coded."""

    content: bytes
    symbols: Symbols


class DecompressedImage(NamedTuple):
    """Pixels (H, W, 3) uint8 RGB, and the latent decoded from the file."""

    pixels: Pixels
    symbols: Symbols


class ImageCodec:
    """Compresses and decompresses 8-bit RGB images of any size.

    The hyperprior runs on the CPU: means and scales decide which table decodes each symbol, and another device's rounding
    would decode garbage. So do analysis and synthesis, unless another device is given for them.
    """

    def __init__(self, codec: Codec, transforms_on: torch.device = CPU):
        self.codec, self.transforms_on = codec.eval(), transforms_on
        codec.analysis.to(transforms_on)
        codec.synthesis.to(transforms_on)
        self.latents = LatentCoder(codec)
        self.bitstream_id = codec.bitstream_id()

    @classmethod
    def load(cls, name: str, transforms_on: torch.device = CPU) -> "ImageCodec":
        """From an artifact: a run folder or a models:/ URI. Raises: ArtifactError."""
        return cls(serialization.load_codec(resolve.read(name, "codec")), transforms_on)

    def compress(self, pixels: Pixels) -> bytes:
        """The compressed file of an image. Shapes: pixels (H, W, 3) uint8 RGB, any sides of at least 1.

        Raises: BitstreamError as `encode` does.
        """
        return self.encode(pixels).content

    def decompress(self, content: bytes) -> Pixels:
        """The image in a compressed file. Shapes: returns (H, W, 3) uint8 RGB.

        Raises: BitstreamError as `decode` does.
        """
        return self.decode(content).pixels

    def encode(self, pixels: Pixels) -> CompressedImage:
        """The compressed file of an image, verified by decoding its latent again.

        Shapes: pixels (H, W, 3) uint8 RGB, any sides of at least 1.
        Raises: BitstreamError if its latent is not finite or too large, or memory does not suffice.
        """
        height, width = pixels.shape[:2]
        if padded(height) * padded(width) > container.MAX_PIXELS:
            raise BitstreamError(
                f"{width}x{height} pixels are more than the {container.MAX_PIXELS} that a file can hold"
            )
        with self._memory_for(height, width), torch.no_grad():
            z_stream, y_stream, symbols = self.latents.encode(pad(to_float(pixels[None]).to(self.transforms_on)))
        return CompressedImage(container.pack(Packet(self.bitstream_id, height, width, z_stream, y_stream)), symbols)

    def decode(self, content: bytes) -> DecompressedImage:
        """The image in a compressed file and the latent it was made from.

        Raises: BitstreamError if the file is damaged, foreign, or made by a codec with other entropy models, or memory does
        not suffice.
        """
        packet = container.unpack(content)
        if packet.bitstream_id != self.bitstream_id:
            raise BitstreamError(
                f"made by another model: bitstream id {packet.bitstream_id.hex()}, this codec reads "
                f"{self.bitstream_id.hex()}; name the codec it was made with, or one fine-tuned from it"
            )
        height, width = padded(packet.height), padded(packet.width)
        with self._memory_for(height, width), torch.no_grad():
            symbols, y_hat = self.latents.decode(packet.hyper_stream, packet.latent_stream, height, width)
            x_hat = self.codec.synthesis(y_hat.to(self.transforms_on)).cpu()
            return DecompressedImage(to_pixels(x_hat[0, :, : packet.height, : packet.width]), symbols)

    def memory_bytes(self, height: int, width: int) -> int:
        """Estimated memory to compress or decompress an image, without the weights: measured at 3 to 3.2 activations of
        the first convolution's width, in 32-bit numbers.
        """
        return int(3.2 * 4 * self.codec.cfg.channels[0] * padded(height) * padded(width))

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


def pad(x: Tensor) -> Tensor:
    """Pads right and bottom to multiples of 64, by reflection where the image is large enough and by repetition where not.

    Shapes: x (1, 3, H, W).
    """
    height, width = x.shape[-2:]
    right, bottom = padded(width) - width, padded(height) - height
    x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    return F.pad(x, (0, 0, 0, bottom), mode="reflect" if bottom < height else "replicate")


def to_pixels(x_hat: Tensor) -> Pixels:
    """Clamped and rounded to 8 bits. Shapes: x_hat (3, H, W); returns (H, W, 3)."""
    clean = torch.nan_to_num(x_hat, nan=0.0).clamp(0, 1)
    return (clean * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
