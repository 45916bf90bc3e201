"""The losses: pure functions of tensors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Muckley et al. 2023: rate weight for each published target in bits per pixel
PUBLISHED_RATE_WEIGHTS = {0.00875: 32.0, 0.0175: 16.0, 0.035: 8.0, 0.07: 4.0, 0.14: 2.0, 0.3: 1.0, 0.45: 0.5, 0.9: 0.25}
# For images already at or below the target
LOW_RATE_WEIGHT = 2**-4
# HiFiC's 0.20 / 0.14
WARMUP_TARGET_FACTOR = 1.429
WARMUP_WEIGHT_FACTOR = 0.5


def published_rate_weight(target_bpp: float) -> float:
    """Weight of a bit per pixel for a published target; 0.28 / target, the rule of the low targets, for any other."""
    return PUBLISHED_RATE_WEIGHTS.get(target_bpp, 0.28 / target_bpp)


class RateTerm(NamedTuple):
    """What rate control does at one step: images above `target_bpp` pay `weight` per bit per pixel, others the low one."""

    target_bpp: float
    weight: float


def rate_schedule(target_bpp: float, weight: float, step: int, warmup_steps: int) -> RateTerm:
    """Rate control at `step`, an update of the codec: for `warmup_steps` a higher target at half the weight.

    Source: Mentzer et al. 2020 (HiFiC), section A.3; Muckley et al. 2023.
    """
    if step < warmup_steps:
        return RateTerm(target_bpp * WARMUP_TARGET_FACTOR, weight * WARMUP_WEIGHT_FACTOR)
    return RateTerm(target_bpp, weight)


def target_rate_loss(bpp: Tensor, rounded_bpp: Tensor, term: RateTerm) -> Tensor:
    """Mean weighted rate; each image's weight depends on whether its own rounded rate exceeds the target.

    Shapes: bpp, rounded_bpp (B,) in bits per image pixel; returns a scalar.
    """
    low = torch.full_like(bpp, LOW_RATE_WEIGHT)
    weights = torch.where(rounded_bpp > term.target_bpp, torch.full_like(bpp, term.weight), low)
    return (weights * bpp).mean()


def mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error of images in [0, 1]. Shapes: both (B, 3, H, W); returns a scalar."""
    return F.mse_loss(x_hat, x)


def psnr_db(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * torch.log10(mean_squared_error.clamp_min(1e-10))


def mean_psnr_db(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean over images of their PSNR in dB. Shapes: both (B, 3, H, W) in [0, 1]; returns a scalar."""
    return psnr_db((x_hat - x).square().mean((1, 2, 3))).mean()


def generator_loss(fake_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy that rewards reconstructions whose patches are classified like the original's.

    Shapes: fake_logits (B, K + 1, h, w), class 0 means "fake"; labels (B, h, w) int64 in [0, K), of the original image.
    Raises: ValueError if the label grid and the logit grid differ.
    Source: Muckley et al. 2023 (MS-ILLM), arXiv:2301.11189.
    """
    _check_grid(fake_logits, labels)
    return _cross_entropy(fake_logits, labels + 1)


def real_loss(real_logits: Tensor, labels: Tensor) -> Tensor:
    """Half of the loss of a network that predicts the label of real patches and "fake" for the rest: the real patches.

    Shapes: real_logits (B, K + 1, h, w), class 0 means "fake"; labels (B, h, w) int64 in [0, K).
    Raises: ValueError if the label grid and the logit grid differ.
    Source: Sushko et al. 2021 (OASIS), arXiv:2012.04781; labels as in Muckley et al. 2023, arXiv:2301.11189.
    """
    _check_grid(real_logits, labels)
    return _cross_entropy(real_logits, labels + 1) / 2


def fake_loss(fake_logits: Tensor) -> Tensor:
    """The other half: patches of reconstructions, to be classified as fake. Shapes and source as in `real_loss`."""
    fake = torch.zeros(fake_logits.shape[0], *fake_logits.shape[2:], dtype=torch.int64, device=fake_logits.device)
    return _cross_entropy(fake_logits, fake) / 2


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean over patches, one row each: the loss of whole maps is summed in varying order on a GPU.

    Shapes: logits (B, K, h, w); classes (B, h, w) int64; returns a scalar.
    """
    rows = logits.float().permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    return F.cross_entropy(rows, classes.flatten())


def patch_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of reconstructions that a binary discriminator recognizes.

    Shapes: fake_logits (B, 1, h, w), positive for "real".
    Source: Goodfellow et al. 2014, arXiv:1406.2661; per patch as in Mentzer et al. 2020 (HiFiC).
    """
    return F.softplus(-fake_logits.float()).mean()


def patch_real_loss(real_logits: Tensor) -> Tensor:
    """Binary cross-entropy of original patches; added to that of fake ones, as in HiFiC. Shapes: (B, 1, h, w)."""
    return F.softplus(-real_logits.float()).mean()


def patch_fake_loss(fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy of patches of reconstructions. Shapes: (B, 1, h, w), positive for "real"."""
    return F.softplus(fake_logits.float()).mean()


class VqLoss(NamedTuple):
    """commitment pulls the encoder to its codes; embedding pulls the codes to the encoder. Scalars, means over elements."""

    commitment: Tensor
    embedding: Tensor


def vq_loss(z: Tensor, codes: Tensor) -> VqLoss:
    """The two sides of the VQ-VAE's codebook loss.

    Shapes: z and codes (B, code_dim, h, w), unit vectors over code_dim.
    Source: van den Oord et al. 2017, arXiv:1711.00937, equation 3.
    """
    return VqLoss(F.mse_loss(z, codes.detach()), F.mse_loss(codes, z.detach()))


def perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy of code usage: the number of codes used as if evenly. Shapes: counts (K,)."""
    p = counts.double() / counts.sum().clamp_min(1)
    return torch.exp(-(p * p.clamp_min(1e-30).log()).sum())


def _check_grid(logits: Tensor, labels: Tensor) -> None:
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels are {tuple(labels.shape)} but logits {tuple(logits.shape)} need {expected}: "
            "the discriminator's downsampling must equal the labeler's patch size"
        )
