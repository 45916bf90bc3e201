"""A codec's latents to entropy-coded streams and back.

Both sides compute the tables' indexes from the same integers in the same memory layout: one index that differs ruins the
rest of a stream.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import BitstreamError
from pipeline.models.codec import HYPER_STRIDE, LATENT_STRIDE, Codec, check_sides
from pipeline.models.tables import MAX_SYMBOL, checked_tables

# rANS may spend less than the ideal by some 2**-14 bits per symbol and 64 bits of state; a wide margin
SPENT_AT_LEAST, STATE_BITS = 0.25, 128
# The encoder's last state, with which every stream begins
STATE_BYTES = 8


class Symbols(NamedTuple):
    """The symbols in a file: z (1, hyper_channels, H/64, W/64) and y (1, latent_channels, H/16, W/16), int32, contiguous."""

    z: Tensor
    y: Tensor

    def equals(self, other: "Symbols") -> bool:
        return torch.equal(self.z, other.z) and torch.equal(self.y, other.y)

    def digest(self) -> str:
        """SHA-256 of all numbers, z before y, as little-endian 32-bit integers."""
        return hashlib.sha256(b"".join(part.numpy().astype("<i4").tobytes() for part in self)).hexdigest()


class Encoded(NamedTuple):
    """The two streams of an image, and the symbols they code."""

    z_stream: bytes
    y_stream: bytes
    symbols: Symbols


class LatentCoder:
    """Encodes and decodes the latents of one codec, on the CPU but for the analysis.

    Source of the method: Ballé et al. 2018, arXiv:1802.01436.

    Raises: ValueError if the codec's tables are not safe for CompressAI's coder, which checks nothing.
    """

    def __init__(self, codec: Codec):
        self.codec = codec.eval()
        for network in (codec.hyper_synthesis_mean, codec.hyper_synthesis_scale):
            # Another layout rounds differently
            network.to(memory_format=torch.contiguous_format)
        self._z, self._y = checked_tables(codec)
        # of one position of z and of y, all channels together
        self._least_z = float(self._z.least_bits.sum())
        self._least_y = float(self._y.least_bits.min()) * codec.cfg.latent_channels

    @torch.no_grad()
    def encode(self, x: Tensor) -> Encoded:
        """The streams of an image, decoded again and compared. Shapes: x (1, 3, H, W) in [0, 1], sides multiples of 64.

        Raises: BitstreamError if the latents are not finite, larger than MAX_SYMBOL, or decode to others.
        """
        check_sides(x)
        # on whatever device the analysis is; from here on, on the CPU
        y = self.codec.analysis(x).cpu()
        z = to_symbols(self.codec.hyper_analysis(y) - self.codec.medians())
        means, indexes = self._means_and_indexes(z)
        symbols = Symbols(z, to_symbols(y - means))
        z_stream = self._z.encode(z, channel_of_each(z.shape))
        y_stream = self._y.encode(symbols.y, indexes)
        decoded, _ = self.decode(z_stream, y_stream, *x.shape[-2:])
        if not decoded.equals(symbols):
            wrong = int((decoded.y != symbols.y).sum() + (decoded.z != symbols.z).sum())
            raise BitstreamError(
                f"{wrong} of {symbols.z.numel() + symbols.y.numel()} symbols do not decode to what was encoded, so nothing "
                "was written; this is a fault of the program or of this machine: please report it with the image"
            )
        return Encoded(z_stream, y_stream, symbols)

    @torch.no_grad()
    def decode(self, z_stream: bytes, y_stream: bytes, height: int, width: int) -> tuple[Symbols, Tensor]:
        """The symbols in the streams of an image of that padded size, and the latent y_hat (1, latent_channels, H/16, W/16).

        Any bytes are safe to pass.
        Raises: BitstreamError if the streams are too short for so many pixels.
        """
        check_length(z_stream, self._least_z, HYPER_STRIDE, height, width)
        check_length(y_stream, self._least_y, LATENT_STRIDE, height, width)
        shape = (1, self.codec.cfg.hyper_channels, height // HYPER_STRIDE, width // HYPER_STRIDE)
        z = self._z.decode(z_stream, channel_of_each(shape))
        means, indexes = self._means_and_indexes(z)
        symbols = Symbols(z, self._y.decode(y_stream, indexes))
        return symbols, symbols.y + means

    def _means_and_indexes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means of y, and which table codes each of its symbols. Shapes: z (1, hyper_channels, h, w) int32, contiguous."""
        z_hat = z.to(torch.float32) + self.codec.medians()
        means, scales = self.codec.means_and_scales(z_hat)
        return means.contiguous(), self.codec.entropy.build_indexes(scales).contiguous()


def check_length(stream: bytes, least_bits: float, stride: int, height: int, width: int) -> None:
    """Raises: BitstreamError if no encoder makes so short a stream of an image of that padded size.

    least_bits: that one position of a latent costs, of which there is one per `stride` pixels in each direction.
    """
    positions = (height // stride) * (width // stride)
    least = max((least_bits * positions * SPENT_AT_LEAST - STATE_BITS) / 8, STATE_BYTES)
    if len(stream) < least:
        raise BitstreamError(
            f"malformed: {width}x{height} pixels cannot come from a stream of {len(stream)} bytes; "
            f"the shortest one has {math.ceil(least)}"
        )


def to_symbols(values: Tensor) -> Tensor:
    """Rounded to int32, contiguous. Raises: BitstreamError for what is not finite or larger than MAX_SYMBOL."""
    largest = values.abs().max()
    # So that NaN is refused, too
    if not bool(largest <= MAX_SYMBOL):
        raise BitstreamError(
            f"this codec makes a latent of magnitude {float(largest):g} of the image, and at most {MAX_SYMBOL} can be coded: "
            "its training diverged, or its weights are damaged; use another codec"
        )
    return values.round().to(torch.int32).clone(memory_format=torch.contiguous_format)


def channel_of_each(shape: tuple[int, ...]) -> Tensor:
    """The index of each hyper-latent's table, its channel. Shapes: returns `shape` (1, C, h, w), int32."""
    return torch.arange(shape[1], dtype=torch.int32).reshape(1, -1, 1, 1).expand(shape).contiguous()
