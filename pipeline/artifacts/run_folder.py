"""The run folder: one stage, one config. Decides whether to start, to continue, to stop or to refuse."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import config
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.manifest import MANIFEST, Kind, Manifest, Parent
from pipeline.errors import ArtifactError
from pipeline.log import logger
from pipeline.storage import disk

RUN_FILE = "run.yaml"
# Files of tracking: the id of the folder's MLflow run, its records, and how many of them were delivered
RUN_ID_FILE, RECORDS, DELIVERED = "mlflow-run-id", "tracking.jsonl", "tracking.delivered"
# Of an evaluation: where results of single images wait for the others
MEASURED = "measured"
BATCH_SIZE = "data.batch_size"


@dataclass(frozen=True)
class Inputs:
    """The artifacts a stage reads, by role, and facts about the machine that change its results."""

    # Role -> (the name in the config, the artifact)
    artifacts: dict[str, tuple[str, Artifact]]
    # For instance {"lpips": "absent"}
    facts: dict[str, str]

    def parents(self) -> dict[str, Parent]:
        return {role: artifact.as_parent(name) for role, (name, artifact) in self.artifacts.items()}

    def flat(self) -> dict[str, str]:
        digests = {f"(input {role})": artifact.digest for role, (_, artifact) in self.artifacts.items()}
        return digests | {f"({name})": value for name, value in self.facts.items()}


NO_INPUTS = Inputs({}, {})


def finished(folder: Path, cfg: config.Config) -> Path | None:
    """The artifact in `folder`, if the same config made it.

    Raises: ArtifactError naming the differing keys if the folder holds the progress of a run with another config.
    """
    record = folder / RUN_FILE
    if not record.is_file():
        return None
    artifact = folder / "artifact"
    done = (artifact / MANIFEST).is_file()
    theirs = {k: v for k, v in _read(record).items() if not k.startswith("(")}
    ours = config.flatten(cfg)
    _refuse_other_stage(folder, ours, theirs)
    if _progress(folder):
        _refuse_other(folder, cfg, ours, theirs, done)
    return artifact if done else None


def claim(folder: Path, cfg: config.Config, given: Inputs) -> None:
    """Records config and inputs in `folder`, or checks that they equal the recorded ones, except for changeable keys.

    A run without progress, for instance because of a mistake in its config, leaves the folder to any config of its stage.
    To be called while the folder is held (`ownership.held`).
    Raises: ArtifactError naming every differing key or input.
    """
    ours = config.flatten(cfg) | given.flat()
    record = folder / RUN_FILE
    if not record.is_file():
        if (folder / "artifact").exists():
            raise ArtifactError(f"{folder}: holds an artifact but no {RUN_FILE}; choose another run= folder")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        theirs = _read(record)
        if not (changed := config.differences(ours, theirs)):
            return
        if _progress(folder):
            _refuse_other(folder, cfg, ours, theirs, done=False)
            logger.info(f"{folder}: continues with {'; '.join(changed)}")
        else:
            logger.info(f"{folder}: has no progress yet; starts from scratch with {'; '.join(changed)}")
            _forget(folder)
    disk.write_atomic(record, yaml.safe_dump(ours, sort_keys=False).encode())


def unlike(folder: Path, cfg: config.Config, given: Inputs, but: Collection[str] = ()) -> list[str]:
    """In which keys and inputs the run in `folder` differs from one of `cfg`, apart from changeable keys and those in `but`."""
    theirs = _read(folder / RUN_FILE)
    left_out = {*config.changeable(cfg), *_added_since(cfg, theirs), *but}
    return _differences(config.flatten(cfg) | given.flat(), theirs, left_out)


def manifest(
    kind: Kind, cfg: config.Config, given: Inputs, metrics: Mapping[str, float], run_id: str | None
) -> Manifest:
    """The manifest of what a stage is about to publish."""
    numbers = {name: float(value) for name, value in metrics.items()}
    flat = config.flatten(cfg)
    return Manifest(
        kind=kind, stage=stage_of(cfg), parents=given.parents(), metrics=numbers, config=flat, run_id=run_id
    )


def stage_of(cfg: config.Config) -> str:
    """The value of the config's `stage` key."""
    return str(config.flatten(cfg)["stage"])


def _progress(folder: Path) -> str:
    """What the folder holds of a run's work, in words; empty if there is nothing to lose."""
    if (folder / "artifact").exists():
        return "an artifact"
    held = {
        "checkpoints/step-*": "checkpoints",
        "work/items.jsonl": "a list of images",
        "trials/*": "trials",
        f"{MEASURED}/*": "measurements",
    }
    return next((words for pattern, words in held.items() if any(folder.glob(pattern))), "")


def _forget(folder: Path) -> None:
    """Removes the tracking records of a run without progress: another config is another tracked run."""
    for name in (RUN_ID_FILE, RECORDS, DELIVERED):
        (folder / name).unlink(missing_ok=True)


def _read(record: Path) -> dict[str, Any]:
    try:
        flat = yaml.safe_load(record.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        flat = None
    if not isinstance(flat, dict):
        raise ArtifactError(f"{record}: damaged, so the run's config is unknown; choose another run=")
    return flat


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], left_out: Collection[str]) -> list[str]:
    ours, theirs = ({k: v for k, v in values.items() if k not in left_out} for values in (ours, theirs))
    return config.differences(ours, theirs)


def _added_since(cfg: config.Config, theirs: Mapping[str, Any]) -> set[str]:
    """Keys that did not exist when the run began, as far as they are left at their defaults."""
    return config.at_default(cfg) - theirs.keys()


def _refuse_other_stage(folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    stage, there = ours["stage"], theirs.get("stage", "unknown")
    if stage != there:
        raise ArtifactError(f"{folder}: this is a run of the stage {there}, not of {stage}; choose another run=")


def _refuse_other(
    folder: Path, cfg: config.Config, ours: Mapping[str, Any], theirs: Mapping[str, Any], done: bool
) -> None:
    """Raises ArtifactError for differences in keys that decide what a run computes."""
    new_batch_size = {BATCH_SIZE} if ours.get("fit.accept_new_batch_size") and not done else set()
    changeable = config.changeable(cfg) | new_batch_size | _added_since(cfg, theirs)
    if lines := _differences(ours, theirs, changeable):
        listed = "\n".join(f"  {line}" for line in lines)
        hint = ""
        if not done and BATCH_SIZE in ours and ours[BATCH_SIZE] != theirs.get(BATCH_SIZE):
            hint = (
                f"\n  with fit.accept_new_batch_size=true the run continues with the next sample, but its steps, schedules and "
                f"learning rates then count batches of {theirs.get(BATCH_SIZE)} before and {ours[BATCH_SIZE]} after"
            )
        raise ArtifactError(
            f"{folder}: belongs to another config and holds {_progress(folder)}; choose another run=, or go back to the values "
            f"there. {len(lines)} difference(s):\n{listed}{hint}"
        )
