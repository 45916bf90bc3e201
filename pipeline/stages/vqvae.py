"""Trains the VQ-VAE whose code indices label image patches."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from pipeline import losses
from pipeline.artifacts import run_folder
from pipeline.data import transforms
from pipeline.data.batch import Batch
from pipeline.data.transforms import to_float
from pipeline.models import initial, serialization
from pipeline.models.initial import Init
from pipeline.models.labeler import PATCH, Labeler, LabelerConfig
from pipeline.registry import resolve
from pipeline.stages.train import TrainingConfig, mean_over_parts, train
from pipeline.stages.validation import Examples, label_colors, validation_means
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime, mix_seed


class StageConfig(TrainingConfig):
    """The labeler's training."""

    stage: Literal["vqvae"] = "vqvae"
    labeler: LabelerConfig = LabelerConfig()
    pixel_loss: Literal["l1", "mse"] = "l1"
    commitment_weight: NonNegativeFloat = 0.25
    """Weight of the loss that pulls the encoder to its codes."""
    codebook_weight: NonNegativeFloat = 1.0
    """Weight of the loss that pulls the codes to the encoder."""
    init: Init = "he"
    """Initial weights of convolutions; "pytorch" as in the published code learns little in the first hundreds of
    steps."""
    codebook_init: Literal["data", "gaussian"] = "data"
    """Initial codes: encoded patches of the data, or random directions."""
    quantize_after: NonNegativeInt = 0
    """Number of steps of plain autoencoding before vectors are quantized."""
    dead_code_every: PositiveInt = 200
    """Number of steps between two replacements of dead codes."""
    dead_code_below: NonNegativeFloat = 0.125
    """A code is dead if it is used less than this fraction of the average."""
    dead_code_until: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Fraction of the steps after which codes are no longer replaced."""
    optimizer: AdamConfig = AdamConfig(lr=1e-4, betas=(0.9, 0.99))


def run(cfg: StageConfig, folder: Path) -> Path:
    """Trains a labeler and publishes it."""
    if done := run_folder.finished(folder, cfg):
        return done
    given = resolve.read_inputs(cfg, cfg.engine.facts())
    return train(cfg, folder, "labeler", given, lambda runtime, crops: VqvaeTask(cfg, runtime, crops))


class CodeUsage:
    """How often each code was chosen since the last re-seeding, by all processes together."""

    def __init__(self, num_codes: int, device: torch.device):
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])


class VqvaeTask:
    """Reconstruction and codebook losses; codes that are hardly used are moved onto encoded patches."""

    def __init__(self, cfg: StageConfig, runtime: Runtime, crops: Tensor):
        self.cfg, self.runtime, self.crops = cfg, runtime, crops
        self.labeler = Labeler(cfg.labeler)
        if cfg.init == "he":
            initial.he_labeler(self.labeler)
        self.trainable = runtime.trainable("labeler", self.labeler, cfg.optimizer, cfg.fit.steps)
        self.usage = CodeUsage(cfg.labeler.num_codes, runtime.device)
        runtime.register("usage", self.usage)
        self.examples = Examples(cfg.validation)

    def train_step(self, parts: list[Batch], step: int) -> dict[str, Tensor]:
        """One update. Shapes: each part's x (B, 3, H, W)."""
        since = step - self.cfg.quantize_after
        if (
            since >= 0
            and since % self.cfg.dead_code_every == 0
            and step < self.cfg.fit.steps * self.cfg.dead_code_until
        ):
            self.reseed(parts, step, everything=since == 0 and self.cfg.codebook_init == "data")
        chosen = torch.zeros_like(self.usage.counts)
        metrics = mean_over_parts(
            [self._pass(part.x, since >= 0, 1 / len(parts), part is parts[-1], chosen) for part in parts]
        )
        self.usage.counts += self.runtime.sum(chosen)
        metrics["train/labeler_grad_norm"] = self.trainable.update(step)
        return metrics | {"train/codes_used": (self.usage.counts > 0).sum().float()}

    def _pass(self, x: Tensor, quantise: bool, share: float, last: bool, chosen: Tensor) -> dict[str, Tensor]:
        """Forward and backward over one part of the batch, which counts with its share; adds its codes to `chosen`."""
        with self.trainable.accumulate(last):
            out = self.trainable.model(x, quantise=quantise)
            pixel = (F.l1_loss if self.cfg.pixel_loss == "l1" else F.mse_loss)(out.x_hat, x)
            vq = losses.vq_loss(out.z, out.codes)
            commitment = self.cfg.commitment_weight if quantise else 0.0
            loss = pixel + commitment * vq.commitment + self.cfg.codebook_weight * vq.embedding
            self.trainable.backward(loss * share)
        chosen += self._count(out.labels)
        return {
            "train/loss": loss.detach(),
            "train/reconstruction_loss": pixel.detach(),
            "train/commitment": vq.commitment.detach(),
            "train/psnr_db": losses.mean_psnr_db(out.x_hat.detach(), x),
        }

    @torch.no_grad()
    def reseed(self, parts: list[Batch], step: int, everything: bool) -> None:
        """Moves codes that were chosen less than the configured share of average, or all, onto random patches of this batch.

        All processes gather the same patches and draw the same ones.
        """
        z = torch.cat([self.labeler.embed(part.x) for part in parts])
        patches = self.runtime.gather(z.permute(0, 2, 3, 1).reshape(-1, self.cfg.labeler.code_dim))
        average = self.usage.counts.double().mean()
        # Before anything was chosen, as at the first step, nothing is known of the codes' use
        dead = (self.usage.counts <= average * self.cfg.dead_code_below) & (average > 0)
        idle = (dead | everything).nonzero().flatten()
        generator = torch.Generator().manual_seed(mix_seed(self.cfg.seed, step))
        shuffled = torch.randperm(len(patches), generator=generator)
        chosen = shuffled[torch.arange(len(idle)) % len(patches)].to(patches.device)
        self.labeler.codebook[idle] = patches[chosen]
        self.usage.counts.zero_()
        self.trainable.sync_master_weights()

    def validate(self) -> dict[str, float]:
        """Reconstruction quality, how the validation patches use the codes, and how many labels survive a disturbance."""
        counts = torch.zeros_like(self.usage.counts)
        self.examples.start()

        def measure(x: Tensor) -> dict[str, Tensor]:
            out = self.labeler(x)
            self.examples.add(x, out.x_hat, label_colors(out.labels, PATCH))
            counts.add_(self._count(out.labels) * bool(len(self.crops)))
            return {
                "val/psnr_db": losses.psnr_db((out.x_hat.clamp(0, 1) - x).square().mean((1, 2, 3))),
                "val/stable_under_noise": self._unchanged(out.labels, with_noise(x)),
                "val/stable_under_jpeg": self._unchanged(out.labels, through_jpeg(x)),
            }

        with self.trainable.ema_weights():
            means = validation_means(self.runtime, self.crops, measure)
        total = self.runtime.sum(counts)
        perplexity = float(losses.perplexity(total))
        return means | {
            "val/codes_used_share": float((total > 0).double().mean()),
            "val/perplexity": perplexity,
            "val/label_entropy_bits": math.log2(perplexity),
        }

    def _unchanged(self, labels: Tensor, disturbed: Tensor) -> Tensor:
        return (self.labeler.label(disturbed) == labels).float().mean((1, 2))

    def export(self, folder: Path) -> None:
        with self.trainable.ema_weights():
            serialization.save(folder, self.labeler, self.cfg.labeler)

    def _count(self, labels: Tensor) -> Tensor:
        """How often each code was chosen. Shapes: labels (B, h, w); returns (num_codes,) int64."""
        flat = labels.flatten()
        # torch.bincount would wait for the device to look at the labels
        return torch.zeros_like(self.usage.counts).scatter_add_(0, flat, torch.ones_like(flat))


def with_noise(x: Tensor) -> Tensor:
    """Images plus Gaussian noise of two gray levels, the same noise each time. Shapes: x (B, 3, H, W) in [0, 1]."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    return (x + noise * (2 / 255)).clamp(0, 1)


def through_jpeg(x: Tensor) -> Tensor:
    """Images after JPEG at quality 75. Shapes: x (B, 3, H, W) in [0, 1]."""
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return to_float(np.stack([transforms.recompressed(p, quality=75) for p in pixels])).to(x)
