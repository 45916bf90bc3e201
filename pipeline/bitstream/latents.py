"""Pixels to the symbols of a codec's latents, and back, in bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.bitstream.symbols import SymbolCoder, Symbols
from pipeline.bitstream.tiling import tiled, windows
from pipeline.data.images import Pixels
from pipeline.data.transforms import to_float
from pipeline.errors import BitstreamError
from pipeline.models.codec import HYPER_STRIDE, LATENT_STRIDE, Codec
from pipeline.models.tables import MAX_SYMBOL, checked_tables

# Hyper-latent positions per latent position and direction, inverted
RATIO = HYPER_STRIDE // LATENT_STRIDE
# Sides of windows: in pixels for the analysis, in latent positions for the synthesis (its residual blocks see larger ones,
# as they see farther), in hyper-latent positions for the hyper-synthesis
PIXELS, UP, RESIDUAL, HYPER = 1024, 64, 192, 64
# How far an output sees: 7 latent positions in the hyper-analysis, 2 hyper-latent positions in the hyper-synthesis; the
# transforms know it of themselves
HYPER_ANALYSIS_HALO, HYPER_HALO = 2 * RATIO, 2


class Size(NamedTuple):
    """Of an image in pixels. Of its latents, `y` are coded and `y_padded` exist: what lies wholly in padding is not coded."""

    height: int
    width: int

    @property
    def y(self) -> tuple[int, int]:
        return -(-self.height // LATENT_STRIDE), -(-self.width // LATENT_STRIDE)

    @property
    def z(self) -> tuple[int, int]:
        return -(-self.height // HYPER_STRIDE), -(-self.width // HYPER_STRIDE)

    @property
    def y_padded(self) -> tuple[int, int]:
        return self.z[0] * RATIO, self.z[1] * RATIO


class LatentCoder:
    """Encodes and decodes the latents of one codec, on the CPU but for analysis and synthesis.

    Source of the method: Ballé et al. 2018, arXiv:1802.01436.

    Raises: ValueError if the codec has no tables, or tables that are not safe to decode with.
    """

    def __init__(self, codec: Codec, transforms_on: torch.device):
        self.codec, self.transforms_on = codec.eval(), transforms_on
        z, y = checked_tables(codec)
        if codec.exact_scales is None:
            raise ValueError("the codec has no exact scales; update_tables() makes them")
        self.exact_scales = codec.exact_scales
        self.coder = SymbolCoder(z, y)

    @torch.no_grad()
    def encode(self, pixels: Pixels) -> tuple[bytes, Symbols]:
        """The stream of an image, decoded again and compared, and its symbols. Shapes: pixels (H, W, 3) RGB.

        Raises: BitstreamError if the latents are not finite, larger than MAX_SYMBOL, or decode to others.
        """
        size = Size(*pixels.shape[:2])
        y = self._analysis(padded_pixels(pixels))
        hyper = tiled(self.codec.hyper_analysis, y, HYPER * RATIO, HYPER_ANALYSIS_HALO, down=RATIO)
        z = to_symbols(hyper - self.codec.medians())
        y -= self.means(z)
        symbols = Symbols(z, to_symbols(y[..., : size.y[0], : size.y[1]]))
        # as large as all that follows
        del y, hyper
        stream = self.coder.encode(symbols, self.indexes(z, size))
        try:
            decoded = self.decode(stream, size)
        except BitstreamError:
            decoded = None
        if decoded is None or not decoded.equals(symbols):
            raise BitstreamError(
                "its symbols do not decode to what was encoded, so nothing was written; this is a fault of the program or of "
                "this machine: please report it with the image"
            )
        return stream, symbols

    @torch.no_grad()
    def decode(self, stream: bytes, size: Size) -> Symbols:
        """The symbols in the stream of an image of that size. Any bytes are safe to pass.

        Raises: BitstreamError if the stream is too short for so many pixels, or not an encoder's.
        """
        z_shape = (1, self.codec.cfg.hyper_channels, *size.z)
        self.coder.check_length(stream, z_shape, self.codec.cfg.latent_channels * size.y[0] * size.y[1])
        return self.coder.decode(stream, z_shape, lambda z: self.indexes(z, size))

    def indexes(self, z: Tensor, size: Size) -> Tensor:
        """The table of each symbol that is coded. Shapes: z as in `Symbols`; returns as `Symbols.y`, uint8 or int32."""
        indexes = self.exact_scales.indexes(z)[..., : size.y[0], : size.y[1]]
        return indexes.to(torch.uint8 if len(self.exact_scales.thresholds) < 256 else torch.int32).contiguous()

    def means(self, z: Tensor) -> Tensor:
        """Of the latent. Shapes: z as in `Symbols`; returns (1, latent_channels, 4h, 4w)."""
        z_hat = z.to(torch.float32) + self.codec.medians()
        return tiled(self.codec.hyper_synthesis_mean, z_hat, HYPER, HYPER_HALO, up=RATIO)

    @torch.no_grad()
    def restored(self, symbols: Symbols, size: Size) -> Pixels:
        """The image that a latent stands for. Shapes: returns (H, W, 3) RGB."""
        y_hat = self.means(symbols.z)
        rows, columns = symbols.y.shape[-2:]
        y_hat[..., :rows, :columns] += symbols.y
        pixels = np.empty((*(LATENT_STRIDE * side for side in size.y_padded), 3), np.uint8)
        for place, part in self._synthesis(y_hat):
            pixels[place] = to_pixels(part)
        return np.ascontiguousarray(pixels[: size.height, : size.width])

    def _analysis(self, pixels: Pixels) -> Tensor:
        def network(window: Tensor) -> Tensor:
            floats = to_float(window[0].permute(1, 2, 0).numpy()[None])
            return self.codec.analysis(floats.to(self.transforms_on).contiguous(memory_format=torch.channels_last))

        as_tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return tiled(network, as_tensor, PIXELS, self.codec.analysis.halo, down=LATENT_STRIDE)

    def _synthesis(self, y_hat: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Parts (3, h, w) of the image, and their places in it."""
        synthesis, (height, width) = self.codec.synthesis, y_hat.shape[-2:]
        # the same windows twice: as the residual blocks see them, and as the upsampling half does
        halo, up_halo = synthesis.halo, synthesis.up_halo
        for far, near in zip(
            windows(height, width, RESIDUAL, halo), windows(height, width, RESIDUAL, up_halo), strict=True
        ):
            seen = far.outer(y_hat).to(self.transforms_on).contiguous(memory_format=torch.channels_last)
            features = near.outer_within(synthesis.features(seen), far)
            image = near.inner_of(tiled(synthesis.up, features, UP, up_halo, up=LATENT_STRIDE), up=LATENT_STRIDE)
            rows = slice(LATENT_STRIDE * near.top, LATENT_STRIDE * near.bottom)
            yield (rows, slice(LATENT_STRIDE * near.left, LATENT_STRIDE * near.right)), image[0]


def padded_pixels(pixels: Pixels) -> Pixels:
    """Repeats the last row and column up to the next multiples of 64, which takes fewer bits than reflection does."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % HYPER_STRIDE), (0, -width % HYPER_STRIDE), (0, 0)), mode="edge")


def to_symbols(values: Tensor) -> Tensor:
    """Rounded to int32, contiguous. Raises: BitstreamError for what is not finite or larger than MAX_SYMBOL."""
    largest = values.abs().max()
    # So that NaN is refused, too
    if not bool(largest <= MAX_SYMBOL):
        raise BitstreamError(
            f"this codec makes a latent of magnitude {float(largest):g} of the image, and at most {MAX_SYMBOL} can be coded: "
            "its training diverged, or its weights are damaged; use another codec"
        )
    return values.round().to(torch.int32).clone(memory_format=torch.contiguous_format)


def to_pixels(x_hat: Tensor) -> Pixels:
    """Clamped and rounded to 8 bits. Shapes: x_hat (3, H, W); returns (H, W, 3)."""
    clean = torch.nan_to_num(x_hat, nan=0.0).clamp(0, 1)
    return (clean * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
