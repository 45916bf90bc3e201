"""Streams of files of version 1: CompressAI's coder, and indexes of tables from floating point.

They decode as long as this machine rounds like the one that wrote them, and nothing in them says when it does not.
"""

import math

import torch
from torch import Tensor

from pipeline.bitstream.container import Packet, padded
from pipeline.bitstream.symbols import Symbols
from pipeline.errors import BitstreamError
from pipeline.models.codec import HYPER_STRIDE, LATENT_STRIDE, Codec
from pipeline.models.entropy import ans
from pipeline.models.tables import PRECISION, Tables, checked_tables

# rANS may spend less than the ideal by some 2**-14 bits per symbol and 64 bits of state; a wide margin
SPENT_AT_LEAST, STATE_BITS = 0.25, 128
# The encoder's last state, with which every stream begins
STATE_BYTES = 8


@torch.no_grad()
def decode(codec: Codec, packet: Packet) -> Symbols:
    """The symbols in a file. Any bytes are safe to pass.

    Raises: BitstreamError if the streams are too short for so many pixels.
    """
    height, width = padded(packet.height), padded(packet.width)
    z_tables, y_tables = checked_tables(codec)
    z_stream, y_stream = packet.streams
    # of one position of z and of y, all channels together
    check_length(z_stream, float(least_bits(z_tables).sum()), HYPER_STRIDE, height, width)
    least_y = float(least_bits(y_tables).min()) * codec.cfg.latent_channels
    check_length(y_stream, least_y, LATENT_STRIDE, height, width)
    shape = (1, codec.cfg.hyper_channels, height // HYPER_STRIDE, width // HYPER_STRIDE)
    channel = torch.arange(shape[1], dtype=torch.int32).reshape(1, -1, 1, 1).expand(shape)
    z = decode_stream(z_stream, z_tables, channel)
    # Another memory layout rounds differently
    codec.hyper_synthesis_scale.to(memory_format=torch.contiguous_format)
    scales = codec.hyper_synthesis_scale(z.to(torch.float32) + codec.medians()).float()
    return Symbols(z, decode_stream(y_stream, y_tables, codec.entropy.build_indexes(scales)))


def decode_stream(stream: bytes, tables: Tables, indexes: Tensor) -> Tensor:
    """The int32 symbols of a stream. Shapes: indexes (1, C, h, w); returns the same."""
    given = stream_with_room(stream, indexes.numel())
    flat = ans.RansDecoder().decode_with_indexes(
        given, indexes.flatten().tolist(), tables.rows, tables.lengths, tables.offsets
    )
    return torch.tensor(flat, dtype=torch.int32).reshape(indexes.shape)


def check_length(stream: bytes, least: float, stride: int, height: int, width: int) -> None:
    """Raises: BitstreamError if no encoder makes so short a stream of an image of that padded size.

    least: bits that one position of a latent costs, of which there is one per `stride` pixels in each direction.
    """
    positions = (height // stride) * (width // stride)
    shortest = max((least * positions * SPENT_AT_LEAST - STATE_BITS) / 8, STATE_BYTES)
    if len(stream) < shortest:
        raise BitstreamError(
            f"malformed: {width}x{height} pixels cannot come from a stream of {len(stream)} bytes; "
            f"the shortest one has {math.ceil(shortest)}"
        )


def least_bits(tables: Tables) -> Tensor:
    """The fewest bits that a symbol of each row can cost."""
    used = (torch.tensor(row[:length]) for row, length in zip(tables.rows, tables.lengths, strict=True))
    return torch.stack([PRECISION - row.diff().max().double().log2() for row in used])


def stream_with_room(stream: bytes, num_symbols: int) -> bytes:
    """`stream` and so many zeros that CompressAI's decoder, which knows no length, cannot leave the buffer.

    A symbol takes at most one 32-bit word, an escaped one as many 4-bit digits as digits before them say. Of what is read
    behind the stream, whoever made it can choose no more than the decoder's state of 63 bits: 16 digits of 15, which stand
    for 240 digits. What comes later is arithmetic of that state; in a search over 860,000 streams and tables no stream was
    left by more than 2.1 bytes per symbol, and 12 are given.
    """
    return stream + bytes(12 * num_symbols + 16 * len(stream) + 64)
