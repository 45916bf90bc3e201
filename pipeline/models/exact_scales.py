"""Which table codes each symbol of a latent, in integers: the one network that a decoder must evaluate exactly.

A decoder that takes another table than the encoder, for a single symbol, loses the rest of the file, and floating-point
convolutions round differently on every machine. So the hyper-synthesis of the scales is converted to fixed point when a codec
is exported. The means need no such care: symbols are coded relative to them, so a mean that differs in its last bit changes
the latent in its last bit, and no symbol. docs/bitstream.md has the arithmetic and the proof.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Sums stay below 2**51: float64 holds every integer up to 2**53, and adding one half to a fraction is exact below 2**52
SUM_BITS = 51
# Fractional bits of the hyper-latent
HYPER_FRACTION = 10
# Strides and paddings of the three layers are those of `HyperSynthesis`
IS_TRANSPOSED = (True, True, False)
# Hyper-latent rows at a strip's borders that depend on what is outside of it
HALO = 2
# Hyper-latent positions per strip, so that memory does not grow with the image
STRIP_POSITIONS = 2048


@dataclass(frozen=True)
class Layer:
    """A convolution of integers: floor((weight * x + bias) / 2**shift + 1/2).

    Shapes: weight as PyTorch's, int16; bias, shift (out,), int64. limit: the largest output, smaller ones than 0 become 0;
    None: neither, in the last layer.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    limit: int | None


@dataclass(frozen=True)
class ExactScales:
    """Integers that decide the table of each symbol of a latent.

    medians: of the hyper-latent, (hyper_channels,) int64, with HYPER_FRACTION fractional bits. limit: what larger hyper-latents,
    in the same unit, count as. thresholds: rising, int64, in the unit of the last layer's outputs: a symbol's index is the
    number of thresholds below its scale.
    """

    medians: Tensor
    limit: int
    layers: tuple[Layer, ...]
    thresholds: Tensor

    def indexes(self, z: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The table of each symbol. Exact, so the same on every machine, for both types.

        Shapes: z (1, hyper_channels, h, w), integers; returns (1, latent_channels, 4h, 4w), int32. dtype: what integers are
        held in while they are multiplied and added: float64 or, several times slower, int64.
        """
        height, width = z.shape[-2:]
        rows = max(STRIP_POSITIONS // width, 1)
        strips = []
        for top in range(0, height, rows):
            first, last = max(top - HALO, 0), min(top + rows + HALO, height)
            indexes = self._indexes(z[..., first:last, :], dtype)
            begin, count = 4 * (top - first), 4 * min(rows, height - top)
            strips.append(indexes[..., begin : begin + count, :])
        return torch.cat(strips, dim=-2).contiguous()

    def _indexes(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.first_activation(z).to(dtype)
        for layer, is_transposed in zip(self.layers, IS_TRANSPOSED, strict=True):
            x = rounded(accumulated(layer, x, is_transposed), layer)
        return torch.bucketize(x.to(torch.int64).contiguous(), self.thresholds).to(torch.int32)

    def first_activation(self, z: Tensor) -> Tensor:
        """The hyper-latent in fixed point. Shapes: z (B, hyper_channels, h, w), integers; returns the same, int64."""
        # before the shift, so that it cannot overflow
        z = z.to(torch.int64).clamp(-(2**15), 2**15)
        x = (z << HYPER_FRACTION) + self.medians.reshape(1, -1, 1, 1)
        return x.clamp(-self.limit, self.limit)

    def state_dict(self) -> dict[str, Tensor]:
        """The integers as named tensors, to be stored."""
        state = {"medians": self.medians, "limit": torch.tensor(self.limit), "thresholds": self.thresholds}
        for i, layer in enumerate(self.layers):
            state |= {f"{i}.weight": layer.weight, f"{i}.bias": layer.bias, f"{i}.shift": layer.shift}
            if layer.limit is not None:
                state[f"{i}.limit"] = torch.tensor(layer.limit)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "ExactScales":
        """From stored tensors. Raises: ValueError if they do not fit together, or their sums could be inexact."""
        try:
            layers = tuple(
                Layer(state[f"{i}.weight"], state[f"{i}.bias"], state[f"{i}.shift"], _number(state.get(f"{i}.limit")))
                for i in range(len(IS_TRANSPOSED))
            )
            made = cls(state["medians"], _number(state["limit"]) or 0, layers, state["thresholds"])
        except KeyError as error:
            raise ValueError(f"no tensor {error}") from None
        made.check()
        return made

    def check_fits(self, hyper_channels: int, latent_channels: int, num_tables: int) -> None:
        """Raises: ValueError if these are the integers of another codec."""
        found = len(self.medians), len(self.layers[-1].bias), len(self.thresholds) + 1
        if found != (hyper_channels, latent_channels, num_tables):
            raise ValueError(
                f"made for {found[0]} and {found[1]} channels and {found[2]} tables, this codec has {hyper_channels}, "
                f"{latent_channels} and {num_tables}"
            )

    def check(self) -> None:
        """Raises: ValueError naming what cannot be evaluated exactly."""
        if not 0 < self.limit < 2**SUM_BITS:
            raise ValueError(f"limit: is {self.limit}, expected 1 to 2**{SUM_BITS}")
        if self.medians.dtype != torch.int64 or self.medians.ndim != 1 or bool((self.medians.abs() > self.limit).any()):
            raise ValueError(f"medians: expected int64 numbers of at most {self.limit} in magnitude")
        channels, largest = len(self.medians), self.limit
        for i, (layer, is_transposed) in enumerate(zip(self.layers, IS_TRANSPOSED, strict=True)):
            side = 5 if is_transposed else 3
            into = len(layer.bias) if layer.bias.ndim == 1 else 0
            shape = (channels, into, side, side) if is_transposed else (into, channels, side, side)
            fits = layer.weight.shape == shape and layer.bias.shape == layer.shift.shape == (into,)
            if not fits or (layer.weight.dtype, layer.bias.dtype, layer.shift.dtype) != (
                torch.int16,
                *[torch.int64] * 2,
            ):
                raise ValueError(f"layer {i}: expected int16 weights of shape {shape}, int64 bias and shift of {into}")
            if bool((layer.shift < 0).any()) or bool((layer.shift > SUM_BITS).any()):
                raise ValueError(f"layer {i}: expected shifts from 0 to {SUM_BITS}")
            if (
                bool((layer.bias.abs() >= 2**SUM_BITS).any())
                or largest_sum(layer, is_transposed, largest) >= 2**SUM_BITS
            ):
                raise ValueError(f"layer {i}: sums can reach 2**{SUM_BITS}, so float64 may round them")
            if (layer.limit is None) != (i == len(self.layers) - 1) or (layer.limit is not None and layer.limit < 1):
                raise ValueError(f"layer {i}: expected a positive limit, and none in the last layer")
            channels, largest = into, layer.limit or 0
        rising = self.thresholds.ndim == 1 and bool((self.thresholds.diff() > 0).all())
        if self.thresholds.dtype != torch.int64 or not rising:
            raise ValueError("thresholds: expected rising int64 numbers")


def accumulated(layer: Layer, x: Tensor, is_transposed: bool) -> Tensor:
    """Sums of products, and the bias: all integers below 2**51, so exact. Shapes: x (B, in, h, w), float64 or int64."""
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    if is_transposed:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=2, output_padding=1)
    return F.conv2d(x, weight, bias, padding=1)


def rounded(sums: Tensor, layer: Layer) -> Tensor:
    """Sums divided by the layer's powers of two, rounded half up, and limited. Shapes: sums (B, out, h, w)."""
    shift = layer.shift.reshape(1, -1, 1, 1)
    # in integers, one half is zero where nothing is shifted
    is_whole = sums.dtype == torch.int64
    x = (sums + ((1 << shift) >> 1)) >> shift if is_whole else torch.floor(sums * powers_of_two(-shift) + 0.5)
    return x if layer.limit is None else x.clamp(0, layer.limit)


def largest_sum(layer: Layer, is_transposed: bool, largest: int) -> int:
    """What no sum of the layer exceeds in magnitude, in any order of summation, for inputs up to `largest`."""
    taps = layer.weight.to(torch.int64).abs()
    # of a transposed convolution of stride 2, an output meets every second row and column of the kernel
    phases = (
        [taps[:, :, a::2, b::2].sum((0, 2, 3)) for a in (0, 1) for b in (0, 1)]
        if is_transposed
        else [taps.sum((1, 2, 3))]
    )
    return int(torch.stack(phases).amax()) * largest + int(layer.bias.abs().max())


def powers_of_two(exponents: Tensor) -> Tensor:
    """Exact, in float64, of int64 numbers from -62 to 62; pow() need not be."""
    powers = (torch.ones_like(exponents) << exponents.abs()).double()
    return torch.where(exponents < 0, 1 / powers, powers)


def _number(tensor: Tensor | None) -> int | None:
    """Raises: ValueError if it is not one integer."""
    if tensor is not None and (tensor.numel() != 1 or tensor.is_floating_point()):
        raise ValueError(f"limit: is {tensor.numel()} numbers of {tensor.dtype}, expected one integer")
    return None if tensor is None else int(tensor)
