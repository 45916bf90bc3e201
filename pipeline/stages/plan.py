"""Several stages in a row: how they are connected, and everything that can be checked before any of them waits in a queue."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config, stages
from pipeline.artifacts import run_folder
from pipeline.artifacts.manifest import Kind, a_kind
from pipeline.data.loader import Share
from pipeline.errors import ConfigError, UserError
from pipeline.registry import resolve
from pipeline.stages import TRAINING
from pipeline.storage import fetch

KINDS: dict[str, Kind] = {
    "shards": "shards",
    "images": "shards",
    "codec": "codec",
    "codecs": "codec",
    "labeler": "labeler",
    "evaluation": "evaluation",
}
MADE_BY: dict[Kind, tuple[str, ...]] = {
    "shards": ("shard",),
    "labeler": ("vqvae",),
    "codec": ("pretrain", "gan"),
    "evaluation": ("evaluate",),
}


@dataclass(frozen=True)
class Step:
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
) -> list[Step]:
    """The stages `names`, configured by CONFIGS/STAGE.yaml, each in FOLDER/STAGE. overrides: `stage.key=value`.

    An input that a config takes from a folder named like an earlier stage of the chain (runs/pretrain) is taken from that
    stage of this chain. processes: how many will train one stage.
    Raises: ConfigError that names every mistake and every input that is not there and that no earlier stage makes.
    """
    problems = [f"stage {name!r} stands twice" for name in set(names) if list(names).count(name) > 1]
    known = stages.STAGES[:-1]
    problems += [f"stage {name!r}: expected one of {', '.join(known)}" for name in names if name not in known]
    problems += [
        f"{word!r}: expected STAGE.key=value with one of the stages {' '.join(names)}"
        for word in overrides
        if word.split(".")[0] not in names
    ]
    if problems or not names:
        raise ConfigError("\n".join(problems) or "no stages were named")
    steps: list[Step] = []
    for number, name in enumerate(names):
        own = [word.removeprefix(f"{name}.") for word in overrides if word.startswith(f"{name}.")]
        path = configs / f"{name}.yaml"
        try:
            cfg = config.load(stages.get(name).StageConfig, path, own)
            own += _connections(cfg, names[:number], folder)
            cfg = config.load(stages.get(name).StageConfig, path, own)
            done = run_folder.finished(folder / name, cfg) is not None
            if not done:
                problems += [f"{name}: {problem}" for problem in _unmet(cfg, names[:number], folder, processes)]
            steps.append(Step(name, path, folder / name, tuple(own), done))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("nothing was submitted:\n" + "\n".join(f"  {problem}" for problem in problems))
    return steps


def _inputs(cfg: Any) -> Iterator[tuple[str, str, Kind]]:
    """Key, value and kind of every artifact that a config names."""
    stage = run_folder.stage_of(cfg)
    for key, value in config.flatten(cfg).items():
        kind = KINDS.get(key.split(".")[0] if key.startswith("codecs.") else key.split(".")[-1])
        names_a_codec_of_an_evaluation = stage == "promote" and key == "codec"
        unneeded = key == "labeler" and not getattr(cfg, "needs_labels", True)
        if kind and isinstance(value, str) and not names_a_codec_of_an_evaluation and not unneeded:
            yield key, value, kind


def _connections(cfg: Any, before: Sequence[str], folder: Path) -> list[str]:
    """Overrides that make a stage read what earlier stages of the chain write."""
    words = []
    for key, value, kind in _inputs(cfg):
        if (maker := Path(value).name) in before and maker in MADE_BY[kind]:
            name = key.removeprefix("codecs.")
            words.append(f"{key}={folder / maker}" if name == key else f"codecs={{{name}: {folder / maker}}}")
    return words


def _unmet(cfg: Any, before: Sequence[str], folder: Path, processes: int) -> Iterator[str]:
    """What would stop the stage hours later."""
    coming = {str(folder / name) for name in before}
    for key, value, kind in _inputs(cfg):
        if value in coming or (
            key == "images" and Path(value).is_dir() and not (Path(value) / run_folder.RUN_FILE).exists()
        ):
            continue  # an earlier stage makes it; or it is a plain folder of images
        try:
            found = resolve.kind_of(value)
            if found != kind:
                yield f"{key}: {value} is {a_kind(found)} artifact, expected {kind!r}"
        except UserError as error:
            yield f"{key}: {error}, or name {' or '.join(MADE_BY[kind])} among the stages before"
    stage = run_folder.stage_of(cfg)
    if stage == "shard":
        yield from _missing_sources(cfg)
    if stage in TRAINING:
        try:
            Share.of(cfg.data.batch_size, 0, processes, (2 if stage == "gan" else 1) * cfg.engine.passes)
        except UserError as error:
            yield str(error)


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
