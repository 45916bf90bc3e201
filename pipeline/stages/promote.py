"""Registers an evaluated codec and points an alias at it, if its gates hold."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from pipeline import artifacts, registry, runs, tracking
from pipeline.artifacts import Artifact
from pipeline.config import Config
from pipeline.errors import ArtifactError, ConfigError, GatesNotMet

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class Gate(Config):
    """Bounds on one metric of the evaluation, inclusive; at least one of the two."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def has_a_bound(self) -> "Gate":
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs at_least, at_most or both")
        return self

    def holds(self, value: float) -> bool:
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        bounds = [f">= {self.at_least:g}"] if self.at_least is not None else []
        return " and ".join(bounds + ([f"<= {self.at_most:g}"] if self.at_most is not None else []))


class StageConfig(Config):
    """Which codec of which evaluation is registered, under which name, if which gates hold."""

    stage: Literal["promote"] = "promote"
    evaluation: str  # artifact of kind "evaluation"
    codec: str  # a name among the evaluation's codecs
    name: Name = "illm"
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] = "champion"
    gates: Annotated[dict[str, Gate], Field(min_length=1)]  # metric of the evaluation's totals -> bounds


def run(cfg: StageConfig, folder: Path) -> Path:
    """Checks the gates, registers the codec, sets the alias, and publishes a record of the decision.

    Raises: GatesNotMet naming every gate that does not hold; nothing is registered then.
    """
    if done := runs.finished(folder, cfg):
        return done
    evaluation = artifacts.read(cfg.evaluation, "evaluation")
    codec = _evaluated_codec(cfg, evaluation)
    values = _values(cfg, evaluation)
    given = runs.Inputs({"evaluation": (cfg.evaluation, evaluation), "codec": (codec[0], codec[1])}, {})
    failed = [
        f"{metric} is {values[metric]:g}, expected {gate}"
        for metric, gate in cfg.gates.items()
        if not gate.holds(values[metric])
    ]
    _print_gates(cfg, values)
    if failed:
        listed = "\n".join(f"  {line}" for line in failed)
        raise GatesNotMet(
            f"{cfg.codec} is not promoted; {len(failed)} of {len(cfg.gates)} gates do not hold:\n{listed}"
        )
    runs.claim(folder, cfg, given)
    with tracking.run("promote", folder, cfg, given) as tracker:
        tracker.log(0, values)
        tags = {f"gate.{metric}": f"{values[metric]:g} {gate}" for metric, gate in cfg.gates.items()}
        version = registry.register(cfg.name, codec[1], tracker.run_id, tags | {"evaluation.digest": evaluation.digest})
        registry.set_alias(cfg.name, cfg.alias, version)
        decision = {
            "name": cfg.name,
            "version": version,
            "alias": cfg.alias,
            "gates": {metric: {"gate": str(gate), "value": values[metric]} for metric, gate in cfg.gates.items()},
        }
        manifest = runs.manifest("promotion", cfg, given, values, tracker.run_id)
        artifact = artifacts.publish(
            folder / "artifact",
            manifest,
            lambda scratch: (scratch / "decision.json").write_text(json.dumps(decision, indent=1), encoding="utf-8"),
        )
        tracker.artifact(artifact)
    print(f"registered {cfg.name} version {version} as models:/{cfg.name}@{cfg.alias}")
    return artifact.path


def _evaluated_codec(cfg: StageConfig, evaluation: Artifact) -> tuple[str, Artifact]:
    """The codec artifact that was evaluated under that name, unchanged since."""
    parents = {name: p for name, p in evaluation.manifest.parents.items() if name != "images"}
    if cfg.codec not in parents:
        raise ConfigError(f"codec: {cfg.codec!r} was not evaluated; expected one of {', '.join(parents)}")
    parent = parents[cfg.codec]
    artifact = artifacts.read(parent.source, "codec")
    if artifact.digest != parent.digest:
        raise ArtifactError(f"{parent.source}: is not the codec that {cfg.evaluation} evaluated; evaluate it again")
    return parent.source, artifact


def _values(cfg: StageConfig, evaluation: Artifact) -> dict[str, float]:
    totals = evaluation.json("totals.json")[cfg.codec]
    missing = [metric for metric in cfg.gates if totals.get(metric) is None]
    if missing:
        known = ", ".join(metric for metric, value in totals.items() if value is not None)
        raise ConfigError(f"gates: {', '.join(missing)} was not measured; the evaluation has {known}")
    return {metric: float(totals[metric]) for metric in cfg.gates}


def _print_gates(cfg: StageConfig, values: dict[str, float]) -> None:
    table = Table(title=f"gates for {cfg.codec}")
    for heading in ("metric", "value", "gate", "holds"):
        table.add_column(heading)
    for metric, gate in cfg.gates.items():
        table.add_row(metric, f"{values[metric]:.4f}", str(gate), "yes" if gate.holds(values[metric]) else "NO")
    Console(width=80).print(table)
