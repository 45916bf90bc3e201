"""Quality and rate of one reconstructed image, as the MS-ILLM evaluation defines them."""

import io

import torch
import torch.nn.functional as F
from PIL import Image
from ssimulacra2 import compute_ssimulacra2
from torch import Tensor

from pipeline.data.images import Pixels

# Wang et al. 2003
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# SSIMULACRA 2 weighs six scales, of which the coarsest needs eight pixels
SSIMULACRA2_MIN_SIDE = 8 * 2**5
# The window must fit into the coarsest scale
MS_SSIM_MIN_SIDE = 11 * 2 ** (len(MS_SSIM_WEIGHTS) - 1)


def bits_per_pixel(num_bytes: int, height: int, width: int) -> float:
    """Rate of a compressed file: 8 x its bytes, headers included, per pixel of the image."""
    return 8 * num_bytes / (height * width)


def psnr_db(ours: Pixels, original: Pixels) -> float:
    """Peak signal-to-noise ratio of 8-bit images in dB; infinite if they are equal."""
    squared = (torch.from_numpy(ours).double() - torch.from_numpy(original).double()).square().mean()
    return float(10 * torch.log10(255**2 / squared))


def ms_ssim(ours: Pixels, original: Pixels) -> float | None:
    """Multi-scale structural similarity of 8-bit images, in [0, 1]; None if a side is shorter than 176 pixels.

    Per color channel, then averaged; odd sides are padded to even ones by repetition between scales.
    Source: Wang, Simoncelli and Bovik 2003; details as in the MS-ILLM release.
    """
    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    x, y = (torch.from_numpy(p).permute(2, 0, 1).unsqueeze(1).double() for p in (ours, original))  # (3, 1, H, W)
    result = torch.ones(3, dtype=torch.float64)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            x, y = _halved(x), _halved(y)
        similarity, contrast = _ssim(x, y)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        result = result * (similarity if last else contrast).relu() ** weight
    return float(result.mean())


def ssimulacra2(ours: Pixels, original: Pixels) -> float | None:
    """SSIMULACRA 2 of 8-bit images, 100 for equal ones; None if a side is shorter than 256 pixels.

    Source: Sneyers 2023, github.com/cloudinary/ssimulacra2; by the package ssimulacra2.
    """
    if min(original.shape[:2]) < SSIMULACRA2_MIN_SIDE:
        return None
    return float(compute_ssimulacra2(_bitmap(original), _bitmap(ours)))


def _bitmap(pixels: Pixels) -> io.BytesIO:
    """What that package opens."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "BMP")
    stream.seek(0)
    return stream


def _gaussian() -> Tensor:
    x = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    return window / window.sum()


def _blur(x: Tensor) -> Tensor:
    window = _gaussian()
    return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part, mean over positions. Shapes: x, y (C, 1, H, W) in 0..255; returns (C,) twice."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean((1, 2, 3)), contrast.mean((1, 2, 3))


def _halved(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    return F.avg_pool2d(F.pad(x, (0, width % 2, 0, height % 2), mode="replicate"), 2)
