"""Fine-tunes a codec's synthesis against a discriminator; everything else in the codec stays frozen."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from pipeline.artifacts import run_folder
from pipeline.config import Input
from pipeline.data.batch import Batch
from pipeline.models import discriminator as discriminators
from pipeline.models import serialization
from pipeline.models.codec import Codec
from pipeline.models.discriminator import (
    Discriminator,
    LabelDiscriminator,
    LabelDiscriminatorConfig,
    PatchDiscriminatorConfig,
)
from pipeline.models.distortion import Distortion, DistortionConfig
from pipeline.models.initial import he_label_discriminator
from pipeline.models.labeler import PATCH, Labeler
from pipeline.registry import resolve
from pipeline.stages.train import TrainingConfig, mean_over_parts, train
from pipeline.stages.validation import Examples, Realism, rate_and_quality, validation_means
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime, step_seed

# Weight of the adversarial loss and the discriminator's optimizer: MS-ILLM for "label", HiFiC for "patch"
PUBLISHED_WEIGHTS = {"label": 0.008, "patch": 0.15}
PUBLISHED_OPTIMIZERS = {"label": AdamConfig(lr=4e-4, betas=(0.5, 0.9)), "patch": AdamConfig(lr=1e-4)}


class StageConfig(TrainingConfig):
    """The codec's adversarial fine-tuning. data.batch_size counts both halves of a batch."""

    stage: Literal["gan"] = "gan"
    codec: Annotated[str, Input("codec")]
    """Artifact of kind "codec" that is fine-tuned."""
    labeler: Annotated[str | None, Input("labeler", when="needs_labels")] = None
    """Artifact of kind "labeler"; the label discriminator needs it."""
    discriminator: Annotated[LabelDiscriminatorConfig | PatchDiscriminatorConfig, Field(discriminator="kind")] = (
        LabelDiscriminatorConfig()
    )
    gan_weight: NonNegativeFloat | None = None
    """Weight of the adversarial loss; null: the published one; 0: no discriminator."""
    labeler_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the labeler, which is not trained here; bf16 takes less time and changes some of the labels."""
    frozen_cache_mb: NonNegativeInt = 0
    """Memory per process for labels and latents of fixed crops, in MB: 230 kB per crop of 256x256."""
    discriminator_warmup_steps: NonNegativeInt = 0
    """Number of steps at the start in which only the discriminator learns."""
    distortion: DistortionConfig = DistortionConfig()
    generator_optimizer: AdamConfig = AdamConfig(lr=1e-4, betas=(0.5, 0.9))
    discriminator_optimizer: AdamConfig | None = None
    """None: the published one."""

    @property
    def adversarial_weight(self) -> float:
        return PUBLISHED_WEIGHTS[self.discriminator.kind] if self.gan_weight is None else self.gan_weight

    @property
    def needs_labels(self) -> bool:
        return self.discriminator.kind == "label" and self.adversarial_weight > 0

    @model_validator(mode="after")
    def has_what_its_discriminator_needs(self) -> "StageConfig":
        if self.needs_labels and self.labeler is None:
            raise ValueError("the label discriminator needs labeler=, a 'labeler' artifact")
        if self.frozen_cache_mb and not self.data.fixed_crops:
            raise ValueError("frozen_cache_mb needs data.fixed_crops=true: other crops never repeat")
        return self


def facts(cfg: StageConfig) -> dict[str, str]:
    """What a run depends on besides its config and artifacts, which its record holds."""
    return {"lpips": cfg.distortion.lpips_state(), **cfg.engine.facts()}


def run(cfg: StageConfig, folder: Path) -> Path:
    """Fine-tunes a codec adversarially and publishes it."""
    if done := run_folder.finished(folder, cfg):
        return done
    given = resolve.read_inputs(cfg, facts(cfg))
    codec = serialization.load_codec(given.artifacts["codec"][1])
    labeler = serialization.load_labeler(given.artifacts["labeler"][1]) if cfg.needs_labels else None
    # A batch has an even number of crops per process: one half for the generator, one for the discriminator.
    return train(
        cfg,
        folder,
        "codec",
        given,
        lambda runtime, crops: GanTask(cfg, runtime, crops, codec, labeler),
        batch_multiple=2,
    )


class FrozenOutputs(NamedTuple):
    """Outputs of the frozen networks for crops: labels (B, H/8, W/8), y_hat (B, latent_channels, H/16, W/16), bits (B,)."""

    labels: Tensor
    y_hat: Tensor
    bits: Tensor


class FrozenOutputCache:
    """The frozen networks' outputs for crops that repeat, in the host's memory, until that is full.

    A batch is found or computed whole: results of a batch of another size could differ in their last bits.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.rows: dict[int, FrozenOutputs] = {}

    def get(self, images: list[int], device: torch.device) -> FrozenOutputs | None:
        """What was kept of these crops, or None if it is not all there."""
        if not self.max_bytes or not all(image in self.rows for image in images):
            return None
        columns = zip(*(self.rows[image] for image in images), strict=True)
        labels, y_hat, bits = (torch.stack(column).to(device, non_blocking=True) for column in columns)
        return FrozenOutputs(labels.long(), y_hat.contiguous(memory_format=torch.channels_last), bits)

    def put(self, images: list[int], seen: FrozenOutputs) -> None:
        if self.bytes >= self.max_bytes:
            return
        kept = seen.labels.to(torch.int32).cpu(), seen.y_hat.cpu(), seen.bits.cpu()
        for image, *row in zip(images, *kept, strict=True):
            if image not in self.rows:
                self.rows[image] = FrozenOutputs(*(value.clone() for value in row))
                self.bytes += sum(value.nbytes for value in row)


class GanTask:
    """One update of the synthesis network, then one of the discriminator, per step."""

    def __init__(self, cfg: StageConfig, runtime: Runtime, crops: Tensor, codec: Codec, labeler: Labeler | None):
        """`codec` and `labeler` are frozen and in eval mode; the codec's synthesis is what is trained."""
        self.cfg, self.runtime, self.crops = cfg, runtime, crops
        self.codec, self.labeler = codec, labeler
        runtime.place(self.codec)
        if labeler is not None:
            runtime.place(labeler)
        self._label = runtime.frozen(labeler.label) if labeler is not None else None
        self.codec.synthesis.requires_grad_(True)
        self.codec.synthesis.recompute = cfg.engine.activation_checkpointing
        self.generator = runtime.trainable("generator", self.codec.synthesis, cfg.generator_optimizer, cfg.fit.steps)
        self.distortion = runtime.place(Distortion(cfg.distortion))
        self.realism, self.examples = Realism(cfg.validation, runtime, crops), Examples(cfg.validation)
        self.cache = FrozenOutputCache(cfg.frozen_cache_mb * 10**6)
        self.adversary = None
        if cfg.adversarial_weight:
            num_labels = self.labeler.cfg.num_codes if self.labeler else 0
            self.adversary = Adversary(cfg, runtime, num_labels, self.codec.cfg.latent_channels)

    def train_step(self, parts: list[Batch], step: int) -> dict[str, Tensor]:
        """One update of each network. Shapes: each part's x (B, 3, H, W), B even.

        Every second crop of the stream is reconstructed for the generator; the others are the discriminator's real ones.
        """
        learns, share = step >= self.cfg.discriminator_warmup_steps, 1 / len(parts)
        seen = [self._encode_and_label(part) for part in parts]
        metrics = mean_over_parts(
            [
                self._reconstruct(*pair, step, learns, share, pair[0] is parts[-1])
                for pair in zip(parts, seen, strict=True)
            ]
        )
        metrics["generator_grad_norm"] = self.generator.update(step) if learns else torch.zeros_like(metrics["loss"])
        if self.adversary is not None:
            real = mean_over_parts(
                [self.adversary.real_step(*pair, share, pair[0] is parts[-1]) for pair in zip(parts, seen, strict=True)]
            )
            metrics["discriminator_accuracy"] = (metrics.pop("fakes_found") + real["reals_found"]) / 2
            metrics["discriminator"] = metrics.pop("discriminator_of_fakes") + real["discriminator_of_reals"]
            metrics["discriminator_grad_norm"] = self.adversary.trainable.update(step)
        return {f"train/{name}": value for name, value in metrics.items()}

    def _encode_and_label(self, part: Batch) -> FrozenOutputs:
        """Outputs of the frozen networks for a part of the batch: of all crops, or of those that are reconstructed.

        The real half needs its latent too, as the discriminator's context, but not its reconstruction.
        """
        stride = 1 if self.adversary else 2
        x, images = part.x[::stride], part.images[::stride]
        seen = self.cache.get(images, self.runtime.device)
        if seen is None:
            y_hat, bits = self.codec.encode(x)
            seen = FrozenOutputs(self.labels(x), y_hat, bits)
            self.cache.put(images, seen)
        return seen

    def _reconstruct(
        self, part: Batch, frozen: FrozenOutputs, step: int, learns: bool, share: float, last: bool
    ) -> dict[str, Tensor]:
        """Reconstructions and both networks' losses on them, over one part of the batch, which counts with its share."""
        stride = 2 if self.adversary else 1
        x, y_hat, bits = part.x[0::2], frozen.y_hat[0::stride], frozen.bits[0::stride]
        with self.generator.accumulate(last), torch.set_grad_enabled(learns):
            x_hat = self.generator.model(y_hat)
            # Every loss enters by its gradient at the reconstructions, so that their strengths can be compared.
            seen = x_hat.detach().requires_grad_(learns)
            loss, metrics = self.distortion(seen, x, step_seed(self.cfg.seed, step))
            (gradient,) = torch.autograd.grad(loss, seen) if learns else (torch.zeros_like(seen),)
            if self.adversary is not None:
                judged, adversarial = self.adversary.fake_step(x_hat, y_hat, frozen.labels[0::2], share)
                adversarial = self.cfg.adversarial_weight * adversarial
                # 0 while only the discriminator learns
                ratio = adversarial.norm() / gradient.norm().clamp_min(1e-12) if learns else torch.zeros_like(loss)
                metrics |= judged | {"adversarial_gradient_ratio": ratio}
                gradient = gradient + adversarial
                loss = loss + self.cfg.adversarial_weight * metrics["generator"]
            if learns:
                self.generator.backward((x_hat * gradient).sum() * share)
        metrics |= {"loss": loss, "bpp": bits.mean() / (x.shape[-2] * x.shape[-1])}
        return {name: value.detach() for name, value in metrics.items()}

    def labels(self, x: Tensor) -> Tensor:
        """Labels of an image's patches, zeros where no loss needs them. Shapes: x (B, 3, H, W); returns (B, H/8, W/8)."""
        if self._label is None:
            return torch.zeros(len(x), x.shape[2] // PATCH, x.shape[3] // PATCH, dtype=torch.int64, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.labeler_precision == "bf16"):
            return self._label(x)

    def validate(self) -> dict[str, float]:
        """As in pretraining, and how often the discriminator takes reconstructions for real."""

        def measure(x: Tensor) -> dict[str, Tensor]:
            y_hat, bits = self.codec.encode(x)
            x_hat = self.codec.synthesis(y_hat)
            self.examples.add(x, x_hat)
            measured = rate_and_quality(bits, x_hat, x) | self.realism.measure(x_hat, x)
            if self.adversary is not None:
                measured["val/fooling_rate"] = self.adversary.fooling_rate(x_hat, y_hat, self.labels(x))
            return measured

        self.examples.start()
        with self.generator.ema_weights():
            return validation_means(self.runtime, self.crops, measure) | self.realism.distance()

    def export(self, folder: Path) -> None:
        with self.generator.ema_weights():
            serialization.save_codec(folder, self.codec, self.codec.cfg)


class Adversary:
    """The discriminator, its optimizer and its losses."""

    def __init__(self, cfg: StageConfig, runtime: Runtime, num_labels: int, latent_channels: int):
        optimizer = cfg.discriminator_optimizer or PUBLISHED_OPTIMIZERS[cfg.discriminator.kind]
        self.network: Discriminator = discriminators.build(cfg.discriminator, num_labels, latent_channels)
        if cfg.discriminator.kind == "label" and cfg.discriminator.init == "he":
            assert isinstance(self.network, LabelDiscriminator)
            he_label_discriminator(self.network)
        self.trainable = runtime.trainable("discriminator", self.network, optimizer, cfg.fit.steps, published=False)

    def fake_step(self, x_hat: Tensor, y_hat: Tensor, labels: Tensor, share: float) -> tuple[dict[str, Tensor], Tensor]:
        """The generator's loss on these reconstructions, and its gradient at the reconstructions.

        One forward pass serves both sides. The generator takes the gradient at its reconstructions, which touches no
        weight; the discriminator takes that of its own loss at its weights. Nothing can leak from one to the other.
        """
        fake = x_hat.detach().requires_grad_()
        with torch.enable_grad(), self.trainable.accumulate(last=False):
            logits = self.trainable.model(fake, y_hat)
            generator = self.network.generator_loss(logits, labels)
            (seen_through,) = torch.autograd.grad(generator, fake, retain_graph=True)
            mistaken = self.network.fake_loss(logits)
            self.trainable.backward(mistaken * share)
        metrics = {
            "generator": generator,
            "discriminator_of_fakes": mistaken,
            "fakes_found": self.network.fake_rate(logits),
        }
        return {name: value.detach() for name, value in metrics.items()}, seen_through

    def real_step(self, part: Batch, seen: FrozenOutputs, share: float, last: bool) -> dict[str, Tensor]:
        """The discriminator's other half: original crops."""
        with self.trainable.accumulate(last):
            logits = self.trainable.model(part.x[1::2], seen.y_hat[1::2])
            mistaken = self.network.real_loss(logits, seen.labels[1::2])
            self.trainable.backward(mistaken * share)
        metrics = {"discriminator_of_reals": mistaken, "reals_found": 1 - self.network.fake_rate(logits)}
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def fooling_rate(self, x_hat: Tensor, y_hat: Tensor, labels: Tensor) -> Tensor:
        """Share of each reconstruction's patches that pass. Returns (B,)."""
        # Spectral norm's estimates stay fixed while it is measured
        self.network.eval()
        fooling_rate = self.network.fooling_rate(self.network(x_hat, y_hat), labels)
        self.network.train()
        return fooling_rate
