"""An evaluation's images spread over processes; each image's result is kept until all are there."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from pipeline.bitstream.codec import ImageCodec
from pipeline.evaluation import instruments
from pipeline.evaluation.anchors import Anchor
from pipeline.evaluation.evaluator import Bench, ImageResult, Results, shown
from pipeline.evaluation.frechet import Features
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.measurement import Measurement
from pipeline.processes.pool import Backend, map_chunks

# Images that make another process worth its start, in which it imports torch and loads the codecs
IMAGES_PER_PROCESS = 4
MAX_PROCESSES = 16


@dataclass(frozen=True)
class Work:
    """Measures an image by its number and writes `folder/NUMBER/`; done before, it does nothing.

    codecs: name -> artifact's name. threads: of each process; 0: as they are. metrics: their names.
    """

    codecs: tuple[tuple[str, str], ...]
    others: tuple[Anchor, ...]
    images: str
    limit: int
    folder: str
    threads: int
    metrics: tuple[str, ...]

    def __call__(self, number: int) -> None:
        place = Path(self.folder) / f"{number:06d}"
        if place.is_dir():
            return
        bench, images = _prepared(self)
        scratch = place.with_suffix(f".{os.getpid()}.tmp")
        image, pixels = images[number]
        try:
            write(scratch, bench.run(image, pixels, scratch))
            scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@lru_cache(1)
def _prepared(work: Work) -> tuple[Bench, HeldOut]:
    """What each process sets up once."""
    if work.threads:
        torch.set_num_threads(work.threads)
    codecs = {name: ImageCodec.load(source, instruments.device()) for name, source in work.codecs}
    return Bench(codecs, work.others, work.metrics), HeldOut(work.images, work.limit)


def num_processes(wanted: int | None, num_images: int) -> int:
    """wanted: as configured; None: as many as there are cores and images for, one where there is a GPU."""
    if wanted is not None:
        return wanted
    if torch.cuda.is_available():
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), num_images // IMAGES_PER_PROCESS, MAX_PROCESSES))


def measure(work: Work, num_images: int, processes: int) -> Results:
    """What all images give, in their order; those that an interrupted run has measured are not measured again.

    Raises: BitstreamError naming every image whose file does not hold what was encoded.
    """
    Path(work.folder).mkdir(parents=True, exist_ok=True)
    on: Backend = "processes" if processes > 1 else "threads"
    for _ in shown(map_chunks(work, range(num_images), processes, on=on), num_images):
        pass
    results = Results([*(name for name, _ in work.codecs), *work.others])
    for place in places(work, num_images):
        results.add(read(place))
    try:
        results.check(num_images * len(work.codecs))
    except Exception:
        # so that the next attempt measures again
        shutil.rmtree(work.folder)
        raise
    return results


def collect(work: Work, num_images: int, into: Path) -> None:
    """Puts the images' `files/` and `reconstructions/` together in one folder."""
    for place in places(work, num_images):
        for part in ("files", "reconstructions"):
            shutil.copytree(place / part, into / part, dirs_exist_ok=True)


def places(work: Work, num_images: int) -> Iterator[Path]:
    return (Path(work.folder) / f"{number:06d}" for number in range(num_images))


def write(folder: Path, result: ImageResult) -> None:
    measured = {"measurements": [asdict(m) for m in result.measurements], "failures": result.failures}
    (folder / "result.json").write_text(json.dumps(measured), encoding="utf-8")
    arrays = {f"{model}|{kind}": f for model, kinds in result.features.items() for kind, f in kinds.items()}
    np.savez(folder / "features.npz", **arrays)


def read(folder: Path) -> ImageResult:
    measured = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = [Measurement(**row) for row in measured["measurements"]]
    features: dict[str, dict[str, Features]] = {model: {} for model in ["original", *(row.model for row in rows)]}
    with np.load(folder / "features.npz", allow_pickle=False) as arrays:
        for name in arrays.files:
            model, _, kind = name.rpartition("|")
            features[model][kind] = arrays[name]
    return ImageResult(rows, features, measured["failures"])


def threads(processes: int) -> int:
    """Threads of each of some processes; 0: as they are."""
    return 0 if processes == 1 else max(1, len(os.sched_getaffinity(0)) // processes)
