"""Fine-tunes a codec's synthesis against a discriminator; everything else in the codec stays frozen."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from pipeline import runs
from pipeline.artifacts import Kind
from pipeline.data.loader import Batch
from pipeline.models import discriminator as discriminators
from pipeline.models import saved
from pipeline.models.discriminator import Discriminator, LabelDiscriminatorConfig, PatchDiscriminatorConfig
from pipeline.models.labeler import PATCH
from pipeline.perceptual import Distortion, DistortionConfig
from pipeline.runs import Inputs
from pipeline.stages.pretrain import rate_and_quality
from pipeline.stages.training import TrainingConfig, train, validation_means
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime, frozen

# Weight of the adversarial loss and the discriminator's optimizer: MS-ILLM for "label", HiFiC for "patch"
PUBLISHED_WEIGHTS = {"label": 0.008, "patch": 0.15}
PUBLISHED_OPTIMIZERS = {"label": AdamConfig(lr=4e-4, betas=(0.5, 0.9)), "patch": AdamConfig(lr=1e-4)}


class StageConfig(TrainingConfig):
    """The codec's adversarial fine-tuning. data.batch_size counts both halves of a batch."""

    stage: Literal["gan"] = "gan"
    codec: str  # artifact of kind "codec": what is fine-tuned
    labeler: str | None = None  # artifact of kind "labeler"; the label discriminator needs it
    discriminator: Annotated[LabelDiscriminatorConfig | PatchDiscriminatorConfig, Field(discriminator="kind")] = (
        LabelDiscriminatorConfig()
    )
    gan_weight: NonNegativeFloat | None = None  # of the adversarial loss; None: the published one; 0: no discriminator
    discriminator_alone: NonNegativeInt = 0  # steps at the start in which only the discriminator learns
    distortion: DistortionConfig = DistortionConfig()
    generator_optimizer: AdamConfig = AdamConfig(lr=1e-4, betas=(0.5, 0.9))
    discriminator_optimizer: AdamConfig | None = None  # None: the published one

    @property
    def weight(self) -> float:
        return PUBLISHED_WEIGHTS[self.discriminator.kind] if self.gan_weight is None else self.gan_weight

    @property
    def needs_labels(self) -> bool:
        return self.discriminator.kind == "label" and self.weight > 0

    @model_validator(mode="after")
    def has_what_its_discriminator_needs(self) -> "StageConfig":
        if self.needs_labels and self.labeler is None:
            raise ValueError("the label discriminator needs labeler=, a 'labeler' artifact")
        return self


def run(cfg: StageConfig, folder: Path) -> Path:
    """Fine-tunes a codec adversarially and publishes it."""
    if done := runs.finished(folder, cfg):
        return done
    facts = {"lpips": cfg.distortion.lpips_state()}
    named: dict[str, tuple[str, Kind]] = {"shards": (cfg.data.shards, "shards"), "codec": (cfg.codec, "codec")}
    if cfg.needs_labels and cfg.labeler is not None:
        named["labeler"] = (cfg.labeler, "labeler")
    given = runs.inputs(facts, **named)
    # A batch has an even number of crops per process: one half for the generator, one for the discriminator.
    return train(
        cfg, folder, "codec", given, lambda runtime, crops: GanTask(cfg, runtime, crops, given), batch_multiple=2
    )


class GanTask:
    """One update of the synthesis network, then one of the discriminator, per step."""

    def __init__(self, cfg: StageConfig, runtime: Runtime, crops: Tensor, given: Inputs):
        self.cfg, self.runtime, self.crops = cfg, runtime, crops
        self.codec = saved.load_codec(given.artifacts["codec"][1])
        runtime.place(self.codec)
        self.codec.synthesis.requires_grad_(True)
        self.generator = runtime.trainable("generator", self.codec.synthesis, cfg.generator_optimizer, cfg.fit.steps)
        self.distortion = runtime.place(Distortion(cfg.distortion))
        self.labeler = None
        if "labeler" in given.artifacts:
            self.labeler = saved.load_labeler(given.artifacts["labeler"][1])
            runtime.place(self.labeler)
        self.adversary = None
        if cfg.weight:
            num_labels = self.labeler.cfg.num_codes if self.labeler else 0
            self.adversary = Adversary(cfg, runtime, num_labels, self.codec.cfg.latent_channels)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One update of each network. Shapes: batch.x (B, 3, H, W), B even.

        Every second crop of the stream is reconstructed for the generator; the others are the discriminator's real ones.
        """
        crops = batch.x if self.adversary else batch.x[0::2]
        labels = self.labels(crops)  # (B, H/8, W/8)
        y_hat, bits = self.codec.encode(crops)  # the real half needs its latent too, as the discriminator's context
        if self.adversary is None:
            _, metrics = self._reconstruct(crops, y_hat, labels, step)
            return metrics | {"train/bpp": bits.mean() / (crops.shape[-2] * crops.shape[-1])}

        x, x_labels, x_latent = crops[0::2], labels[0::2], y_hat[0::2]
        real, real_labels, real_latent = crops[1::2], labels[1::2], y_hat[1::2]
        fake, metrics = self._reconstruct(x, x_latent, x_labels, step)  # from before the update, as published
        metrics |= self.adversary.update(real, real_latent, real_labels, fake, x_latent, step)
        return metrics | {"train/bpp": bits[0::2].mean() / (x.shape[-2] * x.shape[-1])}

    def _reconstruct(self, x: Tensor, y_hat: Tensor, labels: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstructions, metrics, and one update of the synthesis network unless the discriminator learns alone."""
        learns = step >= self.cfg.discriminator_alone
        with torch.set_grad_enabled(learns):
            x_hat = self.generator.model(y_hat)
            loss, metrics = self.distortion(x_hat, x)
            if self.adversary is not None:
                metrics["generator"] = self.adversary.generator_loss(x_hat, y_hat, labels)
                loss = loss + self.cfg.weight * metrics["generator"]
        norm = self.generator.update(loss, step) if learns else torch.zeros_like(loss)
        metrics = {"loss": loss, **metrics, "generator_norm": norm}
        return x_hat.detach(), {f"train/{name}": value.detach() for name, value in metrics.items()}

    def labels(self, x: Tensor) -> Tensor:
        """Labels of an image's patches, zeros where nobody asks for them. Shapes: x (B, 3, H, W); returns (B, H/8, W/8)."""
        if self.labeler is None:
            return torch.zeros(len(x), x.shape[2] // PATCH, x.shape[3] // PATCH, dtype=torch.int64, device=x.device)
        return self.labeler.label(x)

    def validate(self) -> dict[str, float]:
        """As in pretraining, and how far the discriminator believes the reconstructions."""

        def measure(x: Tensor) -> dict[str, Tensor]:
            y_hat, bits = self.codec.encode(x)
            x_hat = self.codec.synthesis(y_hat)
            measured = rate_and_quality(bits, x_hat, x)
            if self.adversary is not None:
                measured["val/believed"] = self.adversary.believed(x_hat, y_hat, self.labels(x))
            return measured

        return validation_means(self.runtime, self.crops, measure)

    def export(self, folder: Path) -> None:
        saved.save(folder, self.codec, self.codec.cfg)


class Adversary:
    """The discriminator, its optimizer and its losses."""

    def __init__(self, cfg: StageConfig, runtime: Runtime, num_labels: int, latent_channels: int):
        optimizer = cfg.discriminator_optimizer or PUBLISHED_OPTIMIZERS[cfg.discriminator.kind]
        self.network: Discriminator = discriminators.build(cfg.discriminator, num_labels, latent_channels)
        self.trainable = runtime.trainable("discriminator", self.network, optimizer, cfg.fit.steps)

    def generator_loss(self, x_hat: Tensor, y_hat: Tensor, labels: Tensor) -> Tensor:
        """The adversarial loss of reconstructions, through the frozen discriminator."""
        with frozen(self.network) as network:
            return self.network.generator_loss(network(x_hat, y_hat), labels)

    def update(
        self, real: Tensor, real_latent: Tensor, real_labels: Tensor, fake: Tensor, fake_latent: Tensor, step: int
    ) -> dict[str, Tensor]:
        """One update of the discriminator, on both halves in one pass."""
        logits = self.trainable.model(torch.cat([real, fake]), torch.cat([real_latent, fake_latent]))
        real_logits, fake_logits = logits.chunk(2)
        judged = self.network.discriminator_loss(real_logits, fake_logits, real_labels)
        norm = self.trainable.update(judged, step)
        return {
            "train/discriminator": judged.detach(),
            "train/discriminator_norm": norm,
            "train/told_apart": self.network.told_apart(real_logits.detach(), fake_logits.detach()),
        }

    @torch.no_grad()
    def believed(self, x_hat: Tensor, y_hat: Tensor, labels: Tensor) -> Tensor:
        """Share of each reconstruction's patches that pass. Returns (B,)."""
        self.network.eval()  # spectral norm estimates nothing anew while it is measured
        believed = self.network.believed(self.network(x_hat, y_hat), labels)
        self.network.train()
        return believed
