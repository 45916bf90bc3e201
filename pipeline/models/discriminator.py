"""The network that names the label of every real patch, and calls the others fake."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from pipeline.config import Config

STRIDE = 64  # image sides must be multiples of it


class DiscriminatorConfig(Config):
    """Widths. The defaults, with 1024 labels and 220 latent channels, are the published network: 17,877,073 parameters."""

    # after each of the six halvings
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=6, max_length=6)] = (128, 128, 256, 256, 512, 512)
    head_channels: PositiveInt = 64
    context_channels: PositiveInt = 16


class DownBlock(nn.Module):
    """Residual block that halves the sides. Shapes: x (B, c_in, h, w); returns (B, c_out, h/2, w/2)."""

    def __init__(self, c_in: int, c_out: int, first: bool):
        super().__init__()
        self.first = first
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = F.leaky_relu(x, 0.2)  # the shortcut sees the activated input too, as in the reference
        h = self.conv2(F.leaky_relu(self.conv1(x), 0.2))
        return F.avg_pool2d(h + self.shortcut(x), 2)


class UpBlock(nn.Module):
    """Residual block that doubles the sides. Shapes: x (B, c_in, h, w); returns (B, c_out, 2 h, 2 w)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(x, 0.2)
        h = self.conv1(F.interpolate(x, scale_factor=2))
        h = self.conv2(F.leaky_relu(h, 0.2))
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class Discriminator(nn.Module):
    """An hourglass down to 1/64 and back to 1/8 of the image, conditional on the latent; no norms, no skips, as published.

    Source: Muckley et al. 2023 (MS-ILLM), arXiv:2301.11189, after Sushko et al. 2021 (OASIS), arXiv:2012.04781.
    """

    def __init__(self, cfg: DiscriminatorConfig, num_labels: int, latent_channels: int):
        super().__init__()
        c = cfg.channels
        self.context = nn.Conv2d(latent_channels, cfg.context_channels, 3, padding=1, padding_mode="reflect")
        ins = (3 + cfg.context_channels, *c[:-1])
        self.down = nn.Sequential(*(DownBlock(i, o, first=n == 0) for n, (i, o) in enumerate(zip(ins, c, strict=True))))
        self.up = nn.Sequential(UpBlock(c[5], c[4]), UpBlock(c[4], c[3]), UpBlock(c[3], cfg.head_channels))
        self.head = nn.Conv2d(cfg.head_channels, num_labels + 1, 1)

    def forward(self, x: Tensor, y_hat: Tensor) -> Tensor:
        """Logits, class 0 meaning "fake".

        Shapes: x (B, 3, H, W) in [0, 1], sides multiples of 64; y_hat (B, latent_channels, H/16, W/16);
        returns (B, num_labels + 1, H/8, W/8).
        """
        if x.shape[-2] % STRIDE or x.shape[-1] % STRIDE:
            raise ValueError(f"image is {x.shape[-2]}x{x.shape[-1]}, but both sides must be multiples of {STRIDE}")
        context = F.interpolate(F.leaky_relu(self.context(y_hat), 0.2), size=x.shape[-2:])
        return self.head(self.up(self.down(torch.cat([x, context], dim=1))))
