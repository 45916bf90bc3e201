"""The VQ-VAE whose code indices are the labels of image patches."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.models.layers import ChannelNorm, Width

# Image pixels per label, in each direction
PATCH = 8


class LabelerConfig(Config):
    """Widths and depth. The defaults are the published labeler: 18,116,178 parameters."""

    channels: Width = 64
    channel_multipliers: Annotated[tuple[Width, ...], Field(min_length=4, max_length=4)] = (1, 2, 2, 4)
    num_blocks: Annotated[int, Field(gt=0, le=1000)] = 2
    """Residual blocks per resolution; the decoder has one more."""
    embedding_channels: Width = 256
    code_dim: Width = 8
    num_codes: Annotated[int, Field(ge=2, le=2**24)] = 1024


class LabelerOutput(NamedTuple):
    """x_hat (B, 3, H, W); z and codes (B, code_dim, H/8, W/8) unit vectors before and after quantization; labels (B, H/8, W/8)."""

    x_hat: Tensor
    z: Tensor
    codes: Tensor
    labels: Tensor


class ResnetBlock(nn.Module):
    """Residual block with swish. Shapes: x (B, c_in, h, w); returns (B, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = ChannelNorm(c_in, "silu")
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = ChannelNorm(c_out, "silu")
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        return self.shortcut(x) + self.conv2(self.norm2(h))


class CrossCovarianceAttention(nn.Module):
    """x + attention between channels, with one head and pixels as tokens. Shapes: x (B, C, h, w); returns the same.

    Source: El-Nouby et al. 2021 (XCiT), arXiv:2106.09681.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.temperature = nn.Parameter(torch.ones(1, 1, 1))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, h * w, C)
        # Each (B, C, h * w)
        q, k, v = self.qkv(tokens).transpose(1, 2).chunk(3, dim=1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.transpose(1, 2) * self.temperature).softmax(-1)  # (B, C, C)
        return x + self.proj((attention @ v).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halves the sides, padding right and bottom only. Shapes: x (B, C, h, w); returns (B, C, h/2, w/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _middle(width: int) -> list[nn.Module]:
    return [ResnetBlock(width, width), CrossCovarianceAttention(width), ResnetBlock(width, width)]


class LabelerEncoder(nn.Sequential):
    """Shapes: x (B, 3, H, W) in [0, 1]; returns (B, embedding, H/8, W/8)."""

    def __init__(self, cfg: LabelerConfig):
        widths = [cfg.channels * m for m in cfg.channel_multipliers]
        layers: list[nn.Module] = [nn.Conv2d(3, cfg.channels, 3, padding=1)]
        width = cfg.channels
        for level, out in enumerate(widths):
            last = level == len(widths) - 1
            for _ in range(cfg.num_blocks):
                layers.append(ResnetBlock(width, out))
                width = out
                if last:
                    layers.append(CrossCovarianceAttention(width))
            if not last:
                layers.append(Downsample(width))
        layers += [
            *_middle(width),
            ChannelNorm(width, "silu"),
            nn.Identity(),
            nn.Conv2d(width, cfg.embedding_channels, 3, padding=1),
        ]
        super().__init__(*layers)


class LabelerDecoder(nn.Sequential):
    """Shapes: (B, embedding, h, w); returns (B, 3, 8 h, 8 w), linear."""

    def __init__(self, cfg: LabelerConfig):
        widths = [cfg.channels * m for m in cfg.channel_multipliers]
        width = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(cfg.embedding_channels, width, 3, padding=1), *_middle(width)]
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(cfg.num_blocks + 1):
                layers.append(ResnetBlock(width, out))
                width = out
                if level == len(widths) - 1:
                    layers.append(CrossCovarianceAttention(width))
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
        layers += [ChannelNorm(width, "silu"), nn.Identity(), nn.Conv2d(width, 3, 3, padding=1)]
        super().__init__(*layers)


class Labeler(nn.Module):
    """A VQ-VAE with codes on the unit sphere.

    Source: Muckley et al. 2023 (MS-ILLM), arXiv:2301.11189; Yu et al. 2022 (unit codes), arXiv:2110.04627.
    """

    def __init__(self, cfg: LabelerConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = LabelerEncoder(cfg)
        self.to_code = nn.Conv2d(cfg.embedding_channels, cfg.code_dim, 1)
        # A Gaussian gives directions all over the sphere; the stage replaces them by encoded patches.
        self.codebook = nn.Parameter(torch.randn(cfg.num_codes, cfg.code_dim))
        self.from_code = nn.Conv2d(cfg.code_dim, cfg.embedding_channels, 1)
        self.decoder = LabelerDecoder(cfg)

    def forward(self, x: Tensor, quantise: bool = True) -> LabelerOutput:
        """Shapes: x (B, 3, H, W) in [0, 1], H and W multiples of 8. Without `quantise` the decoder sees z itself."""
        z = self.embed(x)
        labels = self.nearest(z)
        # not indexing, whose gradient several CPU threads would sum in varying order
        codes = F.embedding(labels, F.normalize(self.codebook, dim=1)).permute(0, 3, 1, 2)  # (B, code_dim, h, w)
        # Straight-through: the gradient skips the rounding
        seen = z + (codes - z).detach() if quantise else z
        return LabelerOutput(self.decoder(self.from_code(seen)), z, codes, labels)

    def embed(self, x: Tensor) -> Tensor:
        """Unit vector of every patch. Shapes: x (B, 3, H, W) in [0, 1]; returns (B, code_dim, H/8, W/8)."""
        return F.normalize(self.to_code(self.encoder(x)).float(), dim=1)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code: on the sphere, the one with the largest inner product.

        Shapes: z (B, code_dim, h, w); returns (B, h, w) int64 in [0, num_codes).
        """
        with torch.autocast(z.device.type, enabled=False):
            return (z.permute(0, 2, 3, 1) @ F.normalize(self.codebook, dim=1).T).argmax(-1)

    @torch.no_grad()
    def label(self, x: Tensor) -> Tensor:
        """Labels of an image's patches. Shapes: x (B, 3, H, W) in [0, 1]; returns (B, H/8, W/8) int64."""
        if x.shape[-2] % PATCH or x.shape[-1] % PATCH:
            raise ValueError(f"image is {x.shape[-2]}x{x.shape[-1]}, but both sides must be multiples of {PATCH}")
        return self.nearest(self.embed(x))
