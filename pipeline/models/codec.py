"""The mean-scale hyperprior autoencoder."""

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.models import fixed_point
from pipeline.models.entropy import EntropyBottleneck, GaussianConditional
from pipeline.models.exact_scales import ExactScales
from pipeline.models.layers import Width
from pipeline.models.tables import MAX_SYMBOL, checked_tables
from pipeline.models.transforms import (
    Analysis,
    LightAnalysis,
    LightSynthesis,
    PublishedAnalysis,
    PublishedSynthesis,
    Synthesis,
)

# Image pixels per latent position
LATENT_STRIDE = 16
# Image pixels per hyper-latent position; image sides must be multiples of it
HYPER_STRIDE = 64

# Ballé et al. 2018: 64 standard deviations, evenly spaced in log scale; in single precision, as published, so that
# the tables agree to the last bit
SCALE_TABLE = torch.exp(torch.linspace(math.log(0.11), math.log(256), 64)).tolist()


class CodecConfig(Config):
    """Widths and depth. The defaults are the published codec: 181,481,103 parameters."""

    transforms: Literal["published", "light"] = "published"
    """Layout of analysis and synthesis: the published one, or a light one without norms, whose largest maps have a quarter of
    the image's resolution; it learns in a tenth of the time."""
    channels: Annotated[tuple[Width, ...], Field(min_length=3, max_length=5)] = (60, 120, 240, 480, 960)
    """Published: channels after the first convolution and after each of the four halvings. Light: at a quarter, an eighth
    and a sixteenth of the resolution."""
    latent_channels: Width = 220
    hyper_channels: Annotated[int, Field(ge=4, le=65536)] = 320
    """Channels of the hyper-latent; at least 4, since CompressAI's encoder ends a stream with two words, in a buffer
    of one word per symbol."""
    num_residual_blocks: Annotated[int, Field(gt=0, le=1000)] = 9
    """Of the synthesis at a sixteenth of the resolution."""

    @property
    def elements_per_pixel(self) -> float:
        """Of the largest map of a transform."""
        if self.transforms == "published":
            return self.channels[0]
        return max(self.channels[0] / 4**2, self.channels[1] / 8**2, 3)

    @model_validator(mode="after")
    def has_the_channels_of_its_transforms(self) -> "CodecConfig":
        expected = {"published": 5, "light": 3}[self.transforms]
        if len(self.channels) != expected:
            raise ValueError(
                f"channels: {self.transforms} transforms have {expected} widths, found {len(self.channels)}: write {expected}"
            )
        return self


class Noise(NamedTuple):
    """Training noise in [-0.5, 0.5) for y (B, latent_channels, H/16, W/16) and z (B, hyper_channels, H/64, W/64)."""

    y: Tensor
    z: Tensor


class CodecOutput(NamedTuple):
    """x_hat (B, 3, H, W), not clamped; y_hat (B, latent_channels, H/16, W/16) rounded around its means; bits and
    rounded_bits (B,): ideal code length of each image with noisy and with rounded latents (the latter without gradient).
    """

    x_hat: Tensor
    y_hat: Tensor
    bits: Tensor
    rounded_bits: Tensor


class HyperAnalysis(nn.Sequential):
    """h_a: latent to hyper-latent. Shapes: y (B, latent_channels, h, w); returns (B, hyper_channels, h/4, w/4)."""

    def __init__(self, cfg: CodecConfig):
        n = cfg.hyper_channels
        super().__init__(
            nn.Conv2d(cfg.latent_channels, n, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n, n, 5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(n, n, 5, stride=2, padding=2),
        )


class HyperSynthesis(nn.Sequential):
    """h_s: hyper-latent to means or scales, linear.

    Shapes: z_hat (B, hyper_channels, h, w); returns (B, latent_channels, 4h, 4w).
    """

    def __init__(self, cfg: CodecConfig):
        n = cfg.hyper_channels
        super().__init__(
            nn.ConvTranspose2d(n, n, 5, stride=2, padding=2, output_padding=1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(n, n, 5, stride=2, padding=2, output_padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n, cfg.latent_channels, 3, padding=1),
        )


class Codec(nn.Module):
    """Encoder g_a, decoder g_s, hyper transforms h_a and h_s (means and scales separately), and two entropy models.

    Source: Muckley et al. 2023 (MS-ILLM), arXiv:2301.11189; Minnen et al. 2018, arXiv:1809.02736.
    """

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        self.cfg = cfg
        self.analysis: Analysis
        self.synthesis: Synthesis
        widths, blocks = (cfg.channels, cfg.latent_channels), cfg.num_residual_blocks
        if cfg.transforms == "published":
            self.analysis, self.synthesis = PublishedAnalysis(*widths), PublishedSynthesis(*widths, blocks)
        else:
            self.analysis, self.synthesis = LightAnalysis(*widths), LightSynthesis(*widths, blocks)
        self.hyper_analysis = HyperAnalysis(cfg)
        self.hyper_synthesis_mean = HyperSynthesis(cfg)
        self.hyper_synthesis_scale = HyperSynthesis(cfg)
        self.hyper_entropy = EntropyBottleneck(cfg.hyper_channels)
        self.entropy = GaussianConditional(None)
        # Decide the tables of a latent's symbols; made with the tables, from `hyper_synthesis_scale`
        self.exact_scales: ExactScales | None = None

    def forward(self, x: Tensor, noise: Noise) -> CodecOutput:
        """Training pass: rate from noisy latents, image from rounded ones with a straight-through gradient.

        Shapes: x (B, 3, H, W) in [0, 1], H and W multiples of 64.
        Raises: ValueError for other sides.
        """
        check_sides(x)
        y = self.analysis(x)  # (B, latent_channels, H/16, W/16)
        z = self.hyper_analysis(y).float()  # (B, hyper_channels, H/64, W/64)
        z_noisy = z + noise.z
        means, scales = self.means_and_scales(z_noisy)
        # Likelihoods lose whole bits in bf16
        with torch.autocast(x.device.type, enabled=False):
            y = y.float()
            bits = self._hyper_bits(z_noisy) + self._latent_bits(y + noise.y, means, scales)
            with torch.no_grad():
                rounded = self._latent_bits(round_around(y, means), means, scales)
                rounded_bits = self._hyper_bits(round_around(z, self.medians())) + rounded
        y_hat = y + (round_around(y, means) - y).detach()
        return CodecOutput(self.synthesis(y_hat), y_hat, bits, rounded_bits)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latent a decoder would receive, and its ideal code length in bits per image.

        Shapes: x (B, 3, H, W) in [0, 1]; returns y_hat (B, latent_channels, H/16, W/16) and bits (B,).
        """
        check_sides(x)
        y = self.analysis(x).float()
        z = self.hyper_analysis(y).float()
        z_hat = round_around(z, self.medians())
        means, scales = self.means_and_scales(z_hat)
        y_hat = round_around(y, means)
        return y_hat, self._hyper_bits(z_hat) + self._latent_bits(y_hat, means, scales)

    def noise_like(self, x: Tensor, generators: list[torch.Generator]) -> Noise:
        """Uniform noise for `forward`, each image's from its own generator, so it does not depend on the batch.

        Shapes: x (B, 3, H, W); one generator per image, on x's device.
        """

        def draw(channels: int, stride: int) -> Tensor:
            shape = (channels, x.shape[2] // stride, x.shape[3] // stride)
            return torch.stack([torch.rand(shape, generator=g, device=x.device) - 0.5 for g in generators])

        return Noise(draw(self.cfg.latent_channels, LATENT_STRIDE), draw(self.cfg.hyper_channels, HYPER_STRIDE))

    def update_tables(self) -> None:
        """Builds the integers that files are coded with; they are saved with the weights.

        Raises: ValueError if the weights are not those of a trained codec.
        """
        # from other quantiles, building tables would never end
        if not bool((self.hyper_entropy.quantiles.abs() <= MAX_SYMBOL).all()):
            raise ValueError(f"its quantiles are beyond {MAX_SYMBOL}: no trained codec has them")
        self.hyper_entropy.update(force=True)
        self.entropy.update_scale_table(SCALE_TABLE, force=True)
        self.exact_scales = fixed_point.exact_scales(self, checked_tables(self)[0])

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Like a strict `load_state_dict`, for tables of any size."""
        for prefix in ("hyper_entropy", "entropy"):
            module = self.get_submodule(prefix)
            for name in ("_offset", "_quantized_cdf", "_cdf_length", "scale_table"):
                if (saved := state.get(f"{prefix}.{name}")) is not None:
                    setattr(module, name, torch.zeros(saved.shape, dtype=getattr(module, name).dtype))
        self.load_state_dict(state)

    def bitstream_id(self) -> bytes:
        """Four bytes that name everything which decides the meaning of a compressed file, but not the decoder network.

        Codecs that differ only in `synthesis` can read each other's files.
        """
        assert self.exact_scales is not None
        parts = {f"exact_scales.{name}": value for name, value in self.exact_scales.state_dict().items()}
        for name, value in self.state_dict().items():
            if name.startswith("hyper_synthesis_mean.") or name.endswith(
                ("._quantized_cdf", "._cdf_length", "._offset")
            ):
                parts[name] = value
        return digest_of(parts | {"medians": self.medians()})[:4]

    def version_1_id(self) -> bytes:
        """As `bitstream_id`, in files of version 1, whose tables were chosen by the network in floating point."""
        names = ("hyper_synthesis_mean.", "hyper_synthesis_scale.", "hyper_entropy.", "entropy.")
        return digest_of({name: value for name, value in self.state_dict().items() if name.startswith(names)})[:4]

    def medians(self) -> Tensor:
        """Centers of the hyper-latent's symbols. Shapes: returns (1, hyper_channels, 1, 1)."""
        return self.hyper_entropy.quantiles[:, 0, 1].detach().reshape(1, -1, 1, 1)

    def means_and_scales(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of every latent's Gaussian. Shapes: z (B, hyper_channels, h, w); returns (B, latent_channels, 4h, 4w) twice."""
        return self.hyper_synthesis_mean(z).float(), self.hyper_synthesis_scale(z).float()

    def _hyper_bits(self, z: Tensor) -> Tensor:
        values = z.transpose(0, 1).flatten(2).flatten(1).unsqueeze(1)  # (hyper_channels, 1, B * h * w)
        likelihoods, _, _ = self.hyper_entropy._likelihood(values)
        likelihoods = self.hyper_entropy.likelihood_lower_bound(likelihoods)
        per_image = likelihoods.reshape(z.shape[1], z.shape[0], -1).transpose(0, 1)  # (B, hyper_channels, h * w)
        return num_bits(per_image)

    def _latent_bits(self, y: Tensor, means: Tensor, scales: Tensor) -> Tensor:
        likelihoods = self.entropy._likelihood(y, scales, means)
        return num_bits(self.entropy.likelihood_lower_bound(likelihoods))


def digest_of(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + str(tuple(value.shape)).encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def round_around(x: Tensor, centre: Tensor) -> Tensor:
    """Nearest value at an integer distance from `centre`."""
    return torch.round(x - centre) + centre


def num_bits(likelihoods: Tensor) -> Tensor:
    """Ideal code length of each image in bits. Shapes: likelihoods (B, ...) in (0, 1]; returns (B,)."""
    return -likelihoods.log2().flatten(1).sum(1)


def check_sides(x: Tensor) -> None:
    height, width = x.shape[-2:]
    if height % HYPER_STRIDE or width % HYPER_STRIDE or not height or not width:
        raise ValueError(f"image is {height}x{width}, but both sides must be multiples of {HYPER_STRIDE}; pad it first")
