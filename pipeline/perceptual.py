"""The distortion a codec is trained for: mean squared error and, where its weights are present, LPIPS."""

from pathlib import Path
from typing import Literal

import lpips
import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from pipeline import losses, weights
from pipeline.config import Config
from pipeline.errors import ArtifactError


class DistortionConfig(Config):
    """Weights of the distortion terms. The defaults are the published ones."""

    mse: NonNegativeFloat = 150.0  # of the mean squared error of images in [0, 1]
    lpips: NonNegativeFloat = 1.0  # of LPIPS (AlexNet)
    if_lpips_missing: Literal["stop", "skip"] = "stop"  # skip: train without, and say so

    def lpips_state(self) -> str:
        """Which LPIPS this run uses: part of its identity, and said before training starts.

        Raises: ArtifactError if the weights are wanted, missing and not to be skipped.
        """
        if self.lpips == 0:
            return "off"
        if weights.find("alexnet") is not None:
            return weights.FILES["alexnet"].file
        if self.if_lpips_missing == "stop":
            raise ArtifactError(
                f"{weights.how_to_get('alexnet')}; or train without it: distortion.lpips=0 or distortion.if_lpips_missing=skip"
            )
        return "absent"


class Distortion(nn.Module):
    """mse * MSE + lpips * LPIPS."""

    def __init__(self, cfg: DistortionConfig):
        super().__init__()
        self.cfg = cfg
        self.lpips = load() if cfg.lpips else None

    def forward(self, x_hat: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and its unweighted parts as metrics. Shapes: both (B, 3, H, W) in [0, 1]; scalars."""
        total = self.cfg.mse * losses.mse(x_hat, x)
        parts = {"psnr_db": losses.mean_psnr_db(x_hat.detach(), x)}
        if self.lpips is not None:
            distance = self.lpips(x_hat, x).mean()
            total = total + self.cfg.lpips * distance
            parts["lpips"] = distance.detach()
        return total, parts


class Lpips(nn.Module):
    """LPIPS (AlexNet, v0.1) of each image pair.

    Shapes: x_hat, x (B, 3, H, W) in [0, 1]; returns (B,), lower is closer.
    Feature vectors are normalised by sqrt(sum(f^2 + 1e-8)): with the usual epsilon outside the root, the gradient of an
    all-zero feature is not a number.
    Source: Zhang et al. 2018, arXiv:1801.03924; stable root as in the MS-ILLM release.
    """

    def __init__(self, trunk: Path | None):
        """`trunk` is AlexNet's weights file; None leaves the trunk random, for tests of the arithmetic alone."""
        super().__init__()
        self.net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        if trunk is not None:
            state = weights.convolutions(trunk)
            for (
                name,
                parameter,
            ) in self.net.net.named_parameters():  # "sliceN.i.weight" is torchvision's "features.i.weight"
                parameter.data.copy_(state["features." + name.split(".", 1)[1]])
        self.requires_grad_(False).eval()

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), device=x.device)
        for head, a, b in zip(self.net.lins, self._features(x_hat), self._features(x), strict=True):
            total = total + head((_unit(a) - _unit(b)).square()).mean(dim=(1, 2, 3))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        return list(self.net.net(self.net.scaling_layer(2 * x - 1)))


def load() -> Lpips | None:
    """LPIPS from the cache folder's verified weights, or None where they are missing."""
    trunk = weights.find("alexnet")
    return Lpips(trunk) if trunk else None


def _unit(features: Tensor) -> Tensor:
    return features / (features.square() + 1e-8).sum(1, keepdim=True).sqrt()
