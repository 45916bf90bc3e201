"""The integer tables that a codec's files are coded with, checked when a codec is loaded: a coder checks nothing."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipeline.models.codec import Codec
    from pipeline.models.entropy import EntropyModel

# Bits of a frequency: a row of a table ends with 2**16
PRECISION = 16
# |symbol| of what is encoded; trained codecs stay below 2**11
MAX_SYMBOL = 2**15


@dataclass(frozen=True)
class Tables:
    """Cumulative frequencies of symbols, one row per index: each begins with 0 and, at its length, ends with 2**16.

    The last symbol of a row is the escape; the others are as many integers, from the row's offset on.
    """

    rows: list[list[int]]
    lengths: list[int]
    offsets: list[int]


def checked_tables(codec: "Codec") -> tuple[Tables, Tables]:
    """The tables of z and of y. Raises: ValueError naming what is wrong with them."""
    scales = codec.entropy.scale_table
    if not (scales.ndim == 1 and 1 <= len(scales) <= 1024 and bool((scales.diff() > 0).all()) and scales[0] > 0):
        raise ValueError("entropy.scale_table: expected 1 to 1024 rising positive numbers")
    z = _checked("hyper_entropy", codec.hyper_entropy, codec.cfg.hyper_channels)
    return z, _checked("entropy", codec.entropy, len(scales))


def _checked(name: str, model: "EntropyModel", num_rows: int) -> Tables:
    cdf, lengths, offsets = model.quantized_cdf, model.cdf_length, model.offset
    if cdf.ndim != 2 or lengths.shape != (num_rows,) or offsets.shape != (num_rows,) or len(cdf) != num_rows:
        found = f"{tuple(cdf.shape)}, {tuple(lengths.shape)} and {tuple(offsets.shape)}"
        raise ValueError(f"{name}: tables of shapes {found}, expected {num_rows} rows each")
    # the least useful row has one symbol and the escape
    if bool((lengths < 3).any()) or bool((lengths > cdf.shape[1]).any()):
        raise ValueError(f"{name}._cdf_length: expected 3 to {cdf.shape[1]} entries per row")
    if bool((offsets.abs() > MAX_SYMBOL).any()):
        raise ValueError(f"{name}._offset: expected at most {MAX_SYMBOL} in magnitude")
    for i, (row, length) in enumerate(zip(cdf, lengths.tolist(), strict=True)):
        used = row[:length].to(torch.int64)
        if used[0] != 0 or used[-1] != 2**PRECISION or not bool((used.diff() > 0).all()):
            raise ValueError(f"{name}._quantized_cdf: row {i} does not rise from 0 to {2**PRECISION}")
    return Tables(cdf.tolist(), lengths.tolist(), offsets.tolist())
