"""The transforms of a codec: analysis (image to latent) and synthesis (back), in the published layout and in a light one.

Both have the same parts, so that windows of large images are computed alike: a synthesis is `up(features(y_hat))`. An Identity
stands where the activation was that the norm before it now includes, so that weights keep their names.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.layers import ChannelNorm


class Analysis(nn.Sequential):
    """The encoder g_a: image to latent. Shapes: x (B, 3, H, W) in [0, 1]; returns (B, latent_channels, H/16, W/16).

    halo: how far outside of its own 16x16 pixels a position sees, in pixels, rounded up to a multiple of 16.
    """

    halo: int


class Synthesis(nn.Module):
    """The decoder g_s: latent to image. Shapes: y_hat (B, latent_channels, h, w); returns (B, 3, 16 h, 16 w), linear.

    up_halo: how far outside of its own position `up` sees, in latent positions, rounded up.
    """

    up_halo: int
    head: nn.Module
    residual: nn.Sequential
    up: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        # Activation checkpointing of the residual blocks while training
        self.recompute = False

    @property
    def halo(self) -> int:
        """As `up_halo`, of the whole: a convolution in the head, two in each residual block."""
        return 1 + 2 * len(self.residual) + self.up_halo

    def forward(self, y_hat: Tensor) -> Tensor:
        return self.up(self.features(y_hat))

    def features(self, y_hat: Tensor) -> Tensor:
        """What is upsampled to the image. Shapes: y_hat (B, latent_channels, h, w); returns (B, widest, h, w)."""
        h = r = self.head(y_hat)
        if h.dtype == torch.bfloat16:
            # The sum of many small changes
            r = h.float()
        forgets = self.recompute and torch.is_grad_enabled()
        for block in self.residual:
            r = checkpoint(block, r, use_reentrant=False, preserve_rng_state=False) if forgets else block(r)
        return h + r


class ResidualBlock(nn.Module):
    """x + (conv, norm, ReLU, conv, norm). Shapes: x (B, C, h, w); returns the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelNorm(channels, "relu"),
            nn.Identity(),
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelNorm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class PublishedAnalysis(Analysis):
    """channels: after the first convolution and after each of the four halvings.

    Source: Mentzer et al. 2020 (HiFiC), arXiv:2006.09965.
    """

    # 34 pixels
    halo = 48

    def __init__(self, channels: Sequence[int], latent_channels: int):
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels[0], 7, padding=3),
            ChannelNorm(channels[0], "relu"),
            nn.Identity(),
        ]
        for wide, wider in pairwise(channels):
            layers += [nn.Conv2d(wide, wider, 3, stride=2, padding=1), ChannelNorm(wider, "relu"), nn.Identity()]
        super().__init__(*layers, nn.Conv2d(channels[-1], latent_channels, 3, padding=1))


class PublishedSynthesis(Synthesis):
    """channels: as of the analysis. Source: Mentzer et al. 2020 (HiFiC), arXiv:2006.09965."""

    up_halo = 2

    def __init__(self, channels: Sequence[int], latent_channels: int, num_residual_blocks: int):
        super().__init__()
        widest = channels[-1]
        # No activation here, as published
        self.head = nn.Sequential(
            ChannelNorm(latent_channels), nn.Conv2d(latent_channels, widest, 3, padding=1), ChannelNorm(widest)
        )
        self.residual = nn.Sequential(*(ResidualBlock(widest) for _ in range(num_residual_blocks)))
        layers: list[nn.Module] = []
        widths = channels[::-1]
        for wide, narrow in pairwise(widths):
            up = nn.ConvTranspose2d(wide, narrow, 3, stride=2, padding=1, output_padding=1)
            layers += [up, ChannelNorm(narrow, "relu"), nn.Identity()]
        layers.append(nn.Conv2d(widths[-1], 3, 7, padding=3))
        self.up = nn.Sequential(*layers)


class LightBlock(nn.Module):
    """x + (conv, leaky ReLU, conv). Shapes: x (B, C, h, w); returns the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class LightAnalysis(Analysis):
    """Works at a quarter of the resolution and below, without norms: linear convolutions between residual blocks.

    channels: at a quarter, an eighth and a sixteenth of the resolution.
    """

    # convolutions of 3x3 at a quarter (4 of them, one with stride), an eighth (3) and a sixteenth (1): 56 pixels
    halo = 64

    def __init__(self, channels: Sequence[int], latent_channels: int):
        quarter, eighth, sixteenth = channels
        super().__init__(
            nn.PixelUnshuffle(4),
            nn.Conv2d(3 * 4**2, quarter, 3, padding=1),
            LightBlock(quarter),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            LightBlock(eighth),
            nn.Conv2d(eighth, sixteenth, 3, stride=2, padding=1),
            nn.Conv2d(sixteenth, latent_channels, 3, padding=1),
        )


class LightSynthesis(Synthesis):
    """The mirror of the light analysis: its largest maps have a sixteenth of the image's positions.

    channels: as of the analysis.
    """

    # a convolution at a sixteenth of the resolution, three at an eighth, three at a quarter: 3.25
    up_halo = 4

    def __init__(self, channels: Sequence[int], latent_channels: int, num_residual_blocks: int):
        super().__init__()
        quarter, eighth, sixteenth = channels
        self.head = nn.Conv2d(latent_channels, sixteenth, 3, padding=1)
        self.residual = nn.Sequential(*(LightBlock(sixteenth) for _ in range(num_residual_blocks)))
        self.up = nn.Sequential(
            nn.Conv2d(sixteenth, 4 * eighth, 3, padding=1),
            nn.PixelShuffle(2),
            LightBlock(eighth),
            nn.Conv2d(eighth, 4 * quarter, 3, padding=1),
            nn.PixelShuffle(2),
            LightBlock(quarter),
            nn.Conv2d(quarter, 3 * 4**2, 3, padding=1),
            nn.PixelShuffle(4),
        )
