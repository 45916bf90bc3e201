"""The stages: each module has a `StageConfig` and `run(cfg, folder) -> artifact folder`."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline.artifacts.manifest import Kind
from pipeline.config import Config
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class About:
    """A stage's module, the kind of artifact that it publishes, and a description of that."""

    module: str
    makes: Kind
    output: str


# In the order of the pipeline. Modules are imported on demand: they pull in torch.
TABLE = {
    "shard": About("pipeline.stages.shard", "shards", "a 'shards' artifact: WebDataset tars, tables, index"),
    "vqvae": About("pipeline.stages.vqvae", "labeler", "a 'labeler' artifact"),
    "pretrain": About("pipeline.stages.pretrain", "codec", "a 'codec' artifact"),
    "gan": About("pipeline.stages.gan", "codec", "a 'codec' artifact with the same bitstream id as its input"),
    "evaluate": About(
        "pipeline.stages.evaluate",
        "evaluation",
        "an 'evaluation' artifact: measurements, files, report.html",
    ),
    "promote": About(
        "pipeline.stages.promote", "promotion", "a registered model version, an alias, and a 'promotion' artifact"
    ),
    "sweep": About("pipeline.sweep.stage", "sweep", "a 'sweep' artifact: table of trials, Pareto figure"),
}
STAGES = tuple(TABLE)
# These run as several processes
TRAINING = ("vqvae", "pretrain", "gan")


class Stage(Protocol):
    """What a stage module offers."""

    StageConfig: type[Config]

    def run(self, cfg: Any, folder: Path) -> Path: ...


def get(name: str) -> Stage:
    """The stage of that name. Raises: ConfigError if there is none."""
    if name not in STAGES:
        raise ConfigError(f"stage {name!r}: expected one of {', '.join(STAGES)}")
    return cast(Stage, importlib.import_module(TABLE[name].module))


def makers_of(kind: str) -> tuple[str, ...]:
    """The stages whose artifacts are of that kind."""
    return tuple(name for name, about in TABLE.items() if about.makes == kind)
