"""Turns images from anywhere into WebDataset tars with an index.

Two passes, each in chunks that can be done anywhere and again: every image is examined; then shards are planned, which
depends on nothing but the images, and written. Finished chunks are kept in `work/`, so a killed job resumes.
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pipeline import config
from pipeline.artifacts import ownership, run_folder
from pipeline.artifacts.artifact import publish
from pipeline.data.shards import SPLITS
from pipeline.errors import DataError
from pipeline.log import logger
from pipeline.sharding import card, listing, writer
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import NameLists, described
from pipeline.sharding.items import Item
from pipeline.sharding.passes import check_fetched, examine_chunks, examined, examined_file, write_shards
from pipeline.sharding.plan import plan_shards
from pipeline.storage import disk
from pipeline.tracking.run import Tracker, tracked_run

# Validation images
MIN_VALIDATION_IMAGES = 10


class StageConfig(ShardConfig):
    """Which images become shards, and how."""

    stage: Literal["shard"] = "shard"


def run(cfg: StageConfig, folder: Path) -> Path:
    """Shards the sources and publishes tars, tables, index and data card."""
    work = folder / "work"
    if done := _finished(cfg, folder):
        return done
    found = _found(cfg, work)
    with ownership.held(folder) as still_ours:
        # A job that held the folder before may have finished the run
        if done := _finished(cfg, folder):
            return done
        run_folder.claim(folder, cfg, run_folder.NO_INPUTS)
        with tracked_run("shard", folder, cfg, run_folder.NO_INPUTS) as tracker:
            listing.write(work, found)
            _shard(cfg, folder, work, tracker, still_ours)
        # another start, which found the artifact, may be removing it, too
        shutil.rmtree(work, ignore_errors=True)
    return folder / "artifact"


def run_part(cfg: StageConfig, folder: Path, what: str, number: int = 0, count: int = 1) -> str:
    """The share of one of `count` jobs in a pass: first "list", then all of "examine", then all of "write", then `run`.

    Raises: DataError if the pass before has not been done.
    """
    work = folder / "work"
    if done := _finished(cfg, folder):
        return f"already done: {done}"
    if what == "list":
        found = _found(cfg, work)
        with ownership.held(folder):
            run_folder.claim(folder, cfg, run_folder.NO_INPUTS)
            listing.write(work, found)
        return f"listed {len(listing.read(work))} files"
    if not disk.wait_for_file(work / listing.FILE):
        raise DataError(f"{folder}: its files have not been listed; run the part `list` first")
    items = listing.read(work)
    chunks = math.ceil(len(items) / cfg.chunk_size)
    if what == "examine":
        examine_chunks(cfg, items, work, range(number, chunks, count))
        return f"examined chunks {number}, {number + count}, ... of {chunks}"
    if not all(disk.wait_for_file(examined_file(work, chunk)) for chunk in range(chunks)):
        raise DataError(f"{folder}: not all of its {chunks} chunks have been examined; run those parts first")
    plans, *_ = plan_shards(cfg, items, examined(cfg, items, work), work)
    write_shards(cfg, plans, work, range(number, len(plans), count))
    return f"wrote shards {number}, {number + count}, ... of {len(plans)}"


def _found(cfg: StageConfig, work: Path) -> list[Item]:
    """What the sources hold, unless that has been written down; reads the lists of excluded images, too."""
    NameLists.of(cfg)
    return [] if (work / listing.FILE).exists() else listing.found(cfg.sources())


def _finished(cfg: StageConfig, folder: Path) -> Path | None:
    done = run_folder.finished(folder, cfg)
    if done:
        # A job was killed after it had published
        shutil.rmtree(folder / "work", ignore_errors=True)
    return done


def _shard(cfg: StageConfig, folder: Path, work: Path, tracker: Tracker, still_ours: Callable[[], None]) -> None:
    """Both passes over the listed items, and the publication."""
    items = listing.read(work)
    results = examined(cfg, items, work)
    check_fetched(cfg, items, results, work)
    plans, photos, splits, refused = plan_shards(cfg, items, results, work)
    written = write_shards(cfg, plans, work, range(len(plans)))
    metrics = {
        **{f"{split}_images": len(splits[split]) for split in SPLITS},
        "refused_files": len(refused),
        "bytes": sum(shard.bytes for shard in written),
    }
    manifest = run_folder.manifest("shards", cfg, run_folder.NO_INPUTS, metrics, tracker.run_id)
    tracker.log(0, metrics)
    index = {
        "splits": {split: [asdict(s) for s in written if s.file.startswith(split)] for split in SPLITS},
        "sources": Counter(photo.dataset for photo in photos),
        "refused": [asdict(refusal) for refusal in refused],
    }

    def assemble(scratch: Path) -> None:
        writer.assemble(work / "shards", written, index, scratch)
        deciding = {key: value for key, value in manifest.config.items() if key not in config.changeable(cfg)}
        card.write(scratch, ", ".join(s.name for s in cfg.sources()), splits, written, refused, deciding)

    made = publish(folder / "artifact", manifest, assemble, still_ours)
    tracker.artifact(made)
    tracker.dataset(folder.name, made, "sharded")
    print(f"data card: {folder / 'artifact' / 'card.html'}")
    counts = " and ".join(f"{len(splits[split])} {split}" for split in SPLITS if splits[split])
    print(f"{counts} images in {len(written)} shards, {len(refused)} files refused")
    for refusal in refused[:10]:
        print(f"  refused {described(refusal)}")
    if len(refused) > 10:
        print(f"  ... and {len(refused) - 10} more in {folder / 'artifact' / 'index.json'}")
    _warn_of_few(cfg, len(splits["valid"]))


def _warn_of_few(cfg: StageConfig, count: int) -> None:
    """Warns of too few validation images, unless none were requested."""
    wanted = cfg.validation_fraction > 0 or any(source.split == "valid" for source in cfg.sources())
    if wanted and count < MIN_VALIDATION_IMAGES:
        logger.warning(
            f"{count} validation image(s), too few to evaluate a codec on; shard more images, "
            f"or raise validation_fraction ({cfg.validation_fraction:g}) in another run="
        )
