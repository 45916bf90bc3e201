"""What the three training stages share: inputs, run folder, tracker, loop, publication."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from pipeline.artifacts import ownership, run_folder
from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Kind
from pipeline.artifacts.run_folder import Inputs
from pipeline.config import Config
from pipeline.data import loader
from pipeline.data.batch import Batch, BatchShard
from pipeline.data.loader import LoaderConfig
from pipeline.data.reader import ShardReader
from pipeline.log import logger
from pipeline.stages.validation import Examples, ValidationConfig
from pipeline.tracking.run import tracked_run
from pipeline.training.engine_config import EngineConfig
from pipeline.training.loop import FitConfig, Task, fit
from pipeline.training.runtime import Runtime

# Of the engine, named at the start where they are on
OPTIONS = ("compile", "cuda_graphs", "activation_checkpointing", "fused_norms", "pad_channels", "cudnn_benchmark")
# What torch and numpy both take
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class TrainingConfig(Config):
    """The sections every training stage has."""

    data: LoaderConfig
    fit: FitConfig
    validation: ValidationConfig = ValidationConfig()
    engine: EngineConfig = EngineConfig()
    seed: Seed = 0


class ShowingTask(Task, Protocol):
    """A task with a picture of its last validation; None where there is nothing to show, as on other ranks."""

    examples: Examples


def train(
    cfg: TrainingConfig,
    folder: Path,
    kind: Kind,
    given: Inputs,
    make_task: Callable[[Runtime, Tensor], ShowingTask],
    batch_multiple: int = 1,
) -> Path:
    """Trains what `make_task(runtime, validation crops of this process)` builds, and publishes it as a `kind`."""
    runtime = Runtime(cfg.engine)
    share = BatchShard.of(
        cfg.data.batch_size,
        runtime.rank,
        runtime.num_processes,
        batch_multiple * cfg.engine.gradient_accumulation_steps,
    )
    loader.check_memory(cfg.data, share)
    # On the main process, for as long as the stage runs
    with ExitStack() as held:
        still_ours = runtime.on_main(lambda: held.enter_context(ownership.held(folder)))
        # another process may have finished the run while this one waited for it to exit
        if not (done := runtime.on_main(lambda: run_folder.finished(folder, cfg))):
            runtime.on_main(lambda: run_folder.claim(folder, cfg, given))
            done = _train(runtime, cfg, folder, kind, given, make_task, share, still_ours)
        runtime.close()
    return done


def _train(
    runtime: Runtime,
    cfg: TrainingConfig,
    folder: Path,
    kind: Kind,
    given: Inputs,
    make_task: Callable[[Runtime, Tensor], ShowingTask],
    share: BatchShard,
    still_ours: Callable[[], None],
) -> Path:
    shards = given.artifacts["shards"][1]
    all_crops = loader.validation_crops(cfg.data, ShardReader(shards, "valid", cfg.data.shard_cache_gb))
    crops = all_crops[runtime.rank :: runtime.num_processes]
    reader = ShardReader(shards, "train", cfg.data.shard_cache_gb)

    def batches(start: int) -> Iterator[Batch]:
        return loader.batches(cfg.data, reader, cfg.seed, share, start, pinned=runtime.device.type == "cuda")

    # Initial weights: the same on every process
    torch.manual_seed(cfg.seed)
    task = make_task(runtime, crops)
    stage = run_folder.stage_of(cfg)
    logger.info(announcement(cfg, stage, folder, given, runtime, len(reader), len(all_crops)))
    with tracked_run(stage, folder, cfg, given, enabled=runtime.is_main) as tracker, runtime.control.leaving_on_error():
        tracker.dataset(cfg.data.shards, shards, "training")

        def show(step: int) -> None:
            picture = task.examples.picture()
            if picture is not None:
                tracker.image("reconstructions", step, picture)

        metrics = fit(task, batches, runtime, folder, cfg.fit, tracker.log, still_ours, show)
        manifest = run_folder.manifest(kind, cfg, given, metrics, tracker.run_id)

        def hand_over() -> None:
            tracker.artifact(publish(folder / "artifact", manifest, task.export, still_ours))

        runtime.on_main(hand_over)
    return folder / "artifact"


def announcement(
    cfg: TrainingConfig, stage: str, folder: Path, given: Inputs, runtime: Runtime, num_images: int, num_crops: int
) -> str:
    """What a run that starts is about to do, in a few lines."""
    each = cfg.data.batch_size // runtime.num_processes // cfg.engine.gradient_accumulation_steps
    options = [name for name in OPTIONS if getattr(cfg.engine, name)]
    options += [f"averaged weights ({cfg.engine.ema_decay})"] if cfg.engine.ema_decay else []
    lines = {
        "trains": ", ".join(f"{name} ({count / 1e6:,.2f} M weights)" for name, count in runtime.sizes().items()),
        "reads": ", ".join(f"{role} {name}" for role, (name, _) in given.artifacts.items()),
        "data": f"{num_images} images, crops of {cfg.data.crop_size}x{cfg.data.crop_size}, {num_crops} to validate on",
        "batch": f"{cfg.data.batch_size} = {runtime.num_processes} process(es) x "
        f"{cfg.engine.gradient_accumulation_steps} accumulation step(s) x {each}",
        "on": f"{runtime.num_processes} x {runtime.device_name}, {runtime.engine}, {', '.join([runtime.precision, *options])}",
        "steps": f"{cfg.fit.steps}; logs every {cfg.fit.log_every}, validates every {cfg.fit.validate_every}, "
        f"saves every {cfg.fit.checkpoint_every}",
        **given.facts,
        "writes": f"{folder}; stop it with Ctrl-C or SIGTERM, the same command resumes",
    }
    return "\n".join([f"{stage}:", *(f"  {name:<6} {value}" for name, value in lines.items())])


def mean_over_parts(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each metric's mean over the equal parts of a batch."""
    return {name: torch.stack([part[name] for part in metrics]).mean() for name in metrics[0]}
