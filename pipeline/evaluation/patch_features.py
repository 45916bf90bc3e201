"""Features of an image's patches, from networks that others trained: what FID, KID and VGG-FD compare."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.images import Pixels
from pipeline.evaluation.frechet import Features
from pipeline.models import pretrained, vgg16
from pipeline.storage import cache, disk

# Pixels that go through a network at once
CHUNK_PIXELS = 2**20


@dataclass(frozen=True)
class PatchSet:
    """Which patches of an image go through which network.

    shifted: a second grid starts half a patch right and down, in images with both sides of at least 1.5 patches.
    """

    network: pretrained.Name
    size: int
    shifted: bool
    num_features: int


# Source of the first: MS-ILLM release; gives 28,650 patches for CLIC2020 and 6,573 for DIV2K. The others: plain grids.
PATCH_SETS = {
    "inception_256": PatchSet("inception", 256, shifted=True, num_features=2048),
    "inception_64": PatchSet("inception", 64, shifted=False, num_features=2048),
    "vgg16_64": PatchSet("vgg16", 64, shifted=False, num_features=512),
}


def patch_corners(height: int, width: int, patches: PatchSet) -> Iterator[tuple[int, int]]:
    """Top-left corners of an image's whole patches, grid after grid."""
    size = patches.size
    both = patches.shifted and min(height, width) >= size + size // 2
    for start in (0, size // 2) if both else (0,):
        for top in range(start, height - size + 1, size):
            for left in range(start, width - size + 1, size):
                yield top, left


class PatchFeatures:
    """Features of one kind, from verified weights."""

    def __init__(self, name: str, weights: Path, device: torch.device):
        self.name, self.patches, self.device = name, PATCH_SETS[name], device
        self.network: nn.Module
        if self.patches.network == "inception":
            # It imports torchvision, which takes seconds
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            ).eval()
        else:
            self.network = vgg16.layers(weights)
        self.network.to(device).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def of(self, pixels: Pixels) -> Features:
        """Shapes: pixels (H, W, 3) uint8; returns (number of patches, number of features)."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        size = self.patches.size
        corners = list(patch_corners(pixels.shape[0], pixels.shape[1], self.patches))
        found = [np.empty((0, self.patches.num_features), np.float32)]
        step = max(1, CHUNK_PIXELS // size**2)
        for start in range(0, len(corners), step):
            batch = torch.stack([image[:, t : t + size, s : s + size] for t, s in corners[start : start + step]])
            found.append(self._forward(batch.to(self.device)).float().cpu().numpy())
        return np.concatenate(found)

    def of_tensor(self, x: Tensor) -> Tensor:
        """Shapes: x (B, 3, H, W) in 0..255 on the device; returns (number of patches of all images, number of features)."""
        corners = list(patch_corners(x.shape[2], x.shape[3], self.patches))
        size = self.patches.size
        patches = torch.cat([x[:, :, t : t + size, s : s + size] for t, s in corners])
        return torch.cat([self._forward(part) for part in patches.split(max(1, CHUNK_PIXELS // size**2))])

    def _forward(self, patches: Tensor) -> Tensor:
        """Shapes: patches (B, 3, S, S) in 0..255; returns (B, number of features)."""
        if self.patches.network == "inception":
            # TF1's resizing to 299x299 and scaling are inside
            features: Tensor = self.network(patches)[0]
            return features
        x = vgg16.normalized(patches.float() / 255).contiguous(memory_format=torch.channels_last)
        pooled: Tensor = self.network(x).mean((2, 3))
        return pooled

    def of_original(self, pixels: Pixels) -> Features:
        """As `of`, kept on disk by content: originals come again in every evaluation."""
        key = hashlib.sha256(f"{self.name} {self.patches} {torch.__version__} {pixels.shape} ".encode())
        key.update(np.ascontiguousarray(pixels).tobytes())
        path = cache.home() / "features" / f"{key.hexdigest()}.npy"
        try:
            known: Features = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            return known
        except (OSError, ValueError, EOFError):
            found = self.of(pixels)
        stream = io.BytesIO()
        np.save(stream, found)
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(path, stream.getvalue())
        return found
