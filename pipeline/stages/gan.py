"""Fine-tunes a codec's synthesis against a discriminator that names patch labels; everything else stays frozen."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from pipeline import losses, runs
from pipeline.data.loader import Batch
from pipeline.models import saved
from pipeline.models.discriminator import Discriminator, DiscriminatorConfig
from pipeline.perceptual import Distortion, DistortionConfig
from pipeline.runs import Inputs
from pipeline.stages.pretrain import rate_and_quality
from pipeline.stages.training import TrainingConfig, train, validation_means
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime, frozen


class StageConfig(TrainingConfig):
    """The codec's adversarial fine-tuning. data.batch_size counts both halves of a batch."""

    stage: Literal["gan"] = "gan"
    codec: str  # artifact of kind "codec": what is fine-tuned
    labeler: str  # artifact of kind "labeler"
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    gan_weight: NonNegativeFloat = 0.008  # of the generator's cross-entropy
    distortion: DistortionConfig = DistortionConfig()
    generator_optimizer: AdamConfig = AdamConfig(lr=1e-4, betas=(0.5, 0.9))
    discriminator_optimizer: AdamConfig = AdamConfig(lr=4e-4, betas=(0.5, 0.9))


def run(cfg: StageConfig, folder: Path) -> Path:
    """Fine-tunes a codec adversarially and publishes it."""
    if done := runs.finished(folder, cfg):
        return done
    facts = {"lpips": cfg.distortion.lpips_state()}
    given = runs.inputs(
        facts, shards=(cfg.data.shards, "shards"), codec=(cfg.codec, "codec"), labeler=(cfg.labeler, "labeler")
    )
    # A batch has an even number of crops per process: one half for the generator, one for the discriminator.
    return train(
        cfg, folder, "codec", given, lambda runtime, crops: GanTask(cfg, runtime, crops, given), batch_multiple=2
    )


class GanTask:
    """One update of the synthesis network, then one of the discriminator, per step."""

    def __init__(self, cfg: StageConfig, runtime: Runtime, crops: Tensor, given: Inputs):
        self.cfg, self.runtime, self.crops = cfg, runtime, crops
        self.labeler = saved.load_labeler(given.artifacts["labeler"][1])
        self.codec = saved.load_codec(given.artifacts["codec"][1])
        runtime.place(self.labeler)
        runtime.place(self.codec)
        self.codec.synthesis.requires_grad_(True)
        discriminator = Discriminator(cfg.discriminator, self.labeler.cfg.num_codes, self.codec.cfg.latent_channels)
        self.generator = runtime.trainable("generator", self.codec.synthesis, cfg.generator_optimizer, cfg.fit.steps)
        self.discriminator = runtime.trainable(
            "discriminator", discriminator, cfg.discriminator_optimizer, cfg.fit.steps
        )
        self.distortion = runtime.place(Distortion(cfg.distortion))

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One update of each network. Shapes: batch.x (B, 3, H, W), B even.

        Every second crop of the stream is reconstructed for the generator; the others are the discriminator's real ones.
        """
        labels = self.labeler.label(batch.x)  # (B, H/8, W/8)
        y_hat, bits = self.codec.encode(batch.x)  # the real half needs its latent too, as the discriminator's context
        x, x_labels, x_latent = batch.x[0::2], labels[0::2], y_hat[0::2]
        real, real_labels, real_latent = batch.x[1::2], labels[1::2], y_hat[1::2]

        x_hat = self.generator.model(x_latent)
        with frozen(self.discriminator.module) as discriminator:
            fooled = losses.generator_loss(discriminator(x_hat, x_latent), x_labels)
        distortion, parts = self.distortion(x_hat, x)
        loss = distortion + self.cfg.gan_weight * fooled
        self.generator.update(loss, step)

        fake = x_hat.detach()  # from before the update, as published
        logits = self.discriminator.model(torch.cat([real, fake]), torch.cat([real_latent, x_latent]))
        real_logits, fake_logits = logits.chunk(2)
        judged = losses.discriminator_loss(real_logits, fake_logits, real_labels)
        self.discriminator.update(judged, step)
        with torch.no_grad():
            told_apart = (fake_logits.argmax(1) == 0).float().mean() + (real_logits.argmax(1) != 0).float().mean()
        return {
            "train/loss": loss.detach(),
            "train/bpp": bits[0::2].mean() / (x.shape[-2] * x.shape[-1]),
            **{f"train/{name}": value for name, value in parts.items()},
            "train/generator": fooled.detach(),
            "train/discriminator": judged.detach(),
            "train/told_apart": told_apart / 2,
        }

    def validate(self) -> dict[str, float]:
        """As in pretraining, and how far the discriminator believes the reconstructions' labels."""

        def measure(x: Tensor) -> dict[str, Tensor]:
            y_hat, _ = self.codec.encode(x)
            logits = self.discriminator.module(self.codec.synthesis(y_hat), y_hat)
            named = (logits.argmax(1) == self.labeler.label(x) + 1).float().mean((1, 2))
            return rate_and_quality(self.codec, x) | {"val/named_as_original": named}

        return validation_means(self.runtime, self.crops, measure)

    def export(self, folder: Path) -> None:
        saved.save(folder, self.codec, self.codec.cfg)
