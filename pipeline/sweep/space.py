"""The search space of a sweep, how it is searched, and which trials are stopped early."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from pipeline.config import Changeable, Config, Input
from pipeline.errors import ConfigError
from pipeline.evaluation.metric_table import REALISM

# Of one trial: "stage.key" -> value
Values = dict[str, Any]
Mode = Literal["max", "min"]
TRIAL_STAGES = ("pretrain", "gan", "evaluate")


class Grid(Config):
    """Every value is tried with every value of the other grids."""

    kind: Literal["grid"]
    values: Annotated[tuple[Any, ...], Field(min_length=1)]


class Choice(Config):
    """One of some values, at random."""

    kind: Literal["choice"]
    values: Annotated[tuple[Any, ...], Field(min_length=1)]


class Uniform(Config):
    """Random values between two bounds; log_uniform: as many between 1 and 10 as between 10 and 100."""

    kind: Literal["uniform", "log_uniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def in_order(self) -> "Uniform":
        if not self.low < self.high or (self.kind == "log_uniform" and self.low <= 0):
            least = "0 < " if self.kind == "log_uniform" else ""
            raise ValueError(f"expected {least}low < high, found low {self.low:g} and high {self.high:g}")
        return self


class Integer(Config):
    """Random whole numbers from low to high, both included."""

    kind: Literal["int"]
    low: int
    high: int


Dimension = Annotated[Grid | Choice | Uniform | Integer, Field(discriminator="kind")]


class GridAndRandom(Config):
    """All combinations of the grids, `num_samples` times, each time with new random values for the rest."""

    kind: Literal["grid_and_random"] = "grid_and_random"


class Bayesian(Config):
    """Optuna's tree-structured Parzen estimator proposes `num_samples` trials, each from the outcomes of those before."""

    kind: Literal["optuna"]
    metric: str = "psnr_db"
    """Metric of the fine-tuned codec's evaluation, for instance vgg_fd_64 with mode min."""
    mode: Mode = "max"
    num_startup_trials: PositiveInt = 8
    """Number of random trials before the search begins to learn."""


class NoScheduler(Config):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class Asha(Config):
    """Asynchronous successive halving: at steps grace_period, grace_period * reduction_factor and so on, only the best
    1 / reduction_factor of the trials continue.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """

    kind: Literal["asha"]
    metric: str
    """Validation metric of the gan stage: val/psnr_db for distortion, val/vgg_fd_64 or val/lpips for realism, with mode min."""
    mode: Mode = "max"
    grace_period: PositiveInt
    """Steps of the gan stage."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3


class Pbt(Config):
    """Population based training: every so many steps, the worst trials continue from the best ones' checkpoints, with their
    values changed a little. `num_samples` is the size of the population; only the gan stage's values can be searched.

    Source: Jaderberg et al., Population Based Training of Neural Networks, 2017.
    """

    kind: Literal["pbt"]
    metric: str
    """Validation metric of the gan stage."""
    mode: Mode = "max"
    perturbation_interval: PositiveInt
    """Steps of the gan stage."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Fraction of the population that is replaced."""


class Space(Config):
    """What is searched over which configurations, and how."""

    shards: Annotated[str, Input("shards")]
    """Artifact of kind "shards"."""
    labeler: Annotated[str, Input("labeler")]
    """Artifact of kind "labeler"."""
    pretrain: Path | None = None
    """Base configuration of a trial's pretrain stage; or leave it out and name a `codec`."""
    codec: Annotated[str | None, Input("codec")] = None
    """Artifact of kind "codec" that every trial fine-tunes; then no trial pretrains."""
    gan: Path
    evaluate: Path
    images: str | None = None
    """Images that trials are measured on: a folder, or an artifact of kind "shards"; null: the validation images of `shards`."""
    promote: Path | None = None
    """Base configuration for promoting the best trials."""
    realism: Annotated[str | None, Changeable()] = None
    """Metric of the evaluation that stands for realism in fronts and figures; null: the first measured of FID/256, FID/64,
    VGG-FD/64, KID, DISTS, LPIPS, MS-SSIM."""
    search: Annotated[dict[str, Dimension], Field(min_length=1)]
    """What is searched: "stage.key", for instance gan.gan_weight -> its values."""
    num_samples: PositiveInt = 1
    """Repetitions of the grid; with optuna: number of trials; with pbt: size of the population."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 0
    algorithm: Annotated[GridAndRandom | Bayesian, Field(discriminator="kind")] = GridAndRandom()
    scheduler: Annotated[NoScheduler | Asha | Pbt, Field(discriminator="kind")] = NoScheduler()
    processes: PositiveInt = 1
    """Number of processes that train one trial, on one node."""
    cpus_per_trial: PositiveFloat = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0
    """GPUs per trial; 0.5: two trials share one."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a trial, each with its base configuration in the attribute of that name."""
        return TRIAL_STAGES if self.pretrain else TRIAL_STAGES[1:]

    @field_validator("realism")
    @classmethod
    def is_measured(cls, value: str | None) -> str | None:
        if value is not None and value not in REALISM:
            raise ValueError(f"expected one of {', '.join(REALISM)}, found {value!r}")
        return value

    @model_validator(mode="after")
    def fits(self) -> "Space":
        if bool(self.pretrain) == bool(self.codec):
            raise ValueError("give either pretrain, a configuration, or codec, an artifact that every trial fine-tunes")
        grids = [key for key, dimension in self.search.items() if isinstance(dimension, Grid)]
        learned = self.algorithm.kind == "optuna" or self.scheduler.kind == "pbt"
        if learned and grids:
            raise ValueError(f"{grids[0]}: a grid is tried as a whole; give `choice` or bounds to search it otherwise")
        if self.scheduler.kind == "pbt":
            if self.algorithm.kind == "optuna":
                raise ValueError("population based training changes values itself; leave `algorithm` out")
            others = [key for key in self.search if not key.startswith("gan.")]
            if others:
                raise ValueError(
                    f"{others[0]}: population based training changes values while the gan stage runs, so only gan.*"
                )
        if 0 < self.gpus_per_trial < 1 and self.processes > 1:
            raise ValueError("several processes need a GPU each; gpus_per_trial below 1 is for one process")
        return self


def enumerate_trials(space: Space) -> list[Values]:
    """The trials of a search that does not learn, the same at every call: grids' combinations, then random values.

    Ordered so that trials of different pretrained codecs come first: they can be trained at the same time.
    """
    rng = np.random.default_rng(space.seed)
    grids = {key: d.values for key, d in space.search.items() if isinstance(d, Grid)}
    drawn: list[Values] = []
    for _ in range(space.num_samples):
        for combination in itertools.product(*grids.values()):
            values = dict(zip(grids, combination, strict=True))
            drawn.append({key: values[key] if key in values else _draw(d, rng) for key, d in space.search.items()})
    drawn = [_without_unused(space, values) for values in drawn]
    unique = {name_of(values): values for values in drawn}
    turns: dict[str, int] = {}
    order = []
    for values in unique.values():
        key = name_of(of_stage("pretrain", values))
        turns[key] = turns.get(key, 0) + 1
        order.append((turns[key], values))
    return [values for _, values in sorted(order, key=lambda pair: pair[0])]


def _without_unused(space: Space, values: Values) -> Values:
    """Without an adversarial loss there is no discriminator: one trial stands for all that a grid would try."""
    searched = space.search.get("gan.discriminator")
    if values.get("gan.gan_weight") == 0 and isinstance(searched, Grid):
        return values | {"gan.discriminator": searched.values[0]}
    return values


def evaluation_inputs(space: Space, codec: str | Path, tuned: str | Path) -> list[str]:
    """Words for a trial's evaluation. A codec that all trials share is not measured again in each."""
    codecs = f"fine-tuned: {tuned}" if space.codec else f"pretrained: {codec}, fine-tuned: {tuned}"
    # an empty section empties that of the base configuration, with which another one would be merged
    return [f"images={space.images or space.shards}", "codecs={}", f"codecs={{{codecs}}}"]


def require_static_trials(space: Space) -> None:
    """Raises: ConfigError if trials depend on each other's outcomes, so that they cannot be listed beforehand."""
    if space.algorithm.kind != "grid_and_random" or space.scheduler.kind != "none":
        kinds = f"algorithm {space.algorithm.kind}, scheduler {space.scheduler.kind}"
        raise ConfigError(
            f"{kinds}: these trials depend on each other; run `illm sweep` on Ray, or search grids and random values"
        )


def _draw(dimension: Dimension, rng: np.random.Generator) -> Any:
    match dimension:
        case Uniform(kind="log_uniform"):
            return float(math.exp(rng.uniform(math.log(dimension.low), math.log(dimension.high))))
        case Uniform():
            return float(rng.uniform(dimension.low, dimension.high))
        case Integer():
            return int(rng.integers(dimension.low, dimension.high, endpoint=True))
        case _:
            return dimension.values[int(rng.integers(len(dimension.values)))]


def name_of(values: Values) -> str:
    """A trial's name: the same for the same values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:12]


def of_stage(stage: str, values: Values) -> Values:
    """The values that concern one stage, without its name."""
    return {key.removeprefix(f"{stage}."): value for key, value in values.items() if key.startswith(f"{stage}.")}


def overrides(stage: str, values: Values) -> list[str]:
    """Words for a stage's command line."""
    return [f"{key}={json.dumps(value, default=list)}" for key, value in of_stage(stage, values).items()]
