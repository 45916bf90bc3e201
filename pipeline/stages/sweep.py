"""Searches over settings with Ray Tune: every trial runs pretrain, gan and evaluate as ordinary stages. Imports ray."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from matplotlib.figure import Figure
from pydantic import Field, PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table

from pipeline import artifacts, config, local_ray, runs, stages, store, tracking
from pipeline.config import Config
from pipeline.errors import ConfigError, UserError

TRIAL_STAGES = ("pretrain", "gan", "evaluate")
Point = dict[str, Any]  # one trial: its settings, its outcome


class Grid(Config):
    """Every value is tried with every value of the other grids."""

    kind: Literal["grid"]
    values: Annotated[tuple[Any, ...], Field(min_length=1)]


class Uniform(Config):
    """Random values between two bounds."""

    kind: Literal["uniform", "log_uniform"]
    low: float
    high: float


class StageConfig(Config):
    """What is searched, over which base configurations."""

    stage: Literal["sweep"] = "sweep"
    shards: str  # artifact of kind "shards"
    labeler: str  # artifact of kind "labeler"
    pretrain: Path  # base configuration of each stage of a trial
    gan: Path
    evaluate: Path
    # "stage.key" -> values, for instance pretrain.rate.bpp or gan.gan_weight
    search: Annotated[dict[str, Annotated[Grid | Uniform, Field(discriminator="kind")]], Field(min_length=1)]
    samples: PositiveInt = 1  # repetitions of the grid, each with new random values
    seed: int = 0
    concurrent: PositiveInt = 1  # trials at once
    cpus_per_trial: PositiveFloat = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0
    quality: Literal["psnr_db", "ms_ssim"] = "psnr_db"  # of the fine-tuned codec, drawn against its rate


def run(cfg: StageConfig, folder: Path) -> Path:
    """Runs all trials and publishes their table and the Pareto front of rate and quality."""
    if done := runs.finished(folder, cfg):
        return done
    _check_keys(cfg)
    given = runs.inputs(shards=(cfg.shards, "shards"), labeler=(cfg.labeler, "labeler"))
    runs.claim(folder, cfg, given)
    with tracking.run("sweep", folder, cfg, given) as tracker:  # creates the store before the trials reach for it
        points = _tune(cfg, folder, tracker.run_id)
        finished = [p for p in points if "bpp" in p]
        if not finished:
            logs = "\n".join(f"  {p['log']}" for p in points)
            raise UserError(f"{folder}: none of {len(points)} trials finished; their logs:\n{logs}")
        mark_pareto(finished, cfg.quality)

        def write(scratch: Path) -> None:
            _write_table(scratch / "trials.csv", cfg, points)
            pareto_figure(finished, cfg.quality).savefig(scratch / "pareto.png", dpi=110)

        metrics = {"trials": len(points), "finished": len(finished)}
        artifact = artifacts.publish(
            folder / "artifact", runs.manifest("sweep", cfg, given, metrics, tracker.run_id), write
        )
        tracker.artifact(artifact)
    _print(cfg, points)
    print(f"table: {artifact.path / 'trials.csv'}\nfigure: {artifact.path / 'pareto.png'}")
    return artifact.path


def mark_pareto(points: Sequence[Point], quality: str) -> None:
    """Sets `pareto` on each point: no other has at most its rate and at least its quality, and one of the two better."""
    for p in points:
        p["pareto"] = not any(
            q["bpp"] <= p["bpp"] and q[quality] >= p[quality] and (q["bpp"], q[quality]) != (p["bpp"], p[quality])
            for q in points
        )


def pareto_figure(points: Sequence[Point], quality: str) -> Figure:
    """All trials in the plane of rate and quality, with the front that no trial dominates."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    front = sorted((p["bpp"], p[quality]) for p in points if p["pareto"])
    others = [(p["bpp"], p[quality]) for p in points if not p["pareto"]]
    axes.plot(*zip(*front, strict=True), "o-", label="Pareto front")
    if others:
        axes.plot(*zip(*others, strict=True), "o", color="0.6", label="dominated")
    axes.set(xlabel="bits per pixel, from file sizes", ylabel=quality)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _check_keys(cfg: StageConfig) -> None:
    """Loads the base configurations with every searched value, so that a mistake is found before any trial."""
    problems = [
        f"search.{key}: begins with no stage of a trial ({', '.join(TRIAL_STAGES)})"
        for key in cfg.search
        if key.split(".")[0] not in TRIAL_STAGES
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    tried = {key: s.values if isinstance(s, Grid) else (s.low, s.high) for key, s in cfg.search.items()}
    for i in range(max(len(values) for values in tried.values())):  # every value once, not every combination
        point = {key: values[i % len(values)] for key, values in tried.items()}
        for stage in TRIAL_STAGES:
            config.load(stages.get(stage).StageConfig, getattr(cfg, stage), _overrides(stage, point))


def _overrides(stage: str, values: dict[str, Any]) -> list[str]:
    mine = {key.removeprefix(f"{stage}."): value for key, value in values.items() if key.startswith(f"{stage}.")}
    return [f"{key}={json.dumps(value)}" for key, value in mine.items()]


def _tune(cfg: StageConfig, folder: Path, run_id: str) -> list[Point]:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with local_ray.running():
        return _search(cfg, folder, run_id)


def _search(cfg: StageConfig, folder: Path, run_id: str) -> list[Point]:
    from ray import tune

    makers = {"uniform": tune.uniform, "log_uniform": tune.loguniform}
    space = {
        key: tune.grid_search(list(s.values)) if isinstance(s, Grid) else makers[s.kind](s.low, s.high)
        for key, s in cfg.search.items()
    }
    here, place, kept = Path.cwd(), folder.resolve(), store.uri()  # trials run in folders of their own
    trainable = tune.with_resources(
        lambda values: _trial(cfg, place, here, values, {"MLFLOW_TRACKING_URI": kept, tracking.PARENT: run_id}),
        {"cpu": cfg.cpus_per_trial, "gpu": cfg.gpus_per_trial},
    )
    searching = tune.search.basic_variant.BasicVariantGenerator(max_concurrent=cfg.concurrent, random_state=cfg.seed)
    results = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(num_samples=cfg.samples, search_alg=searching),
        run_config=tune.RunConfig(name="tune", storage_path=str(place), verbose=0),
    ).fit()
    return [{**(r.metrics or {}), "settings": r.config or {}} for r in (results[i] for i in range(len(results)))]


def _trial(cfg: StageConfig, folder: Path, here: Path, values: dict[str, Any], environment: dict[str, str]) -> Point:
    """Runs a trial's stages in `folder/trials/NAME`; a trial that was finished or interrupted earlier goes on from there."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / "trials" / digest
    place.mkdir(parents=True, exist_ok=True)
    artifacts.write_durably(place / "settings.json", json.dumps(values, indent=1).encode())
    os.environ.update(environment)
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    told = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in shown.items())
    with tracking.group("trial", place, f"A trial of the sweep in `{folder}`.", values, name=told) as trial:
        point = _run_stages(cfg, place, here, values, trial.environment)
        trial.log({name: value for name, value in point.items() if isinstance(value, float)})
        return point


def _run_stages(
    cfg: StageConfig, place: Path, here: Path, values: dict[str, Any], environment: dict[str, str]
) -> Point:
    codec, tuned = place / "pretrain", place / "gan"
    connect = {
        "pretrain": [f"data.shards={cfg.shards}"],
        "gan": [f"data.shards={cfg.shards}", f"codec={codec}", f"labeler={cfg.labeler}"],
        "evaluate": [f"images={cfg.shards}", f"codecs={{pretrained: {codec}, fine-tuned: {tuned}}}"],
    }
    log = place / "log.txt"
    for stage in TRIAL_STAGES:
        words = [stage, str(getattr(cfg, stage)), f"run={place / stage}", *connect[stage], *_overrides(stage, values)]
        with log.open("a") as stream:
            command, environ = [sys.executable, "-m", "pipeline", *words], os.environ | environment
            ended = subprocess.run(command, cwd=here, env=environ, stdout=stream, stderr=stream, check=False)
        if ended.returncode:
            return {"failed": f"{stage}: exit code {ended.returncode}", "log": str(log)}
    totals = artifacts.read(str(place / "evaluate"), "evaluation").json("totals.json")["fine-tuned"]
    return {name: value for name, value in totals.items() if value is not None} | {"log": str(log)}


def _columns(cfg: StageConfig) -> list[str]:
    return [*cfg.search, "bpp", "psnr_db", "ms_ssim", "pareto", "failed", "log"]


def _row(cfg: StageConfig, point: Point) -> list[Any]:
    return [point["settings"].get(name, point.get(name, "")) for name in _columns(cfg)]


def _write_table(path: Path, cfg: StageConfig, points: Sequence[Point]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(_columns(cfg))
        writer.writerows(_row(cfg, p) for p in points)


def _print(cfg: StageConfig, points: Sequence[Point]) -> None:
    table = Table(title=f"{len(points)} trials")
    for name in _columns(cfg)[:-1]:
        table.add_column(name)
    for p in points:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in _row(cfg, p)[:-1]))
    Console(width=120).print(table)
