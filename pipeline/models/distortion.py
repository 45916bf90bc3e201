"""The distortion a codec is trained for: mean squared error and, where its weights are present, LPIPS."""

from typing import Literal

from pydantic import NonNegativeFloat
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

    def forward(self, x_hat: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and its unweighted parts as metrics. Shapes: both (B, 3, H, W) in [0, 1]; scalars."""
        total = self.cfg.mse * losses.mse(x_hat, x)
        parts = {"psnr_db": losses.mean_psnr_db(x_hat.detach(), x)}
        if self.lpips is not None:
            distance = self.lpips(x_hat, x).mean()
            total = total + self.cfg.lpips * distance
            parts["lpips"] = distance.detach()
        return total, parts
