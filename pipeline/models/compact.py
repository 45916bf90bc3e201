"""Weights in 8 bits for codecs that are shipped: a quarter of the size, for some hundredths of a decibel.

Every convolution's weights become integers in [-127, 127], with one scale per slice of the first dimension. What is loaded are
the products in float32, each rounded once, so every machine computes with the same weights. Tables lose the zeros after the
end of each row.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Of a tensor that holds the scales of the tensor named before it
SCALES = ".scales"
LARGEST = 127
# Of tables, and of the tensor with the length of each of their rows
TABLE, LENGTHS = "_quantized_cdf", "_cdf_length"
# Numbers of a table: 128 MB
MAX_TABLE = 2**25


def compacted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights with those of convolutions in 8 bits. Inverse but for rounding: `expanded`."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(TABLE):
            lengths = state[name.removesuffix(TABLE) + LENGTHS].tolist()
            packed[name] = torch.cat([row[:length] for row, length in zip(value, lengths, strict=True)])
        if not (value.is_floating_point() and value.dim() == 4):
            packed.setdefault(name, value)
            continue
        # A slice of zeros has scale 1
        largest = value.abs().amax((1, 2, 3))
        scales = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
        packed[name] = (value / scales.reshape(-1, 1, 1, 1)).round().to(torch.int8)
        packed[name + SCALES] = scales
    return packed


def expanded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they were given to `compacted`, but for rounding. Others in float16 are widened, the rest stays as it is.

    Raises: RuntimeError if scales do not fit their weights, or lengths their tables.
    """
    full: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(SCALES):
            if name.removesuffix(SCALES) not in state:
                raise RuntimeError(f"{name} has no weights beside it")
            continue
        full[name] = value.float() if value.dtype == torch.float16 else value
        scales = state.get(name + SCALES)
        if value.dtype == torch.int8 and scales is not None:
            if value.dim() != 4 or scales.shape != value.shape[:1]:
                raise RuntimeError(f"{name} is {tuple(value.shape)} with scales {tuple(scales.shape)}")
            full[name] = value.float() * scales.reshape(-1, 1, 1, 1)
        if name.endswith(TABLE) and value.dim() == 1:
            full[name] = _rows(name, value, state.get(name.removesuffix(TABLE) + LENGTHS))
    return full


def _rows(name: str, value: Tensor, lengths: Tensor | None) -> Tensor:
    """A table from its rows, one after the other. Raises: RuntimeError if they do not fit, or would take much memory."""
    if lengths is None or lengths.dtype != torch.int32 or lengths.dim() != 1:
        raise RuntimeError(f"{name} needs the lengths of its rows, int32, beside it")
    each = lengths.tolist()
    if not each or min(each) < 1 or sum(each) != len(value) or len(each) * max(each) > MAX_TABLE:
        raise RuntimeError(f"{name} holds {len(value)} numbers, which are not rows of the lengths beside it")
    return pad_sequence(list(value.split(each)), batch_first=True)
