"""The run folder: one stage, one config. Decides whether to start, to continue, to stop or to refuse."""

import fcntl
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import artifacts, config
from pipeline.artifacts import Artifact, Kind, Manifest, Parent
from pipeline.errors import ArtifactError, UserError

RUN_FILE = "run.yaml"
# Keys that say how something is computed and not what: a run may go on with other values
CHANGEABLE = {f"data.{name}" for name in ("workers", "cache_mb", "shard_cache_gb")}
CHANGEABLE |= {"workers", "spread"}
CHANGEABLE |= {f"engine.{name}" for name in ("passes", "recompute", "compile", "deterministic")}
CHANGEABLE |= {f"fit.{name}" for name in ("log_every", "checkpoint_every", "keep_checkpoints", "keep_every")}
CHANGEABLE |= {f"fit.{name}" for name in ("max_bad_steps", "profile", "accept_new_batch_size")}
BATCH_SIZE = "data.batch_size"


@dataclass(frozen=True)
class Inputs:
    """The artifacts a stage reads, by role, and facts about the machine that change its results."""

    artifacts: dict[str, tuple[str, Artifact]]  # role -> (the name in the config, the artifact)
    facts: dict[str, str]  # for instance {"lpips": "absent"}

    def parents(self) -> dict[str, Parent]:
        return {role: artifact.as_parent(name) for role, (name, artifact) in self.artifacts.items()}

    def flat(self) -> dict[str, str]:
        digests = {f"(input {role})": artifact.digest for role, (_, artifact) in self.artifacts.items()}
        return digests | {f"({name})": value for name, value in self.facts.items()}


def inputs(facts: dict[str, str] | None = None, **named: tuple[str, Kind]) -> Inputs:
    """Reads and verifies every input artifact: `inputs(shards=(cfg.data.shards, "shards"))`."""
    return Inputs({role: (name, artifacts.read(name, kind)) for role, (name, kind) in named.items()}, facts or {})


def finished(folder: Path, cfg: config.Config) -> Path | None:
    """The artifact in `folder`, if the same config made it.

    Raises: ArtifactError naming the differing keys if another config owns the folder.
    """
    record = folder / RUN_FILE
    if not record.is_file():
        return None
    artifact = folder / "artifact"
    done = (artifact / artifacts.MANIFEST).is_file()
    theirs = {k: v for k, v in _read(record).items() if not k.startswith("(")}
    _refuse_other(folder, config.flatten(cfg), theirs, done)
    return artifact if done else None


def claim(folder: Path, cfg: config.Config, given: Inputs) -> None:
    """Records config and inputs in `folder`, or checks that they are the recorded ones but for what may change.

    Raises: ArtifactError naming every differing key or input.
    """
    ours = config.flatten(cfg) | given.flat()
    record = folder / RUN_FILE
    if record.is_file():
        theirs = _read(record)
        _refuse_other(folder, ours, theirs, done=False)
        if changed := config.differences(ours, theirs):
            print(f"{folder}: goes on with {'; '.join(changed)}", file=sys.stderr)
            artifacts.write_durably(record, yaml.safe_dump(ours, sort_keys=False).encode())
        return
    if (folder / "artifact").exists():
        raise ArtifactError(f"{folder}: holds an artifact but no {RUN_FILE}; choose another run= folder")
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_durably(record, yaml.safe_dump(ours, sort_keys=False).encode())


@contextmanager
def alone(folder: Path, busy: UserError) -> Iterator[None]:
    """Raises: `busy` if another process is within this for the same folder."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise busy from None
        yield


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


def _read(record: Path) -> dict[str, Any]:
    try:
        flat = yaml.safe_load(record.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        flat = None
    if not isinstance(flat, dict):
        raise ArtifactError(f"{record}: damaged; remove the folder or choose another run=")
    return flat


def _refuse_other(folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], done: bool) -> None:
    """Raises ArtifactError for differences in keys that decide what a run computes."""
    changeable = CHANGEABLE | ({BATCH_SIZE} if ours.get("fit.accept_new_batch_size") and not done else set())
    lines = config.differences(
        {key: value for key, value in ours.items() if key not in changeable},
        {key: value for key, value in theirs.items() if key not in changeable},
    )
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        hint = ""
        if not done and BATCH_SIZE in ours and ours[BATCH_SIZE] != theirs.get(BATCH_SIZE):
            hint = (
                f"\n  with fit.accept_new_batch_size=true the run goes on with the next sample, but its steps, schedules and "
                f"learning rates then count batches of {theirs.get(BATCH_SIZE)} before and {ours[BATCH_SIZE]} after"
            )
        raise ArtifactError(
            f"{folder}: belongs to another config; choose another run= or remove it. {len(lines)} difference(s):\n{listed}{hint}"
        )
