"""LPIPS (AlexNet), from the weights that `pretrained` finds."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.models import pretrained

# What AlexNet's convolutions and poolings need
LPIPS_MIN_SIDE = 31


class Lpips(nn.Module):
    """LPIPS (AlexNet, v0.1) of each image pair.

    Shapes: x_hat, x (B, 3, H, W) in [0, 1], sides of `LPIPS_MIN_SIDE` pixels or more; returns (B,), lower is closer.
    Feature vectors are normalized by sqrt(sum(f^2 + 1e-8)): with the usual epsilon outside the root, the gradient of an
    all-zero feature is not a number.
    Source: Zhang et al. 2018, arXiv:1801.03924; stable root as in the MS-ILLM release.
    """

    def __init__(self, trunk: Path | None):
        """`trunk` is AlexNet's weights file; None leaves the trunk random, for tests of the arithmetic alone."""
        super().__init__()
        # It imports torchvision, which takes seconds
        import lpips

        with warnings.catch_warnings():
            # lpips gives torchvision an option under its former name
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        if trunk is not None:
            state = pretrained.convolutions(trunk)
            # "sliceN.i.weight" is torchvision's "features.i.weight"
            for name, parameter in self.net.net.named_parameters():
                parameter.data.copy_(state["features." + name.split(".", 1)[1]])
        self.requires_grad_(False).eval()

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), device=x.device)
        for head, a, b in zip(self.net.lins, self._features(x_hat), self._features(x), strict=True):
            total = total + head((_unit(a) - _unit(b)).square()).mean(dim=(1, 2, 3))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        return list(self.net.net(self.net.scaling_layer(2 * x - 1)))


def load_lpips() -> Lpips | None:
    """LPIPS from the cache folder's verified weights, or None where they are missing."""
    trunk = pretrained.find("alexnet")
    return Lpips(trunk) if trunk else None


def _unit(features: Tensor) -> Tensor:
    return features / (features.square() + 1e-8).sum(1, keepdim=True).sqrt()
