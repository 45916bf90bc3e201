"""The two discriminators: one classifies every patch by its label or as fake, the other as real or fake."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pipeline import losses
from pipeline.config import Config

# Image sides must be multiples of it
STRIDE = 64


class LabelDiscriminatorConfig(Config):
    """MS-ILLM's. The defaults, with 1024 labels and 220 latent channels, are the published one: 17,877,073 parameters."""

    kind: Literal["label"] = "label"
    conditional: bool = True
    """Whether the discriminator sees the latent."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=6, max_length=6)] = (128, 128, 256, 256, 512, 512)
    """Channels after each of the six halvings."""
    head_channels: PositiveInt = 64
    context_channels: PositiveInt = 16
    skips: bool = False
    """Whether what is seen at 1/32, 1/16 and 1/8 of the image joins on the way back, as in OASIS. Without, as published, every
    label has to pass through 1/64, which takes many times as many steps to learn."""
    init: Literal["he", "pytorch"] = "pytorch"
    """Initial weights: "he" keeps signals from shrinking from layer to layer; "pytorch" is torch's own, as in the release."""
    high_pass: NonNegativeFloat = 0
    """Gain of the image minus its 3x3 mean, which is then seen beside the image; 0: not at all, as published. Reconstructions
    differ there most, where an image has the least contrast."""


class PatchDiscriminatorConfig(Config):
    """HiFiC's PatchGAN. The defaults, with 220 latent channels, are the published one: 2,800,797 parameters."""

    kind: Literal["patch"] = "patch"
    conditional: bool = True
    """Whether the discriminator sees the latent."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=4, max_length=4)] = (64, 128, 256, 512)
    context_channels: PositiveInt = 12
    high_pass: NonNegativeFloat = 0
    """As in `LabelDiscriminatorConfig`."""


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
            # The shortcut sees the activated input too, as in the reference
            x = F.leaky_relu(x, 0.2)
        h = self.conv2(F.leaky_relu(self.conv1(x), 0.2))
        return _Halved.apply(h + self.shortcut(x))


class _Halved(torch.autograd.Function):
    """Means over 2x2 pixels. Shapes: x (B, C, h, w), sides even; returns (B, C, h/2, w/2).

    The gradient is what avg_pool2d's own backward pass gives, bit for bit; PyTorch's kernel for that was a slow one on an H100.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return F.interpolate(gradient / 4, scale_factor=2)


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
    """What both have in common.

    `forward(x, y_hat)` gives logits: x (B, 3, H, W) in [0, 1], sides multiples of 64; y_hat (B, latent_channels, H/16, W/16);
    returns (B, classes, H/8, W/8). Labels are (B, H/8, W/8) int64, of the original image. The unconditional variants
    ignore y_hat, the patch discriminator the labels.
    """

    def forward(self, x: Tensor, y_hat: Tensor) -> Tensor:
        raise NotImplementedError

    def generator_loss(self, fake_logits: Tensor, labels: Tensor) -> Tensor:
        """The generator's loss: how well the discriminator recognizes reconstructions. A scalar."""
        raise NotImplementedError

    def real_loss(self, real_logits: Tensor, labels: Tensor) -> Tensor:
        """The discriminator's loss on original crops: a scalar, to be added to `fake_loss`."""
        raise NotImplementedError

    def fake_loss(self, fake_logits: Tensor) -> Tensor:
        """The discriminator's loss on reconstructions: a scalar."""
        raise NotImplementedError

    def fooling_rate(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Share of each image's patches classified as real (by the label discriminator: as their label). Returns (B,)."""
        raise NotImplementedError

    def fake_rate(self, logits: Tensor) -> Tensor:
        """Mean share of patches classified as fake. A scalar."""
        raise NotImplementedError


def build(
    cfg: LabelDiscriminatorConfig | PatchDiscriminatorConfig, num_labels: int, latent_channels: int
) -> Discriminator:
    """The configured discriminator; the patch discriminator ignores `num_labels`."""
    if isinstance(cfg, PatchDiscriminatorConfig):
        return PatchDiscriminator(cfg, latent_channels)
    return LabelDiscriminator(cfg, num_labels, latent_channels)


class LabelDiscriminator(Discriminator):
    """An hourglass down to 1/64 and back to 1/8 of the image; class 0 means "fake". No norms, and as published no skips.

    Source: Muckley et al. 2023 (MS-ILLM), arXiv:2301.11189, after Sushko et al. 2021 (OASIS), arXiv:2012.04781.
    """

    def __init__(self, cfg: LabelDiscriminatorConfig, num_labels: int, latent_channels: int):
        super().__init__()
        c, self.high_pass = cfg.channels, cfg.high_pass
        self.context = None
        if cfg.conditional:
            self.context = nn.Conv2d(latent_channels, cfg.context_channels, 3, padding=1, padding_mode="reflect")
        ins = (_image_channels(cfg) + cfg.context_channels * cfg.conditional, *c[:-1])
        self.down = nn.Sequential(*(DownBlock(i, o, first=n == 0) for n, (i, o) in enumerate(zip(ins, c, strict=True))))
        self.up = nn.Sequential(UpBlock(c[5], c[4]), UpBlock(c[4], c[3]), UpBlock(c[3], cfg.head_channels))
        self.head = nn.Conv2d(cfg.head_channels, num_labels + 1, 1)
        self.skips = None
        if cfg.skips:
            self.skips = nn.ModuleList(
                nn.Conv2d(*io, 1) for io in ((c[4], c[4]), (c[3], c[3]), (c[2], cfg.head_channels))
            )

    def forward(self, x: Tensor, y_hat: Tensor) -> Tensor:
        h = _seen(x, y_hat, self.context, self.high_pass)
        if self.skips is None:
            return self.head(self.up(self.down(h)))
        passed = []
        for block in self.down:
            h = block(h)
            passed.append(h)
        for block, skip, before in zip(self.up, self.skips, passed[-2:1:-1], strict=True):
            h = block(h) + skip(F.leaky_relu(before, 0.2))
        return self.head(F.leaky_relu(h, 0.2))

    def generator_loss(self, fake_logits: Tensor, labels: Tensor) -> Tensor:
        return losses.generator_loss(fake_logits, labels)

    def real_loss(self, real_logits: Tensor, labels: Tensor) -> Tensor:
        return losses.real_loss(real_logits, labels)

    def fake_loss(self, fake_logits: Tensor) -> Tensor:
        return losses.fake_loss(fake_logits)

    def fooling_rate(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels + 1).float().mean((1, 2))

    def fake_rate(self, logits: Tensor) -> Tensor:
        return (logits.argmax(1) == 0).float().mean()


class PatchDiscriminator(Discriminator):
    """Five convolutions of 4x4 with spectral norm; one logit per 8x8 patch, positive for "real".

    Source: Mentzer et al. 2020 (HiFiC), arXiv:2006.09965; spectral norm as in Miyato et al. 2018, arXiv:1802.05957.
    """

    def __init__(self, cfg: PatchDiscriminatorConfig, latent_channels: int):
        super().__init__()
        c, self.high_pass = cfg.channels, cfg.high_pass
        self.context = None
        if cfg.conditional:
            self.context = spectral_norm(nn.Conv2d(latent_channels, cfg.context_channels, 3, padding=1))
        ins = (_image_channels(cfg) + cfg.context_channels * cfg.conditional, *c)
        # TensorFlow's "same" padding: one before and one after where the stride is 2, one before and two after where it is 1
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [spectral_norm(nn.Conv2d(ins[i], c[i], 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers += [nn.ZeroPad2d((1, 2, 1, 2)), spectral_norm(nn.Conv2d(c[2], c[3], 4)), nn.LeakyReLU(0.2)]
        layers += [nn.ZeroPad2d((1, 2, 1, 2)), spectral_norm(nn.Conv2d(c[3], 1, 4))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, y_hat: Tensor) -> Tensor:
        return self.layers(_seen(x, y_hat, self.context, self.high_pass))

    def generator_loss(self, fake_logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return losses.patch_generator_loss(fake_logits)

    def real_loss(self, real_logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return losses.patch_real_loss(real_logits)

    def fake_loss(self, fake_logits: Tensor) -> Tensor:
        return losses.patch_fake_loss(fake_logits)

    def fooling_rate(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return (logits > 0).float().mean((1, 2, 3))

    def fake_rate(self, logits: Tensor) -> Tensor:
        return (logits <= 0).float().mean()


def _image_channels(cfg: LabelDiscriminatorConfig | PatchDiscriminatorConfig) -> int:
    return 6 if cfg.high_pass else 3


def _seen(x: Tensor, y_hat: Tensor, context: nn.Module | None, high_pass: float) -> Tensor:
    """The image, its high frequencies, and below them the latent in a few channels, each value repeated over its 16x16 pixels."""
    if x.shape[-2] % STRIDE or x.shape[-1] % STRIDE:
        raise ValueError(f"image is {x.shape[-2]}x{x.shape[-1]}, but both sides must be multiples of {STRIDE}")
    seen = [x]
    if high_pass:
        # at borders the mean of the pixels there are
        seen.append(high_pass * (x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
    if context is not None:
        seen.append(F.interpolate(F.leaky_relu(context(y_hat), 0.2), size=x.shape[-2:]))
    return torch.cat(seen, dim=1) if len(seen) > 1 else x
