"""Several stages in a row: how they are connected, and everything that can be checked before any of them waits in a queue."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config, stages
from pipeline.artifacts import run_folder
from pipeline.artifacts.manifest import a_kind
from pipeline.data.batch import BatchShard
from pipeline.errors import ConfigError, UserError
from pipeline.log import logger
from pipeline.registry import resolve
from pipeline.stages import TRAINING, makers_of
from pipeline.storage import fetch


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a chain, ready to be run as `illm STAGE CONFIG run=FOLDER key=value ...`."""

    stage: str
    config: Path
    folder: Path
    overrides: tuple[str, ...]
    done: bool

    @property
    def words(self) -> list[str]:
        return [self.stage, str(self.config), f"run={self.folder}", *self.overrides]


def plan(
    names: Sequence[str], configs: Path, folder: Path, overrides: Sequence[str] = (), processes: int = 1
) -> list[PlannedStage]:
    """The stages `names`, configured by CONFIGS/STAGE.yaml, each in FOLDER/STAGE. overrides: `stage.key=value`.

    An input that a config takes from a folder named like an earlier stage of the chain (runs/pretrain) is taken from that
    stage of this chain. processes: how many will train one stage.
    Raises: ConfigError that names every mistake and every input that is not there and that no earlier stage makes.
    """
    problems = [f"stage {name!r} appears twice" for name in set(names) if list(names).count(name) > 1]
    known = stages.STAGES[:-1]
    problems += [f"stage {name!r}: expected one of {', '.join(known)}" for name in names if name not in known]
    problems += [
        f"{word!r}: expected STAGE.key=value with one of the stages {' '.join(names)}"
        for word in overrides
        if word.split(".")[0] not in names
    ]
    if problems or not names:
        raise ConfigError("\n".join(problems) or "no stages were named")
    steps: list[PlannedStage] = []
    for number, name in enumerate(names):
        own = [word.removeprefix(f"{name}.") for word in overrides if word.startswith(f"{name}.")]
        path = configs / f"{name}.yaml"
        try:
            cfg = config.load(stages.get(name).StageConfig, path, own)
            own += _connections(cfg, names[:number], folder)
            cfg = config.load(stages.get(name).StageConfig, path, own)
            done = run_folder.finished(folder / name, cfg) is not None
            if not done:
                problems += [f"{name}: {problem}" for problem in _preflight(cfg, names[:number], folder, processes)]
            steps.append(PlannedStage(name, path, folder / name, tuple(own), done))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("nothing was started:\n" + "\n".join(f"  {problem}" for problem in problems))
    return steps


def _connections(cfg: Any, before: Sequence[str], folder: Path) -> list[str]:
    """Overrides that make a stage read what earlier stages of the chain write."""
    words = []
    for key, value, marker in config.inputs(cfg):
        if marker.kind and (maker := Path(value).name) in before and maker in makers_of(marker.kind):
            name = key.removeprefix("codecs.")
            words.append(f"{key}={folder / maker}" if name == key else f"codecs={{{name}: {folder / maker}}}")
    return words


def _preflight(cfg: Any, before: Sequence[str], folder: Path, processes: int) -> Iterator[str]:
    """What would stop the stage hours later."""
    coming = {str(folder / name) for name in before}
    for key, value, marker in config.inputs(cfg):
        if not marker.kind:
            continue
        is_made_before = value in coming
        if is_made_before or (marker.or_folder and _is_plain_folder(Path(value))):
            continue
        try:
            found = resolve.kind_of(value)
            if found != marker.kind:
                yield f"{key}: {value} is {a_kind(found)} artifact, expected {marker.kind!r}"
        except UserError as error:
            yield f"{key}: {error}, or name {' or '.join(makers_of(marker.kind))} among the earlier stages"
    stage = run_folder.stage_of(cfg)
    if stage == "shard":
        yield from _missing_sources(cfg)
    if distortion := getattr(cfg, "distortion", None):
        try:
            distortion.lpips_state()
        except UserError as error:
            # Nodes may have another TORCH_HOME
            logger.warning(f"{stage}: on this machine {error}")
    if stage in TRAINING:
        try:
            BatchShard.of(
                cfg.data.batch_size, 0, processes, (2 if stage == "gan" else 1) * cfg.engine.gradient_accumulation_steps
            )
        except UserError as error:
            yield str(error)


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not (path / run_folder.RUN_FILE).exists()


def check_sources(path: Path, overrides: Sequence[str]) -> None:
    """Raises: ConfigError if a shard stage's config is wrong, or a local source is not there."""
    cfg = config.load(stages.get("shard").StageConfig, path, overrides)
    if problems := list(_missing_sources(cfg)):
        raise ConfigError("\n".join(problems))


def _missing_sources(cfg: Any) -> Iterator[str]:
    for source in cfg.sources():
        place = source.path
        if not fetch.is_url(place) and not any(c in place for c in "*?[") and not Path(place).exists():
            yield f"source: {place} is not there"
