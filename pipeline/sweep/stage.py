"""Searches over settings: every trial runs pretrain, gan and evaluate as ordinary stages. Ray Tune decides what runs when."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from pipeline import config
from pipeline.artifacts import ownership, run_folder
from pipeline.artifacts.artifact import publish
from pipeline.errors import ConfigError, UserError
from pipeline.processes import ray_session
from pipeline.registry import resolve
from pipeline.storage import disk
from pipeline.sweep import checks, results, space, trial
from pipeline.sweep.space import Space
from pipeline.tracking import store
from pipeline.tracking.run import PARENT, Tracker, tracked_run

# In the run folder: the whole configuration, for the trials
CONFIG = "sweep.yaml"


class StageConfig(Space):
    """What is searched, and how many trials run at once."""

    stage: Literal["sweep"] = "sweep"
    max_concurrent: PositiveInt = 1


def run(cfg: StageConfig, folder: Path) -> Path:
    """Runs all trials and publishes their table, fronts, figures and the best trials' configurations."""
    if done := run_folder.finished(folder, cfg):
        return done
    given = inputs(cfg)
    with ownership.held(folder) as still_ours:
        # A process that this one waited for may have finished the run
        if done := run_folder.finished(folder, cfg):
            return done
        begin(cfg, folder, given)
        return _search(cfg, folder, given, still_ours)


def _search(cfg: StageConfig, folder: Path, given: run_folder.Inputs, still_ours: Callable[[], None]) -> Path:
    with tracked_run("sweep", folder, cfg, given) as tracker:
        environment = {"MLFLOW_TRACKING_URI": store.uri(), PARENT: tracker.run_id}
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        # A trial may fail before its first validation
        os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        with ray_session.running():
            from pipeline.sweep import search

            search.run(cfg, folder, cfg.max_concurrent, environment)
        return _publish(cfg, folder, given, tracker, still_ours)


def gather(folder: Path, allow_failed: bool) -> Path:
    """Publishes a sweep whose trials were run one by one, for instance as an array of jobs.

    allow_failed: leave out those that failed.

    Raises: UserError naming the trials that failed or have not been run.
    """
    cfg = config.load(StageConfig, folder / CONFIG)
    if done := run_folder.finished(folder, cfg):
        return done
    missing = [f"{p['name']}: {p['failed']}" for p in collect(folder) if "failed" in p]
    missing += [
        f"{p.name}: not begun" for v in space.enumerate_trials(cfg) if not (p := trial.place_of(folder, v)).is_dir()
    ]
    if missing and not allow_failed:
        listed = "\n".join(f"  {line}" for line in missing)
        raise UserError(
            f"{folder}: {len(missing)} trial(s) are missing; submit again, or --allow-failed leaves them out:\n{listed}"
        )
    given = inputs(cfg)
    with ownership.held(folder) as still_ours:
        begin(cfg, folder, given)
        with tracked_run("sweep", folder, cfg, given) as tracker:
            return _publish(cfg, folder, given, tracker, still_ours)


def _publish(
    cfg: StageConfig, folder: Path, given: run_folder.Inputs, tracker: Tracker, still_ours: Callable[[], None]
) -> Path:
    points = collect(folder)
    finished = [p for p in points if "bpp" in p]
    if not finished:
        told = "\n".join(f"  {p['name']}: {p.get('failed') or p.get('stopped')}" for p in points)
        raise UserError(f"{folder}: none of {len(points)} trials finished; the same command tries again:\n{told}")
    results.mark_pareto_fronts(finished, "psnr_db", results.realism_of(finished, cfg.realism))
    metrics = {"trials": len(points), "finished": len(finished)}
    manifest = run_folder.manifest("sweep", cfg, given, metrics, tracker.run_id)
    artifact = publish(
        folder / "artifact", manifest, lambda scratch: results.write(scratch, cfg, points, folder), still_ours
    )
    tracker.artifact(artifact)
    _tell(cfg, folder, points, artifact.path)
    return artifact.path


def inputs(cfg: StageConfig) -> run_folder.Inputs:
    """Checks everything that can be checked before a trial."""
    checks.check(cfg)
    return resolve.read_inputs(cfg)


def begin(cfg: StageConfig, folder: Path, given: run_folder.Inputs) -> None:
    """Claims the folder, which is held, and writes down for the trials what is searched."""
    run_folder.claim(folder, cfg, given)
    disk.write_atomic(folder / CONFIG, config.dump(cfg).encode())


def begin_array(cfg: StageConfig, folder: Path) -> None:
    """Like `begin`, for trials that are jobs of their own: makes the run below which theirs hang."""
    given = inputs(cfg)
    with ownership.held(folder):
        begin(cfg, folder, given)
        with tracked_run("sweep", folder, cfg, given):
            pass


def run_trial(folder: Path, name: str) -> trial.Point:
    """Runs one trial of the sweep in `folder`. name: of its folder, or its number in a search that does not learn.

    Raises: ConfigError if there is none of that name.
    """
    cfg = config.load(StageConfig, folder / CONFIG)
    if (folder / run_folder.RUN_ID_FILE).is_file():
        os.environ.setdefault(PARENT, (folder / run_folder.RUN_ID_FILE).read_text().strip())
    place = folder / "trials" / name
    if not (place / trial.SETTINGS).is_file() and name.isdigit():
        listed = space.enumerate_trials(cfg)
        if int(name) >= len(listed):
            raise ConfigError(f"trial {name}: the sweep has {len(listed)} trials, from 0 on")
        place = trial.place_of(folder, listed[int(name)])
        trial.prepare(place, listed[int(name)])
    if not (place / trial.SETTINGS).is_file():
        raise ConfigError(f"{place}: no such trial; expected one of {sorted(p.name for p in place.parent.glob('*'))}")
    return trial.run(cfg, folder, place)


def collect(folder: Path) -> list[trial.Point]:
    """What came of every trial that was begun."""
    points: list[trial.Point] = []
    for place in sorted((folder / "trials").glob("*")):
        settings: dict[str, Any] = json.loads((place / trial.SETTINGS).read_text(encoding="utf-8"))
        found = trial.outcome(place) or {"failed": f"did not end; see {place / 'log.txt'}"}
        points.append({"name": place.name, "settings": settings} | found)
    return points


def _tell(cfg: StageConfig, folder: Path, points: list[trial.Point], artifact: Path) -> None:
    results.print_table(cfg, points)
    if saved := results.reuse_summary(folder, points):
        print(saved)
    print(f"table: {artifact / 'trials.csv'}\nfigures: {', '.join(str(p) for p in sorted(artifact.glob('*.png')))}")
    best = sorted((artifact / "best").iterdir())
    print(f"best trials, as configurations: {artifact / 'best'}")
    if cfg.promote is not None:
        print(f"promote one: illm promote {best[0] / 'promote.yaml'} run=runs/promote-{best[0].name}")
