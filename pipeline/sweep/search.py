"""Ray Tune at work: which trials run when and where, which are proposed, and which are stopped. Imports ray.

All state that a sweep needs to resume is in the trials' own folders; Ray's is thrown away. So a sweep that was killed with
its driver, its workers or the whole cluster starts again from what the trials' folders hold.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining, TrialScheduler

from pipeline.errors import UserError
from pipeline.storage import disk
from pipeline.sweep import space as spaces
from pipeline.sweep import trial as trials
from pipeline.sweep.space import Asha, Bayesian, Dimension, Integer, Pbt, Space, Uniform, Values
from pipeline.sweep.trainable import MEMBER, STEP, TrialTrainable, member


def run(space: Space, sweep: Path, concurrent: int, environment: dict[str, str]) -> None:
    """Runs all trials that have not finished. What came of them is in their folders."""
    scratch = sweep.resolve() / "tune"
    shutil.rmtree(scratch, ignore_errors=True)
    _check_resources(space)
    context = {"space": space, "sweep": sweep.resolve(), "here": Path.cwd(), "environment": environment}
    resources = {"cpu": space.cpus_per_trial, "gpu": space.gpus_per_trial}
    trainable = tune.with_resources(tune.with_parameters(TrialTrainable, context=context), resources)
    searching, parameters, samples = _searched(space, sweep)
    if samples:
        tune.Tuner(
            trainable,
            param_space=parameters,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                search_alg=searching,
                scheduler=_scheduler(space),
                max_concurrent_trials=concurrent,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[_Stopped()],
                # A worker or a node died: continue elsewhere
                failure_config=tune.FailureConfig(max_failures=3),
            ),
        ).fit()
    shutil.rmtree(scratch, ignore_errors=True)


def _searched(space: Space, sweep: Path) -> tuple[Any, dict[str, Any], int]:
    """Search algorithm, parameters, and how many trials are left."""
    if space.scheduler.kind == "pbt":
        return _members(space, sweep)
    if isinstance(space.algorithm, Bayesian):
        return _bayesian(space, sweep, space.algorithm)
    waiting = [p for p in spaces.enumerate_trials(space) if not _ended(trials.place_of(sweep, p))]
    return None, {"values": tune.grid_search(waiting)}, int(bool(waiting))


def _members(space: Space, sweep: Path) -> tuple[Any, dict[str, Any], int]:
    """The population's members that have not finished, each with the values it has now."""
    present: dict[int, Values] = {}
    for number, values in enumerate(spaces.enumerate_trials(space)):
        place = sweep / "trials" / member(number)
        if not (place / trials.SETTINGS).is_file():
            trials.prepare(place, values)
        if not (place / trials.RESULT).is_file():
            present[number] = trials.generation(place)[1]

    def of_its_member(key: str) -> Any:
        def value(spec: Any) -> Any:
            return present[spec.config[MEMBER]][key]

        return tune.sample_from(value)

    theirs = {key: of_its_member(key) for key in space.search}
    return None, {MEMBER: tune.grid_search(list(present)), **theirs}, int(bool(present))


def _bayesian(space: Space, sweep: Path, algorithm: Bayesian) -> tuple[Any, dict[str, Any], int]:
    """Optuna, told of every trial that ended, and asked first for those that have not."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    class AtTheEnd(OptunaSearch):
        """Learns from a trial's evaluation, not from what the gan stage validates on the way."""

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            """Nothing yet."""

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            measured = result is not None and algorithm.metric in result
            super().on_trial_complete(trial_id, result if measured else None, error or not measured)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known, unfinished, stopped = [], [], 0
    for place in sorted((sweep / "trials").glob("*")):
        values = json.loads((place / trials.SETTINGS).read_text(encoding="utf-8"))
        found = trials.outcome(place) if _ended(place) else None
        if found is None:
            unfinished.append(values)
        elif algorithm.metric in found:
            known.append((values, found[algorithm.metric]))
        else:
            # By the scheduler: others were better
            stopped += 1
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize" if algorithm.mode == "max" else "minimize"
    )
    distributions = {key: _distribution(dimension) for key, dimension in space.search.items()}
    for values, value in known:
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=value))
    sampler = optuna.samplers.TPESampler(
        seed=space.seed + len(known) + stopped, n_startup_trials=algorithm.num_startup_trials
    )
    searching = AtTheEnd(
        distributions, metric=algorithm.metric, mode=algorithm.mode, points_to_evaluate=unfinished or None,
        sampler=sampler, study_name="sweep", storage=storage,
    )  # fmt: skip
    return searching, {}, max(0, space.num_samples - len(known) - stopped)


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    match dimension:
        case Uniform():
            return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.kind == "log_uniform")
        case Integer():
            return distributions.IntDistribution(dimension.low, dimension.high)
        case _:
            return distributions.CategoricalDistribution(list(dimension.values))


def _scheduler(space: Space) -> TrialScheduler | None:
    match space.scheduler:
        case Asha() as asha:
            return AsyncHyperBandScheduler(
                STEP,
                metric=asha.metric,
                mode=asha.mode,
                grace_period=asha.grace_period,
                reduction_factor=asha.reduction_factor,
                max_t=10**9,
            )
        case Pbt() as population:
            return PopulationBasedTraining(
                STEP,
                metric=population.metric,
                mode=population.mode,
                perturbation_interval=population.perturbation_interval,
                quantile_fraction=population.quantile,
                hyperparam_mutations={key: _mutations(dimension) for key, dimension in space.search.items()},
                custom_explore_fn=partial(_within_bounds, space),
            )
    return None


def _mutations(dimension: Dimension) -> Any:
    match dimension:
        case Uniform():
            return (tune.loguniform if dimension.kind == "log_uniform" else tune.uniform)(dimension.low, dimension.high)
        case Integer():
            return tune.randint(dimension.low, dimension.high + 1)
        case _:
            return list(dimension.values)


def _within_bounds(space: Space, config: dict[str, Any]) -> dict[str, Any]:
    """Values that were changed by a fifth, back within their bounds."""
    for key, dimension in space.search.items():
        if isinstance(dimension, Uniform | Integer):
            config[key] = type(dimension.low)(min(max(config[key], dimension.low), dimension.high))
    return config


def _check_resources(space: Space) -> None:
    """Raises: UserError if no node can hold a trial; on a cluster that grows, Ray is left to try."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    has = ray.cluster_resources()
    for name, wanted in (("CPU", space.cpus_per_trial), ("GPU", space.gpus_per_trial)):
        if wanted > has.get(name, 0):
            raise UserError(
                f"a trial wants {wanted:g} {name}s, this machine has {has.get(name, 0):g}; lower {name.lower()}s_per_trial, or "
                "name a larger cluster in RAY_ADDRESS"
            )


def _ended(place: Path) -> bool:
    """Whether a trial is not to be run again: it finished, or was stopped since others were better. Failed ones are."""
    return (place / trials.RESULT).is_file() or (place / trials.STOPPED).is_file()


class _Stopped(tune.Callback):
    """Writes down which trials the scheduler stopped, so that the same sweep does not start them again."""

    def on_trial_complete(self, *_: Any, trial: Any, **__: Any) -> None:  # type: ignore[override]  # called by name
        last = trial.last_result or {}
        if "place" in last and "ended" not in last:
            told = {name: value for name, value in last.items() if name.startswith("val/")}
            record = {"stopped": f"at step {last[STEP]}", **told}
            disk.write_atomic(Path(last["place"]) / trials.STOPPED, json.dumps(record).encode())
