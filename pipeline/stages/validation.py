"""What the training stages measure and show of validation crops."""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from pydantic import NonNegativeInt
from torch import Tensor

from pipeline import losses
from pipeline.config import Changeable, Config
from pipeline.data.images import Pixels
from pipeline.evaluation import frechet
from pipeline.evaluation.patch_features import PatchFeatures
from pipeline.models import pretrained
from pipeline.models.lpips import load_lpips
from pipeline.training.runtime import Runtime


class ValidationConfig(Config):
    """What a validation measures and shows besides rate and PSNR."""

    realism: Annotated[bool, Changeable()] = True
    """LPIPS and VGG-FD/64 of validation crops, where AlexNet's and VGG16's weights are: 0.04 TFLOP per crop of 256x256."""
    num_images: Annotated[NonNegativeInt, Changeable()] = 4
    """Number of validation crops that every validation logs as one picture, with their reconstructions."""


def validation_means(
    runtime: Runtime, crops: Tensor, measure: Callable[[Tensor], dict[str, Tensor]], batch_size: int = 8
) -> dict[str, float]:
    """Means over every process's validation crops of what `measure` returns per image: name -> (B,).

    Shapes: crops (N, 3, H, W) in [0, 1], of this process; some process may have none.
    """
    totals: dict[str, Tensor] = {}
    with torch.no_grad():
        for x in crops.split(batch_size) if len(crops) else [torch.full((1, 3, *crops.shape[2:]), 0.5)]:
            values = measure(x.to(runtime.device, memory_format=torch.channels_last))
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros((), device=runtime.device)) + value.sum() * bool(len(crops))
    counted = runtime.sum(torch.stack([*totals.values(), torch.tensor(float(len(crops)), device=runtime.device)]))
    *sums, count = counted.tolist()
    return {name: total / count for name, total in zip(totals, sums, strict=True)}


def rate_and_quality(bits: Tensor, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Bits per pixel and PSNR of each image. Shapes: bits (B,); x_hat, x (B, 3, H, W) in [0, 1]; each value (B,)."""
    return {
        "val/bpp": bits / (x.shape[-2] * x.shape[-1]),
        "val/psnr_db": losses.psnr_db((x_hat.clamp(0, 1) - x).square().mean((1, 2, 3))),
    }


class Realism:
    """LPIPS of validation crops, and the Frechet distance of their patches; what lacks its weights is left out.

    One validation calls `measure` for each batch and then `distance`.
    """

    def __init__(self, cfg: ValidationConfig, runtime: Runtime, crops: Tensor):
        """crops: (N, 3, H, W) in [0, 1], of this process."""
        self.runtime, self.crops = runtime, crops
        lpips = load_lpips() if cfg.realism else None
        weights = pretrained.find("vgg16") if cfg.realism and min(crops.shape[2:]) >= 64 else None
        self._lpips = runtime.place(lpips) if lpips else None
        self._features = PatchFeatures("vgg16_64", weights, runtime.device) if weights else None
        self._originals: frechet.Moments | None = None
        self._sums: list[Tensor] = []

    def measure(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Shapes: both (B, 3, H, W) in [0, 1]; each value (B,)."""
        x_hat = x_hat.float().clamp(0, 1)
        if self._features is not None and len(self.crops):
            self._sums.append(_sums(self._features.of_tensor((x_hat * 255).round())))
        return {} if self._lpips is None else {"val/lpips": self._lpips(x_hat, x)}

    def distance(self) -> dict[str, float]:
        """Over the patches of all processes since the last call."""
        if self._features is None:
            return {}
        if self._originals is None:
            batches = self.crops.split(8) if len(self.crops) else ()
            with torch.no_grad():
                sums = [_sums(self._features.of_tensor(x.to(self.runtime.device) * 255)) for x in batches]
            self._originals = self._moments(sums)
        ours, self._sums = self._moments(self._sums), []
        return {"val/vgg_fd_64": frechet.distance_of_moments(ours, self._originals)}

    def _moments(self, sums: list[Tensor]) -> frechet.Moments:
        assert self._features is not None
        dims = self._features.patches.num_features
        zeros = torch.zeros(1 + dims + dims * dims, dtype=torch.float64, device=self.runtime.device)
        total = self.runtime.sum(torch.stack([zeros, *sums]).sum(0)).cpu().numpy()
        return frechet.Moments(int(total[0]), total[1 : 1 + dims], total[1 + dims :].reshape(dims, dims))


def _sums(features: Tensor) -> Tensor:
    """Count, sum and sum of products, in one row. Shapes: features (N, D); returns (1 + D + D * D,) float64."""
    exact = features.double()
    count = exact.new_tensor([len(exact)])
    return torch.cat([count, exact.sum(0), (exact.T @ exact).flatten()])


class Examples:
    """The first validation crops of the main process beside what became of them: one picture per validation."""

    def __init__(self, cfg: ValidationConfig):
        self.num_images = cfg.num_images
        self._rows: list[Pixels] = []

    def start(self) -> None:
        """Forgets the last validation's."""
        self._rows = []

    def add(self, x: Tensor, x_hat: Tensor, third: Tensor | None = None) -> None:
        """Takes what is still wanted of a batch. Shapes: all (B, 3, H, W) in [0, 1]; third: instead of the difference."""
        for number in range(min(len(x), self.num_images - len(self._rows))):
            columns = [x[number].float(), x_hat[number].float().clamp(0, 1)]
            # gray where nothing changed
            columns.append(third[number] if third is not None else 0.5 + 4 * (columns[1] - columns[0]))
            row = torch.cat(columns, dim=-1).clamp(0, 1).mul(255).round().to(torch.uint8)
            self._rows.append(row.permute(1, 2, 0).cpu().numpy())

    def picture(self) -> Pixels | None:
        """A row for each crop: original, reconstruction, and four times the difference around gray or the labels."""
        return np.concatenate(self._rows) if self._rows else None


def label_colors(labels: Tensor, patch: int) -> Tensor:
    """Label maps as colors, the same for a label in every picture.

    Shapes: labels (B, h, w); returns (B, 3, h * patch, w * patch) in [0, 1].
    """
    # numbers that follow each other get colors far apart: multiples of the golden ratio
    hue = (labels.double() * 0.61803398875) % 1
    light = 0.35 + 0.6 * ((labels.double() * 0.754877666) % 1)
    angles = torch.stack([hue, hue + 1 / 3, hue + 2 / 3], dim=1) * (2 * torch.pi)
    colors = (light[:, None] * (0.6 + 0.4 * angles.cos())).float()
    return colors.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
