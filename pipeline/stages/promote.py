"""Decides whether an evaluated codec becomes the champion: gates, registration, alias, and a record of the decision."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import ownership, run_folder
from pipeline.artifacts.artifact import Artifact, publish
from pipeline.errors import GatesNotMet
from pipeline.evaluation.metric_table import METRICS
from pipeline.promotion import gates, package
from pipeline.promotion.decision import Decision, PromotionConfig, evaluate_gates, evaluated_codec
from pipeline.registry import aliases, resolve, versions
from pipeline.registry.alias_log import Action
from pipeline.text import timestamp
from pipeline.tracking import provenance, store
from pipeline.tracking.run import tracked_run


class StageConfig(PromotionConfig):
    """What is promoted on which terms, and what its model card says besides the numbers."""

    stage: Literal["promote"] = "promote"
    license: str = "not stated"
    limits: tuple[str, ...] = ()
    """Sentences for the model card."""


def run(cfg: StageConfig, folder: Path, dry_run: bool = False, force: str = "", why: str = "") -> Path:
    """Evaluates, registers, moves the alias, and publishes the decision. force: a reason to promote although gates fail.

    Raises: GatesNotMet naming every gate that does not hold; nothing is registered then. RegistryChanged if somebody else
    moved the alias in the meantime.
    """
    if done := run_folder.finished(folder, cfg):
        return done
    evaluation = resolve.read(cfg.evaluation, "evaluation")
    source, codec = evaluated_codec(cfg, evaluation)
    decision = evaluate_gates(cfg, codec, evaluation)
    gates.print_table(f"{cfg.codec} for {cfg.name}@{cfg.alias}", decision.verdicts)
    if dry_run:
        if decision.failed and not force:
            raise _refusal(cfg, decision)
        print(f"dry run: {'would be forced' if decision.failed else 'all gates hold'}; nothing was registered")
        return folder
    given = run_folder.Inputs({"evaluation": (cfg.evaluation, evaluation), "codec": (source, codec)}, {})
    with ownership.held(folder) as still_ours:
        # A process that this one waited for may have finished the run
        if done := run_folder.finished(folder, cfg):
            return done
        if decision.failed and not force:
            _record_refusal(cfg, folder, given, decision)
            raise _refusal(cfg, decision)
        return _promote(cfg, folder, given, decision, force, why, still_ours)


def _promote(
    cfg: StageConfig,
    folder: Path,
    given: run_folder.Inputs,
    decision: Decision,
    force: str,
    why: str,
    still_ours: Callable[[], None],
) -> Path:
    run_folder.claim(folder, cfg, given)
    reason = force or why or "all gates hold"
    with tracked_run("promote", folder, cfg, given) as tracker:
        tracker.log(0, decision.values)
        version = _register(cfg, decision, tracker.run_id)
        record = _record(cfg, decision, version.number, reason, bool(force))
        versions.tag(version, _tags(cfg, decision, record, tracker.run_id))
        # Equal if an interrupted attempt has moved the alias already
        if decision.expected != version.number:
            action: Action = "force" if force else "promote"
            still_ours()
            aliases.move(cfg.name, cfg.alias, version.number, action, reason, decision.expected, tracker.run_id)
        manifest = run_folder.manifest("promotion", cfg, given, decision.values, tracker.run_id)
        artifact = publish(folder / "artifact", manifest, lambda scratch: _write(scratch, record), still_ours)
        tracker.tag("decision", f"version {version.number} became {cfg.alias}" + (" by force" if force else ""))
        tracker.artifact(artifact)
    if decision.expected == version.number:
        print(f"{cfg.name} version {version.number} is models:/{cfg.name}@{cfg.alias} already")
    else:
        before = f", {aliases.previous_of(cfg.alias)} is version {decision.expected}" if decision.expected else ""
        print(f"registered {cfg.name} version {version.number} as models:/{cfg.name}@{cfg.alias}{before}")
    return artifact.path


def _refusal(cfg: StageConfig, decision: Decision) -> GatesNotMet:
    listed = "\n".join(f"  {verdict}" for verdict in decision.failed)
    total = len(decision.verdicts)
    return GatesNotMet(
        f"{cfg.codec} is not promoted; {len(decision.failed)} of {total} gates do not hold:\n{listed}\n"
        '  --force "REASON" promotes it anyway and records the reason'
    )


def _record_refusal(cfg: StageConfig, folder: Path, given: run_folder.Inputs, decision: Decision) -> None:
    """A refusal is a decision too: it gets a run of its own. The run folder stays free for another try."""
    key = json.dumps([given.flat(), decision.champion, [str(gate) for gate in decision.verdicts]], sort_keys=True)
    place = folder / "refused" / hashlib.sha256(key.encode()).hexdigest()[:12]
    (place / "decision").mkdir(parents=True, exist_ok=True)
    _write(place / "decision", _record(cfg, decision, "", "refused", False))
    with tracked_run("promote", place, cfg, given) as tracker:
        tracker.log(0, decision.values)
        tracker.tag("decision", f"refused: {', '.join(verdict.gate for verdict in decision.failed)}")
        tracker.files(place / "decision", "artifact")


def _register(cfg: StageConfig, decision: Decision, run_id: str) -> versions.Version:
    images = decision.evaluation.manifest.config.get("images", "?")
    with tempfile.TemporaryDirectory(prefix=versions.SCRATCH, dir=_beside(decision.codec)) as scratch:
        results = (f"{images}, evaluation {decision.evaluation.digest[:12]}", decision.num_images, decision.intervals)
        packed = Path(scratch) / "model"
        about = package.pack(packed, cfg.name, decision.codec, results, cfg.license, cfg.limits)
        known = {
            "bitstream_id": decision.bitstream_id,
            "evaluation.digest": decision.evaluation.digest,
            "stage": decision.codec.manifest.stage,
        } | {f"metric.{name}": f"{value:.6g}" for name, value in decision.values.items() if name in METRICS}
        return versions.register(cfg.name, packed, decision.codec, run_id, known, about)


def _beside(codec: Artifact) -> Path:
    """A folder on the same disk as the weights, so that they are linked and not copied."""
    store.HOME.mkdir(exist_ok=True)
    return store.HOME if store.HOME.stat().st_dev == codec.path.stat().st_dev else codec.path.parent


def _record(cfg: StageConfig, decision: Decision, version: str, reason: str, forced: bool) -> dict[str, Any]:
    return {
        "name": cfg.name,
        "version": version,
        "alias": cfg.alias,
        "before": decision.expected,
        "who": provenance.who(),
        "when": timestamp(),
        "why": reason,
        "forced": forced,
        "codec": decision.codec.digest,
        "bitstream_id": decision.bitstream_id,
        "evaluation": {"digest": decision.evaluation.digest, "source": cfg.evaluation},
        "champion": decision.champion,
        "gates": [asdict(verdict) for verdict in decision.verdicts],
    }


def _tags(cfg: StageConfig, decision: Decision, record: Mapping[str, Any], run_id: str) -> dict[str, str]:
    """What the version's page shows of this promotion; the alias's own tags, so that several aliases do not collide."""
    failing = ", ".join(verdict.gate for verdict in decision.failed)
    told = f"forced; failing: {failing}" if record["forced"] else f"{len(decision.verdicts)} evaluated, none fails"
    own = {key: str(record[key]) for key in ("who", "when", "why")}
    own |= {"gates": told, "decision": f"run {run_id}, artifact/decision.json"}
    own["report"] = f"run {decision.evaluation.manifest.run_id}, artifact/report.html"
    own |= {f"gate.{v.gate.replace(' ', '_')}": f"{v.value} (expected {v.bound})" for v in decision.verdicts}
    return {f"{cfg.alias}.{key}": value for key, value in own.items()}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / "decision.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
