"""The distortion a codec is trained for: mean squared error and, where its weights are present, LPIPS."""

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from pipeline import losses
from pipeline.config import Config
from pipeline.errors import ArtifactError
from pipeline.models import pretrained
from pipeline.models.lpips import load_lpips


class DistortionConfig(Config):
    """Weights of the distortion terms. The defaults are the published ones."""

    mse: NonNegativeFloat = 150.0
    """Weight of the mean squared error of images in [0, 1]."""
    lpips: NonNegativeFloat = 1.0
    """Weight of LPIPS (AlexNet)."""
    lpips_shift: int = Field(default=0, ge=0, le=16)
    """How many rows and columns LPIPS leaves out, a random number of them at the top and left. AlexNet looks at every fourth
    pixel, and a codec learns to be close as seen from these alone; 3 takes that away. 0: as published."""
    if_lpips_missing: Literal["stop", "skip"] = "stop"
    """What to do without LPIPS's weights: stop, or train without it."""

    def lpips_state(self) -> str:
        """Which LPIPS this run uses: part of its identity, and said before training starts.

        Raises: ArtifactError if the weights are wanted, missing and not to be skipped.
        """
        if self.lpips == 0:
            return "off"
        if pretrained.find("alexnet") is not None:
            return pretrained.FILES["alexnet"].file
        if self.if_lpips_missing == "stop":
            raise ArtifactError(
                f"{pretrained.how_to_get('alexnet')}; or train without it: distortion.lpips=0 or distortion.if_lpips_missing=skip"
            )
        return "absent"


class Distortion(nn.Module):
    """mse * MSE + lpips * LPIPS."""

    def __init__(self, cfg: DistortionConfig):
        super().__init__()
        self.cfg = cfg
        self.lpips = load_lpips() if cfg.lpips else None

    def forward(self, x_hat: Tensor, x: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and its unweighted parts as metrics. Shapes: both (B, 3, H, W) in [0, 1]; scalars.

        seed: what LPIPS leaves out follows from it alone.
        """
        total = self.cfg.mse * losses.mse(x_hat, x)
        parts = {"psnr_db": losses.mean_psnr_db(x_hat.detach(), x)}
        if self.lpips is not None:
            distance = self.lpips(*_shifted(self.cfg.lpips_shift, seed, x_hat, x)).mean()
            total = total + self.cfg.lpips * distance
            parts["lpips"] = distance.detach()
        return total, parts


def _shifted(most: int, seed: int, *images: Tensor) -> tuple[Tensor, ...]:
    """The images without `most` rows and columns, the same of each. Shapes: (B, 3, H, W)."""
    if not most:
        return images
    top, left = torch.randint(most + 1, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    height, width = images[0].shape[2] - most, images[0].shape[3] - most
    return tuple(image[..., top : top + height, left : left + width] for image in images)
