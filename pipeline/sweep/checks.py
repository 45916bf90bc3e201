"""Finds the mistakes of a sweep before any of its trials."""

from collections.abc import Iterator

from pipeline import config, stages
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metric_table import METRICS
from pipeline.models import pretrained
from pipeline.sweep.space import Choice, Grid, Space, Values, enumerate_trials, overrides


def check(space: Space) -> None:
    """Loads the base configurations with the searched values, so that a mistake is found before any trial.

    Raises: UserError naming the first.
    """
    problems = [
        f"search.{key}: begins with no stage of a trial ({', '.join(space.stages)})"
        for key in space.search
        if key.split(".")[0] not in space.stages
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    for key, name in _metrics(space).items():
        metric = METRICS.get(name.removeprefix("val/"))
        if metric is not None and metric.weights and pretrained.find(metric.weights) is None:  # type: ignore[arg-type]
            raise ConfigError(f"{key}: {pretrained.how_to_get(metric.weights)}")  # type: ignore[arg-type]
    if space.images is not None:
        HeldOut(space.images, limit=1)
    for values in _extremes(space):
        for stage in space.stages:
            cfg = config.load(stages.get(stage).StageConfig, getattr(space, stage), overrides(stage, values))
            if stage == "evaluate":
                _check_measured(space, cfg)


def _check_measured(space: Space, cfg: Config) -> None:
    """Raises: ConfigError if the evaluation leaves out what the sweep looks at."""
    measured = getattr(cfg, "metrics", None)
    for key in ("realism", "algorithm.metric"):
        name = _metrics(space).get(key)
        if name is not None and measured is not None and name not in (*measured, "bpp", "psnr_db"):
            raise ConfigError(f"{key}: {name} is not among the metrics of {space.evaluate}; add it there")


def _metrics(space: Space) -> dict[str, str]:
    """Key -> the metric that it names."""
    named = {"algorithm.metric": getattr(space.algorithm, "metric", None)}
    named |= {"scheduler.metric": getattr(space.scheduler, "metric", None), "realism": space.realism}
    return {key: name for key, name in named.items() if name is not None}


def _extremes(space: Space) -> Iterator[Values]:
    """Every value and every bound once; of grids every combination."""
    if space.algorithm.kind == "grid_and_random":
        yield from enumerate_trials(space)
    ends = {key: list(d.values) if isinstance(d, Grid | Choice) else [d.low, d.high] for key, d in space.search.items()}
    for number in range(max(map(len, ends.values()))):
        yield {key: values[number % len(values)] for key, values in ends.items()}
