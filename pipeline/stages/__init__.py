"""The stages: each module has a `StageConfig` and `run(cfg, folder) -> artifact folder`."""

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline.config import Config
from pipeline.errors import ConfigError

# In the order of the pipeline. Modules are imported when asked for: they pull in torch.
MODULES = {
    "shard": "pipeline.stages.shard",
    "vqvae": "pipeline.stages.vqvae",
    "pretrain": "pipeline.stages.pretrain",
    "gan": "pipeline.stages.gan",
    "evaluate": "pipeline.stages.evaluate",
    "promote": "pipeline.stages.promote",
    "sweep": "pipeline.sweep.stage",
}
STAGES = tuple(MODULES)
TRAINING = ("vqvae", "pretrain", "gan")  # these run as several processes


class Stage(Protocol):
    """What a stage module offers."""

    StageConfig: type[Config]

    def run(self, cfg: Any, folder: Path) -> Path: ...


def get(name: str) -> Stage:
    """The stage of that name. Raises: ConfigError if there is none."""
    if name not in STAGES:
        raise ConfigError(f"stage {name!r}: expected one of {', '.join(STAGES)}")
    return cast(Stage, importlib.import_module(MODULES[name]))
