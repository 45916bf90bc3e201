"""Stages on a Ray cluster: Ray starts the processes that train, and runs the rest as tasks. Imports ray.

The run folders, the project and its virtual environment have to be on a file system that the cluster's nodes share.
"""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer

from pipeline import config, log, stages
from pipeline.errors import Preempted, StageFailed, UserError
from pipeline.processes import signals
from pipeline.processes.command import illm_command
from pipeline.stages import TRAINING
from pipeline.stages.plan import PlannedStage
from pipeline.storage import disk

# Workers or nodes that may die during one stage
MAX_FAILURES = 10
# Beginnings of the names of environment variables that stages on other machines get
FORWARDED_ENV = (
    "ILLM_",
    "MLFLOW_",
    "AWS_",
    "TORCH_HOME",
    "ACCELERATE_USE_CPU",
    "OMP_NUM_THREADS",
)


def run(steps: Sequence[PlannedStage], workers: int, gpus: float) -> None:
    """Runs the stages one after the other. workers: processes that train a stage. gpus: of each.

    Raises: StageFailed with the stage's exit code.
    """
    ray.init(os.environ.get("RAY_ADDRESS", "auto"), ignore_reinit_error=True)
    # The shard stage distributes its chunks there
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    for step in steps:
        if step.done:
            print(f"{step.stage}: already done: {step.folder / 'artifact'}", flush=True)
            continue
        print(f"\n$ illm {' '.join(step.words)}", flush=True)
        if step.stage in TRAINING:
            _train(step, workers, gpus)
        else:
            _task(step, gpus if step.stage == "evaluate" else 0)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_ENV)}


def _train(step: PlannedStage, workers: int, gpus: float) -> None:
    """Trains with Ray Train: a worker or a node that dies costs the steps since the last checkpoint."""
    place = step.folder.resolve() / "ray" / uuid.uuid4().hex[:8]
    place.mkdir(parents=True)
    refusal = place / "refusal.json"
    given = {"step": step, "here": str(Path.cwd()), "env": _environment(), "refusal": str(refusal)}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=given,
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=train.RunConfig(
            name="train", storage_path=str(place), failure_config=train.FailureConfig(max_failures=MAX_FAILURES)
        ),
    )
    try:
        trainer.fit()
        if refusal.is_file():
            about = json.loads(refusal.read_text(encoding="utf-8"))
            raise StageFailed(f"{step.stage}: {about['message']}", about["code"])
    finally:
        shutil.rmtree(place, ignore_errors=True)
        # Another attempt's may be there
        with suppress(OSError):
            place.parent.rmdir()
    print(f"{step.stage}: done: {step.folder / 'artifact'}", flush=True)


def _worker(given: dict[str, Any]) -> None:
    """One process of a stage: Ray has set its rank and made the process group. What a user has to fix is not retried."""
    os.environ.update(given["env"])
    os.chdir(given["here"])
    log.install(os.environ.get(log.LEVEL_ENV) or log.Level.INFO)
    step: PlannedStage = given["step"]
    module = stages.get(step.stage)
    try:
        module.run(config.load(module.StageConfig, step.config, step.overrides), step.folder)
    except (UserError, Preempted) as error:
        if "another process of this run is gone" in str(error):
            # A worker died: Ray restarts all of them
            raise
        about = {"code": error.exit_code, "message": str(error)}
        disk.write_atomic(Path(given["refusal"]), json.dumps(about).encode())


def _task(step: PlannedStage, gpus: float) -> None:
    """Runs a stage's command as a task, retried if its node dies. Sharding is driven from here and distributes itself."""
    if step.stage == "shard":
        code = _command(step.words, str(Path.cwd()), _environment() | {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]})
    else:
        task = ray.remote(_command).options(num_cpus=1, num_gpus=gpus, max_retries=3)
        code = ray.get(task.remote(step.words, str(Path.cwd()), _environment()))
    if code:
        raise StageFailed(f"{step.stage}: ended with exit code {code}; its own message is above", code)


def _command(words: list[str], here: str, env: dict[str, str]) -> int:
    command = illm_command(words)
    return subprocess.run(
        command, cwd=here, env=os.environ | env | signals.die_with_parent_env(), check=False
    ).returncode
