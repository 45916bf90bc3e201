"""The integer tables that a codec's files are coded with, and CompressAI's rANS coder behind them.

That coder checks nothing, so whatever it is given is checked before: tables when a codec is loaded, symbols before they are
encoded (`MAX_SYMBOL`), and streams are padded before they are decoded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.codec import Codec
from pipeline.models.entropy import EntropyModel, ans

# Bits of a frequency: a row of a table ends with 2**16
PRECISION = 16
# |symbol| of what is encoded; trained codecs stay below 2**11. Beyond 2**31 CompressAI's encoder never returns.
MAX_SYMBOL = 2**15


@dataclass(frozen=True)
class Tables:
    """Cumulative frequencies of symbols, one row per index, as lists, which CompressAI takes.

    least_bits: the fewest bits that a symbol of each row can cost.
    """

    rows: list[list[int]]
    lengths: list[int]
    offsets: list[int]
    least_bits: Tensor

    def encode(self, symbols: Tensor, indexes: Tensor) -> bytes:
        """The stream of int32 symbols. Shapes: both (1, C, h, w)."""
        flat = symbols.flatten().tolist()
        return ans.RansEncoder().encode_with_indexes(
            flat, indexes.flatten().tolist(), self.rows, self.lengths, self.offsets
        )

    def decode(self, stream: bytes, indexes: Tensor) -> Tensor:
        """The int32 symbols of a stream. Shapes: indexes (1, C, h, w); returns the same."""
        padded = _padded(stream, indexes.numel())
        flat = ans.RansDecoder().decode_with_indexes(
            padded, indexes.flatten().tolist(), self.rows, self.lengths, self.offsets
        )
        return torch.tensor(flat, dtype=torch.int32).reshape(indexes.shape)


def checked_tables(codec: Codec) -> tuple[Tables, Tables]:
    """The tables of z and of y. Raises: ValueError naming what is wrong with them."""
    scales = codec.entropy.scale_table
    if not (scales.ndim == 1 and 1 <= len(scales) <= 1024 and bool((scales.diff() > 0).all()) and scales[0] > 0):
        raise ValueError("entropy.scale_table: expected 1 to 1024 rising positive numbers")
    z = _checked("hyper_entropy", codec.hyper_entropy, codec.cfg.hyper_channels)
    return z, _checked("entropy", codec.entropy, len(scales))


def _checked(name: str, model: EntropyModel, num_rows: int) -> Tables:
    cdf, lengths, offsets = model.quantized_cdf, model.cdf_length, model.offset
    if cdf.ndim != 2 or lengths.shape != (num_rows,) or offsets.shape != (num_rows,) or len(cdf) != num_rows:
        found = f"{tuple(cdf.shape)}, {tuple(lengths.shape)} and {tuple(offsets.shape)}"
        raise ValueError(f"{name}: tables of shapes {found}, expected {num_rows} rows each")
    # the least useful row has one symbol and the escape
    if bool((lengths < 3).any()) or bool((lengths > cdf.shape[1]).any()):
        raise ValueError(f"{name}._cdf_length: expected 3 to {cdf.shape[1]} entries per row")
    if bool((offsets.abs() > MAX_SYMBOL).any()):
        raise ValueError(f"{name}._offset: expected at most {MAX_SYMBOL} in magnitude")
    least = torch.empty(num_rows, dtype=torch.float64)
    for i, (row, length) in enumerate(zip(cdf, lengths.tolist(), strict=True)):
        used = row[:length].to(torch.int64)
        if used[0] != 0 or used[-1] != 2**PRECISION or not bool((used.diff() > 0).all()):
            raise ValueError(f"{name}._quantized_cdf: row {i} does not rise from 0 to {2**PRECISION}")
        least[i] = PRECISION - used.diff().max().double().log2()
    return Tables(cdf.tolist(), lengths.tolist(), offsets.tolist(), least)


def _padded(stream: bytes, num_symbols: int) -> bytes:
    """`stream` and so many zeros that CompressAI's decoder, which knows no length, cannot leave the buffer.

    A symbol takes at most one 32-bit word, an escaped one as many 4-bit digits as digits before them say. Of what is read
    behind the stream, whoever made it can choose no more than the decoder's state of 63 bits: 16 digits of 15, which stand
    for 240 digits. What comes later is arithmetic of that state; in a search over 860,000 streams and tables no stream was
    left by more than 2.1 bytes per symbol, and 12 are given.
    """
    return stream + bytes(12 * num_symbols + 16 * len(stream) + 64)
