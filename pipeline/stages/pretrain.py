"""Trains a codec for rate and distortion, at a target rate."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from pipeline import losses
from pipeline.artifacts import run_folder
from pipeline.artifacts.artifact import Artifact
from pipeline.config import Config, Input, differences, flatten
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError, TrainingError
from pipeline.losses import RateTerm
from pipeline.models import initial, serialization
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.distortion import Distortion, DistortionConfig
from pipeline.models.initial import Init
from pipeline.registry import resolve
from pipeline.stages.train import TrainingConfig, mean_over_parts, train
from pipeline.stages.validation import Examples, Realism, rate_and_quality, validation_means
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import REMEDY, Runtime, step_seed


class FixedRate(Config):
    """A constant price of a bit."""

    kind: Literal["fixed"]
    weight: PositiveFloat
    """Weight of bits per pixel in the loss."""

    def term(self, step: int) -> RateTerm:  # noqa: ARG002
        # Every image is above a target of zero
        return RateTerm(target_bpp=0.0, weight=self.weight)


class TargetRate(Config):
    """A price of a bit that depends on whether the image is above the target, as published.

    Where most images are easy, the realized mean stays below the target; "calibrated" corrects that.
    """

    kind: Literal["target"]
    bpp: PositiveFloat
    """Target rate of training crops in bits per pixel."""
    weight: PositiveFloat | None = None
    """Weight of bits per pixel above the target; null: the published one for this target."""
    warmup_steps: NonNegativeInt = 25_000
    """Number of steps with a 1.429 times higher target at half the weight."""

    def term(self, step: int) -> RateTerm:
        weight = self.weight or losses.published_rate_weight(self.bpp)
        return losses.rate_schedule(self.bpp, weight, step, self.warmup_steps)


class CalibratedRate(Config):
    """A price of a bit that every validation changes, so that the mean rate of validation crops becomes `bpp`."""

    kind: Literal["calibrated"]
    bpp: PositiveFloat
    """Target rate of validation crops in bits per pixel."""
    weight: PositiveFloat | None = None
    """Initial weight of bits per pixel; null: interpolated between published ones."""


class Calibration:
    """The current price of a bit: part of every checkpoint.

    It stays within a factor of RANGE of the first one: a price that followed a rate below its target for long could
    reach zero, from which no factor leads back.
    """

    RANGE = 1000.0

    def __init__(self, cfg: CalibratedRate):
        self.bpp = cfg.bpp
        self.first = cfg.weight or math.sqrt(losses.published_rate_weight(cfg.bpp) * losses.LOW_RATE_WEIGHT)
        self.weight = self.first

    def term(self, step: int) -> RateTerm:  # noqa: ARG002
        # Every image is above a target of zero
        return RateTerm(target_bpp=0.0, weight=self.weight)

    def measured(self, bpp: float) -> None:
        """Changes the price by the square of the ratio of the measured and the wanted rate, at most fourfold.

        bpp: of validation crops, finite. The square, because a rate falls with about the root of its price.
        """
        wanted = self.weight * min(max((bpp / self.bpp) ** 2, 1 / 4), 4.0)
        self.weight = min(max(wanted, self.first / self.RANGE), self.first * self.RANGE)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]


class StageConfig(TrainingConfig):
    """The codec's training for rate and distortion."""

    stage: Literal["pretrain"] = "pretrain"
    codec: CodecConfig = CodecConfig()
    init: Init = "he"
    """Initial weights of analysis and synthesis; "pytorch" as in the published code learns little in the first
    hundreds of steps."""
    init_from: Annotated[str | None, Input("codec")] = None
    """Artifact of kind "codec", of the same widths, whose weights training starts from, for another rate or for more steps;
    null: the weights of `init`."""
    rate: Annotated[FixedRate | TargetRate | CalibratedRate, Field(discriminator="kind")]
    distortion: DistortionConfig = DistortionConfig()
    optimizer: AdamConfig = AdamConfig(lr=3e-4, weight_decay=5e-5, warmup_steps=10_000, schedule="cosine")
    quantile_lr: PositiveFloat = 1e-3
    """Learning rate of the quantiles that bound the hyper-latent's tables."""


def run(cfg: StageConfig, folder: Path) -> Path:
    """Trains a codec for rate and distortion, and publishes it with its entropy tables."""
    if done := run_folder.finished(folder, cfg):
        return done
    facts = {"lpips": cfg.distortion.lpips_state(), **cfg.engine.facts()}
    given = resolve.read_inputs(cfg, facts)
    start = _start(cfg, given.artifacts["init_from"][1]) if cfg.init_from else None
    return train(cfg, folder, "codec", given, lambda runtime, crops: PretrainTask(cfg, runtime, crops, start))


def _start(cfg: StageConfig, artifact: Artifact) -> Codec:
    """The codec that training starts from. Raises: ConfigError if it has other widths than the config."""
    if unlike := differences(flatten(cfg.codec), flatten(serialization.model_config(artifact, CodecConfig))):
        raise ConfigError(f"codec: not as in init_from={cfg.init_from} ({'; '.join(unlike)}); write the same widths")
    return serialization.load_codec(artifact)


class QuantileStep:
    """Fits the quantiles of the hyper-latent's distribution. Reads no data, so it is the same on every process.

    The quantiles must not require gradients while DDP wraps the codec: it would wait for them and not reduce in time.
    """

    def __init__(self, codec: Codec, lr: float):
        self.entropy = codec.hyper_entropy
        self.quantiles = codec.hyper_entropy.quantiles.requires_grad_(False)
        # Weight decay 0.01, AdamW's default, as published
        self.optimizer = torch.optim.AdamW([self.quantiles], lr=lr)

    def step(self) -> Tensor:
        self.quantiles.requires_grad_(True)
        loss = self.entropy.loss()
        (gradient,) = torch.autograd.grad(loss, [self.quantiles])
        # the weights are not finite: the step is reported as skipped, and the quantiles stay finite
        self.quantiles.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        self.quantiles.requires_grad_(False)
        self.optimizer.step()
        self.quantiles.grad = None
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class PretrainTask:
    """Distortion plus the rate term of the schedule, and the quantiles' own step."""

    def __init__(self, cfg: StageConfig, runtime: Runtime, crops: Tensor, start: Codec | None = None):
        """start: a trained codec of the same widths, whose weights become the first ones."""
        self.cfg, self.runtime, self.crops = cfg, runtime, crops
        self.codec = Codec(cfg.codec)
        if start is not None:
            # the tables are built at the end
            for name, parameter in self.codec.named_parameters():
                parameter.data.copy_(start.get_parameter(name))
        elif cfg.init == "he":
            initial.he_codec(self.codec)
        self.codec.synthesis.recompute = cfg.engine.activation_checkpointing
        self.codec.hyper_entropy.quantiles.requires_grad_(False)
        self.trainable = runtime.trainable("codec", self.codec, cfg.optimizer, cfg.fit.steps)
        self.quantiles = QuantileStep(self.codec, cfg.quantile_lr)
        runtime.register("quantiles", self.quantiles)
        self.distortion = runtime.place(Distortion(cfg.distortion))
        self.realism, self.examples = Realism(cfg.validation, runtime, crops), Examples(cfg.validation)
        self.rate: FixedRate | TargetRate | Calibration
        if isinstance(cfg.rate, CalibratedRate):
            self.rate = Calibration(cfg.rate)
            runtime.register("rate", self.rate)
        else:
            self.rate = cfg.rate

    def train_step(self, parts: list[Batch], step: int) -> dict[str, Tensor]:
        """One update. Shapes: each part's x (B, 3, H, W)."""
        metrics = mean_over_parts([self._pass(part, step, 1 / len(parts), part is parts[-1]) for part in parts])
        metrics["train/codec_grad_norm"] = self.trainable.update(step)
        return metrics | {"train/quantile_loss": self.quantiles.step()}

    def _pass(self, part: Batch, step: int, share: float, last: bool) -> dict[str, Tensor]:
        """Forward and backward over one part of the batch, which counts with its share."""
        x, num_pixels = part.x, part.x.shape[-2] * part.x.shape[-1]
        noise = self.codec.noise_like(x, self.runtime.generators(self.cfg.seed, part.positions))
        with self.trainable.accumulate(last):
            out = self.trainable.model(x, noise)
            distortion, metrics = self.distortion(out.x_hat, x, step_seed(self.cfg.seed, step))
            bpp, rounded_bpp = out.bits / num_pixels, out.rounded_bits / num_pixels
            rate = losses.target_rate_loss(bpp, rounded_bpp, self.rate.term(step))
            loss = distortion + rate
            self.trainable.backward(loss * share)
        metrics |= {"loss": loss.detach(), "bpp": rounded_bpp.mean()}
        return {f"train/{name}": value for name, value in metrics.items()}

    def validate(self) -> dict[str, float]:
        """Rate from ideal code lengths, quality and realism of the clamped reconstruction, over validation crops."""

        def measure(x: Tensor) -> dict[str, Tensor]:
            y_hat, bits = self.codec.encode(x)
            x_hat = self.codec.synthesis(y_hat)
            self.examples.add(x, x_hat)
            return rate_and_quality(bits, x_hat, x) | self.realism.measure(x_hat, x)

        self.examples.start()
        with self.trainable.ema_weights():
            means = validation_means(self.runtime, self.crops, measure) | self.realism.distance()
        if isinstance(self.rate, Calibration):
            means["val/rate_weight"] = self.rate.weight
            self.rate.measured(self._rate_of_current_weights() if self.cfg.engine.ema_decay else means["val/bpp"])
        return means

    def _rate_of_current_weights(self) -> float:
        """Bits per pixel of validation crops, of the weights that are trained.

        A price that followed their average would overshoot: that lags by as many steps as it averages over.
        """

        def measure(x: Tensor) -> dict[str, Tensor]:
            return {"bpp": self.codec.encode(x)[1] / (x.shape[-2] * x.shape[-1])}

        return validation_means(self.runtime, self.crops, measure)["bpp"]

    def export(self, folder: Path) -> None:
        # On a copy: the tables are not part of this run's checkpoints.
        codec = Codec(self.cfg.codec)
        with self.trainable.ema_weights():
            codec.load_state_dict(self.codec.state_dict())
        try:
            codec.update_tables()
        except ValueError as error:
            raise TrainingError(f"the trained codec cannot code files: {error}; {REMEDY}") from None
        serialization.save_codec(folder, codec, self.cfg.codec)
