"""Turns a folder of images into WebDataset tars with an index."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track

from pipeline import artifacts, runs, tracking
from pipeline.config import Config
from pipeline.data import shards, sources
from pipeline.errors import DataError


class StageConfig(Config):
    """Which images become shards, and how."""

    stage: Literal["shard"] = "shard"
    source: str  # folder of images, or samples://photos for those inside scikit-image and scikit-learn
    min_side: PositiveInt = 256  # pixels; images with a shorter side are refused
    validation_share: Annotated[float, Field(ge=0, lt=1)] = (
        0.02  # share of images, chosen by content, kept from training
    )
    shard_mb: PositiveFloat = 256.0  # a tar is closed when it holds this much
    workers: NonNegativeInt = 0  # threads; 0: one per core


def run(cfg: StageConfig, folder: Path) -> Path:
    """Shards a source and publishes tars, tables and index."""
    if done := runs.finished(folder, cfg):
        return done
    files = sources.find_files(cfg.source)
    runs.claim(folder, cfg, runs.inputs())
    with tracking.run("shard", folder, cfg, runs.inputs()) as tracker:
        workers = cfg.workers or os.cpu_count() or 1
        console = Console(stderr=True)
        with ThreadPoolExecutor(workers) as pool:  # decoding releases the lock
            found = pool.map(partial(shards.examine, min_side=cfg.min_side), files)
            results = list(
                track(found, "examining", total=len(files), console=console, disable=not console.is_terminal)
            )
        photos, refused = shards.without_duplicates(results)
        if not photos:
            reasons = "\n".join(f"  {r.path}: {r.reason}" for r in refused[:20])
            raise DataError(
                f"{cfg.source}: none of {len(files)} files is a usable image; the first refusals:\n{reasons}"
            )
        splits = shards.split_photos(photos, cfg.validation_share)
        metrics = {
            "train_images": len(splits["train"]),
            "valid_images": len(splits["valid"]),
            "refused_files": len(refused),
            "bytes": sum(p.size for p in photos),
        }
        manifest = runs.manifest("shards", cfg, runs.inputs(), metrics, tracker.run_id)
        tracker.log(0, metrics)
        tracker.artifact(
            artifacts.publish(
                folder / "artifact",
                manifest,
                lambda scratch: shards.write(scratch, splits, refused, int(cfg.shard_mb * 1e6), workers),
            )
        )
    print(f"{len(splits['train'])} training and {len(splits['valid'])} validation images, {len(refused)} files refused")
    for refusal in refused[:10]:
        print(f"  refused {refusal.path}: {refusal.reason}")
    if len(refused) > 10:
        print(f"  ... and {len(refused) - 10} more in {folder / 'artifact' / 'index.json'}")
    return folder / "artifact"
