"""A trained hyper-synthesis of scales to integers, and what that costs in bits."""

import random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.exact_scales import (
    HYPER_FRACTION,
    IS_TRANSPOSED,
    SUM_BITS,
    ExactScales,
    Layer,
    accumulated,
    powers_of_two,
    rounded,
)
from pipeline.models.tables import Tables

if TYPE_CHECKING:
    from pipeline.models.codec import Codec

# |weight| < 2**15
WEIGHT_BITS = 15
# Of activations, and of the hyper-latent, whose magnitude is below 2**23; fewer where a layer is too wide for its sums
MAX_ACTIVATION_BITS, MAX_HYPER_BITS = 24, 23
# At most so many fractional bits of weights, activations, and scales
MAX_WEIGHT_FRACTION, MAX_FRACTION = 30, 20
# Activations of images may be so many times larger than those of the samples before they saturate
HEADROOM_BITS = 6
# Latents to sample, and their sides in positions of the hyper-latent
NUM_SAMPLES, SAMPLE_SIDE = 4, 8
# Share of the bits of a latent
MAX_COST = 0.005


class Whole(NamedTuple):
    """A convolution's weights and biases as integers, and the fractional bits of each output channel's weights."""

    weight: Tensor
    bias: Tensor
    fraction: Tensor


def exact_scales(codec: "Codec", z_tables: Tables) -> ExactScales:
    """The hyper-synthesis of scales in fixed point: a function of the codec's weights alone, the same on every machine.

    Raises: ValueError if its weights are not finite or too large.
    """
    convolutions = [m for m in codec.hyper_synthesis_scale if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    fraction, bits = HYPER_FRACTION, _room(convolutions[0], MAX_HYPER_BITS)
    limit = 2**bits - 1
    medians = torch.round(codec.medians().flatten().cpu().double() * 2**fraction)
    made = ExactScales(medians.clamp(-limit, limit).to(torch.int64), limit, (), torch.zeros(0, dtype=torch.int64))
    x, layers = made.first_activation(samples(z_tables)).double(), []
    for i, (convolution, is_transposed) in enumerate(zip(convolutions, IS_TRANSPOSED, strict=True)):
        whole = _whole(convolution, is_transposed, fraction)
        sums = accumulated(Layer(whole.weight, whole.bias, whole.fraction, None), x, is_transposed)
        # fractional bits of the sums, of each channel
        inside = whole.fraction + fraction
        limit_here, wanted = None, MAX_FRACTION
        if i + 1 < len(convolutions):
            bits = _room(convolutions[i + 1], MAX_ACTIVATION_BITS)
            reached = (sums * powers_of_two(-inside).reshape(1, -1, 1, 1)).amax().reshape(1)
            limit_here, wanted = 2**bits - 1, bits - HEADROOM_BITS - int(_exponents(reached))
        # a sum is never shifted to the left
        fraction = min(wanted, MAX_FRACTION, int(inside.min()))
        layers.append(Layer(whole.weight, whole.bias, inside - fraction, limit_here))
        x = rounded(sums, layers[-1])
    scale = powers_of_two(torch.tensor(fraction))
    thresholds = torch.floor(codec.entropy.scale_table[:-1].cpu().double() * scale).to(torch.int64)
    exact = ExactScales(made.medians, limit, tuple(layers), thresholds)
    exact.check()
    return exact


def samples(z_tables: Tables) -> Tensor:
    """Hyper-latent symbols drawn from their tables, always the same. Shapes: (NUM_SAMPLES, hyper_channels, 8, 8), int64."""
    count = NUM_SAMPLES * SAMPLE_SIDE**2
    # Python's generator is the one whose numbers are specified
    draws = np.frombuffer(random.Random(0).randbytes(2 * count * len(z_tables.rows)), dtype="<u2").reshape(-1, count)
    drawn = [
        np.searchsorted(row[1 : length - 1], draw, side="right") + offset
        for row, length, offset, draw in zip(z_tables.rows, z_tables.lengths, z_tables.offsets, draws, strict=True)
    ]
    latents = torch.from_numpy(np.stack(drawn).astype(np.int64))
    return latents.reshape(len(drawn), NUM_SAMPLES, SAMPLE_SIDE, SAMPLE_SIDE).transpose(0, 1).contiguous()


@torch.no_grad()
def cost(codec: "Codec", exact: ExactScales, z_tables: Tables, y_tables: Tables) -> float:
    """Share of a latent's bits that exact tables cost, if its true distribution were the one in floating point.

    The Kullback-Leibler divergence of the tables taken from those that floating point would take, over `samples`.
    """
    z = samples(z_tables)
    medians = codec.medians()
    scales = codec.hyper_synthesis_scale(z.to(medians) + medians).float()
    wanted = codec.entropy.build_indexes(scales).flatten().long().cpu()
    taken = torch.cat([exact.indexes(one[None]) for one in z]).flatten().long()
    entropies, pairs = _entropies(y_tables), torch.stack([wanted, taken])
    unlike, counts = pairs[:, wanted != taken].unique(dim=1, return_counts=True)
    lost = sum(_divergence(y_tables, int(a), int(b)) * int(n) for (a, b), n in zip(unlike.T, counts, strict=True))
    return lost / float(entropies[wanted].sum())


def _whole(convolution: nn.Conv2d | nn.ConvTranspose2d, is_transposed: bool, fraction: int) -> Whole:
    """fraction: bits of the layer's input. Raises: ValueError for weights that are not finite or too large."""
    assert convolution.bias is not None
    weight, bias = convolution.weight.detach().cpu().double(), convolution.bias.detach().cpu().double()
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError("weights of the hyper-synthesis of scales are not finite")
    by_output = weight.transpose(0, 1) if is_transposed else weight
    bits = torch.minimum(
        WEIGHT_BITS - _exponents(by_output.flatten(1).abs().amax(1)), SUM_BITS - 2 - fraction - _exponents(bias.abs())
    ).clamp(max=MAX_WEIGHT_FRACTION)
    if bool((bits < 0).any()) or fraction < -MAX_WEIGHT_FRACTION:
        raise ValueError("weights of the hyper-synthesis of scales are too large for fixed point")
    shape = (1, -1, 1, 1) if is_transposed else (-1, 1, 1, 1)
    largest = 2**WEIGHT_BITS - 1
    whole = torch.round(weight * powers_of_two(bits).reshape(shape)).clamp(-largest, largest)
    return Whole(whole.to(torch.int16), torch.round(bias * powers_of_two(bits + fraction)).to(torch.int64), bits)


def _room(convolution: nn.Conv2d | nn.ConvTranspose2d, most: int) -> int:
    """Bits of a convolution's inputs with which its sums are small enough, whatever its weights are."""
    # 9 of the 25 taps of a transposed convolution of stride 2 meet in an output
    terms = 9 * convolution.in_channels
    return min(most, SUM_BITS - 1 - WEIGHT_BITS - (terms - 1).bit_length())


def _exponents(values: Tensor) -> Tensor:
    """The least e with value < 2**e, 0 for zero, int64."""
    return torch.frexp(values).exponent.to(torch.int64)


def _probabilities(tables: Tables, index: int) -> tuple[int, Tensor]:
    """The first symbol of a table, and the probability of each of its symbols; the escape is left out."""
    cdf = torch.tensor(tables.rows[index][: tables.lengths[index]], dtype=torch.float64)
    return tables.offsets[index], cdf.diff()[:-1] / cdf[-1]


def _entropies(tables: Tables) -> Tensor:
    """Bits per symbol of each table."""
    of_each = [_probabilities(tables, i)[1] for i in range(len(tables.rows))]
    return torch.stack([-(p * p.log2()).sum() for p in of_each])


def _divergence(tables: Tables, true: int, taken: int) -> float:
    """Bits per symbol lost if symbols of one table are coded with another; what the other lacks costs 32 bits."""
    (first, p), (other_first, q) = _probabilities(tables, true), _probabilities(tables, taken)
    at = torch.arange(len(p)) + first - other_first
    inside = (at >= 0) & (at < len(q))
    q_there = torch.where(inside, q[at.clamp(0, len(q) - 1)], torch.tensor(2.0**-32, dtype=torch.float64))
    return float((p * (p / q_there).log2()).sum())
