"""Turns images from anywhere into WebDataset tars with an index.

Two passes, each in chunks that can be done anywhere and again: every image is examined; then shards are planned, which
depends on nothing but the images, and written. Finished chunks are kept in `work/`, so a killed job resumes.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from pipeline import config
from pipeline.artifacts import ownership, run_folder
from pipeline.artifacts.artifact import publish
from pipeline.data.shards import SPLITS
from pipeline.errors import DataError
from pipeline.log import logger
from pipeline.sharding import card, listing, writer
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.filters import NameLists, described
from pipeline.sharding.listing import Listing
from pipeline.sharding.passes import examine_chunks, examined, examined_file, write_shards
from pipeline.sharding.plan import plan_shards, refused
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
            if done := _finished(cfg, folder):
                return f"already done: {done}"
            run_folder.claim(folder, cfg, run_folder.NO_INPUTS)
            listing.write(work, found)
        return f"listed {Listing(work, cfg.chunk_size).num_items} files"
    if not disk.wait_for_file(work / listing.FILE):
        raise DataError(f"{folder}: its files have not been listed; run the part `list` first")
    listed = Listing(work, cfg.chunk_size)
    chunks = listed.num_chunks
    if what == "examine":
        examine_chunks(cfg, listed, work, range(number, chunks, count))
        return f"examined chunks {number}, {number + count}, ... of {chunks}"
    if not all(disk.wait_for_file(examined_file(work, chunk)) for chunk in range(chunks)):
        raise DataError(f"{folder}: not all of its {chunks} chunks have been examined; run those parts first")
    plans, _ = plan_shards(cfg, examined(cfg, listed, work), work)
    write_shards(cfg, plans, work, range(number, len(plans), count))
    return f"wrote shards {number}, {number + count}, ... of {len(plans)}"


def _found(cfg: StageConfig, work: Path) -> BinaryIO | None:
    """What the sources hold, unless that has been written down; reads the lists of excluded images, too."""
    NameLists.of(cfg)
    return None if (work / listing.FILE).exists() else listing.found(cfg.sources(), work)


def _finished(cfg: StageConfig, folder: Path) -> Path | None:
    done = run_folder.finished(folder, cfg)
    if done:
        # A job was killed after it had published
        shutil.rmtree(folder / "work", ignore_errors=True)
    return done


def _shard(cfg: StageConfig, folder: Path, work: Path, tracker: Tracker, still_ours: Callable[[], None]) -> None:
    """Both passes over the listed items, and the publication."""
    listed = Listing(work, cfg.chunk_size)
    examine_chunks(cfg, listed, work, range(listed.num_chunks))
    plans, summary = plan_shards(cfg, examined(cfg, listed, work), work)
    written = write_shards(cfg, plans, work, range(len(plans)))
    images = {split: summary.splits[split].images for split in SPLITS}
    metrics = {
        **{f"{split}_images": images[split] for split in SPLITS},
        "refused_files": summary.refused,
        "bytes": sum(shard.bytes for shard in written),
    }
    manifest = run_folder.manifest("shards", cfg, run_folder.NO_INPUTS, metrics, tracker.run_id)
    tracker.log(0, metrics)
    index = {
        "splits": {split: [asdict(s) for s in written if s.file.startswith(split)] for split in SPLITS},
        "sources": summary.sources,
    }

    def assemble(scratch: Path) -> None:
        writer.assemble(work / "shards", written, index, refused(work), scratch)
        deciding = {key: value for key, value in manifest.config.items() if key not in config.changeable(cfg)}
        card.write(scratch, ", ".join(s.name for s in cfg.sources()), summary, written, refused(work), deciding)

    made = publish(folder / "artifact", manifest, assemble, still_ours)
    tracker.artifact(made)
    tracker.dataset(folder.name, made, "sharded")
    print(f"data card: {folder / 'artifact' / 'card.html'}")
    counts = " and ".join(f"{images[split]} {split}" for split in SPLITS if images[split])
    print(f"{counts} images in {len(written)} shards, {summary.refused} files refused")
    for refusal in islice(refused(work), 10):
        print(f"  refused {described(refusal)}")
    if summary.refused > 10:
        print(f"  ... and {summary.refused - 10} more in {folder / 'artifact' / 'index.json'}")
    _warn_of_few(cfg, images["valid"])


def _warn_of_few(cfg: StageConfig, count: int) -> None:
    """Warns of too few validation images, unless none were requested."""
    wanted = cfg.validation_fraction > 0 or any(source.split == "valid" for source in cfg.sources())
    if wanted and count < MIN_VALIDATION_IMAGES:
        logger.warning(
            f"{count} validation image(s), too few to evaluate a codec on; shard more images, "
            f"or raise validation_fraction ({cfg.validation_fraction:g}) in another run="
        )
