"""VGG16's convolutions, and DISTS, which compares images by them."""

import hashlib
import io
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from pipeline.models import pretrained

# Of ImageNet, in RGB: what the network was trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The stages of DISTS end after these layers of torchvision's `features`; a pooling layer precedes all but the first
STAGES = ((0, 4), (5, 9), (10, 16), (17, 23), (24, 30))
CHANNELS = (3, 64, 128, 256, 512, 512)
# Of the file in the package DISTS-pytorch 0.1
DISTS_SHA256 = "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"


def layers(weights: Path | None) -> nn.Sequential:
    """The layers up to the last ReLU, frozen. weights: a file that `pretrained.find` returned; None: random ones, for tests."""
    # It takes seconds to import
    from torchvision.models.vgg import cfgs, make_layers

    trunk = make_layers(cfgs["D"])
    if weights is not None:
        trunk.load_state_dict({n.removeprefix("features."): v for n, v in pretrained.convolutions(weights).items()})
    for layer in trunk:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    # without the last pooling layer
    return trunk[:30].requires_grad_(False).eval()


def normalized(x: Tensor) -> Tensor:
    """As the network was trained. Shapes: x (B, 3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


class Dists(nn.Module):
    """DISTS of each image pair: similarity of structure and of texture in VGG16's stages.

    Shapes: x_hat, x (B, 3, H, W) in [0, 1]; returns (B,), 0 for equal images, lower is closer.
    Source: Ding et al. 2020, arXiv:2004.07728; weights of its release in the package DISTS-pytorch.
    """

    def __init__(self, weights: Path | None):
        """weights: VGG16's; None leaves the convolutions random, for tests of the arithmetic alone."""
        super().__init__()
        trunk = layers(weights)
        self.stages = nn.ModuleList(trunk[start:end] for start, end in STAGES)
        self.window: Tensor
        self.alpha: Tensor
        self.beta: Tensor
        taps = np.hanning(5)[1:-1]
        window = torch.tensor(taps[:, None] * taps[None, :], dtype=torch.float32)
        self.register_buffer("window", window / window.sum())
        alpha, beta = dists_weights()
        total = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha.flatten() / total)
        self.register_buffer("beta", beta.flatten() / total)
        self.requires_grad_(False).eval()

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return self.compare(self.features(x_hat), self.features(x))

    def compare(self, ours: Sequence[Tensor], originals: Sequence[Tensor]) -> Tensor:
        """DISTS from what `features` returned."""
        similarity = torch.zeros(len(ours[0]), device=ours[0].device)
        alpha, beta = self.alpha.split(CHANNELS), self.beta.split(CHANNELS)
        for a, b, f, g in zip(alpha, beta, ours, originals, strict=True):
            mean_f, mean_g = f.mean((2, 3)), g.mean((2, 3))
            var_f = (f - mean_f[..., None, None]).square().mean((2, 3))
            var_g = (g - mean_g[..., None, None]).square().mean((2, 3))
            covariance = (f * g).mean((2, 3)) - mean_f * mean_g
            structure = (2 * mean_f * mean_g + 1e-6) / (mean_f.square() + mean_g.square() + 1e-6)
            texture = (2 * covariance + 1e-6) / (var_f + var_g + 1e-6)
            similarity = similarity + structure @ a + texture @ b
        return 1 - similarity

    def features(self, x: Tensor) -> list[Tensor]:
        """The images and the five stages' outputs. Shapes: x (B, 3, H, W) in [0, 1]; the stages' (B, C, H / 2^n, W / 2^n)."""
        found, h = [x], normalized(x)
        for number, stage in enumerate(self.stages):
            if number:
                window = self.window.expand(h.shape[1], 1, 3, 3)
                h = (F.conv2d(h.square(), window, stride=2, padding=1, groups=h.shape[1]) + 1e-12).sqrt()
            h = stage(h)
            found.append(h)
        return found


@lru_cache(1)
def dists_weights() -> tuple[Tensor, Tensor]:
    """DISTS' weights of structure and of texture, (1, 1475, 1, 1) each. Raises: ArtifactError if the file is another one."""
    spec = find_spec("DISTS_pytorch")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).with_name("weights.pt")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != DISTS_SHA256:
        raise ArtifactError(f"{path}: not the file of DISTS-pytorch 0.1; install that version again")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state["alpha"].detach(), state["beta"].detach()


def load_dists() -> Dists | None:
    """DISTS with the cache folder's verified weights, or None where they are missing."""
    weights = pretrained.find("vgg16")
    return Dists(weights) if weights else None
