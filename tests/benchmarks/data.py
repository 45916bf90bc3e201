"""Loading against what others do with the same images, and sharding.

IMAGES=folder holds photos, 2048 pixels long or more some of them; without it they are synthetic, which decode faster.
"""

import logging
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import ray
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.artifacts.artifact import Artifact
from pipeline.data import loader
from pipeline.data.batch import BatchShard
from pipeline.data.loader import LoaderConfig
from pipeline.data.reader import ShardReader
from pipeline.registry import resolve
from pipeline.stages import shard
from pipeline.stages.shard import StageConfig
from tests.benchmarks.measure import Row, seconds
from tests.conftest import picture

CORES = 2
BATCH = 16
ROUNDS = 5
TICK = os.sysconf("SC_CLK_TCK")
AUGMENT = transforms.Compose(
    [
        transforms.RandomChoice(
            [
                transforms.RandomCrop(256, pad_if_needed=True, padding_mode="reflect"),
                transforms.RandomResizedCrop(256),
            ]
        ),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
)


def rows() -> Iterator[Row]:
    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for long, count, batches in ((500, 200, 40), (2048, 30, 6)):
            files = photos(folder / str(long), long, count)
            yield from loading(folder, files, long, batches)
            yield from sharding(folder, files, long)


def photos(folder: Path, long: int, count: int) -> list[Path]:
    """`count` JPEG files whose longer side is `long`."""
    folder.mkdir()
    given = sorted(p for p in Path(os.environ["IMAGES"]).rglob("*") if p.is_file()) if "IMAGES" in os.environ else []
    made: list[Path] = []
    for number in range(100 * count):
        if len(made) == count or (given and number == len(given)):
            break
        image = Image.open(given[number]) if given else Image.fromarray(picture(number, 3 * long // 4, long))
        if max(image.size) < long:
            continue
        scale = long / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        made.append(folder / f"{number:05d}.jpg")
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(made[-1], quality=90)
    return made


def loading(folder: Path, files: list[Path], long: int, batches: int) -> Iterator[Row]:
    """Crops a second, and CPU time per crop, of our loader and three others, in turn."""
    cfg = StageConfig(source=str(files[0].parent), min_side=64, validation_fraction=0, duplicate_distance=None)
    made = resolve.read(str(shard.run(cfg, folder / f"shards{long}")), "shards")
    contents = [file.read_bytes() for file in files]
    contenders: dict[str, Callable[[], Iterator[object]]] = {
        "ours": lambda: ours(made),
        "decoding alone (simplejpeg, threads)": lambda: decoding(contents),
        "files, Pillow, torchvision, DataLoader": lambda: files_and_dataloader(files),
        "webdataset, Pillow, torchvision, WebLoader": lambda: webdataset(made),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, start in contenders.items():
            rate, cost = measured(start(), batches)
            rates[name].append(rate)
            costs[name].append(cost)
    mine, my_cost = statistics.median(rates.pop("ours")), statistics.median(costs.pop("ours"))
    for name, values in rates.items():
        yield Row(f"loading JPEG, {long} long", mine, "crops /s", statistics.median(values), name)
    for name in rates:
        yield Row(f"CPU time to load JPEG, {long} long", my_cost, "ms / crop", statistics.median(costs[name]), name)


def measured(batches: Iterator[object], count: int) -> tuple[float, float]:
    """Crops per second, and milliseconds of CPU per crop, workers included."""
    for _ in islice(batches, 5):
        pass
    before, started = cpu_seconds(), time.perf_counter()
    for _ in islice(batches, count):
        pass
    taken, used = time.perf_counter() - started, cpu_seconds() - before
    del batches
    return count * BATCH / taken, 1000 * used / (count * BATCH)


def cpu_seconds() -> float:
    """Of this process and the ones it started that still run."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def ours(made: Artifact) -> Iterator[object]:
    cfg = LoaderConfig(shards="", batch_size=BATCH, num_workers=CORES)
    return loader.batches(cfg, ShardReader(made, "train"), random.randrange(2**31), BatchShard(0, BATCH, 1), 0)


def decoding(contents: list[bytes]) -> Iterator[object]:
    """The bound: whole images decoded and thrown away."""
    stream = cycle(contents)
    with ThreadPoolExecutor(CORES) as pool:
        while True:
            yield [None for _ in pool.map(_decode, list(islice(stream, BATCH)))]


def _decode(content: bytes) -> None:
    simplejpeg.decode_jpeg(content)


class Files(Dataset[torch.Tensor]):
    """The published implementation's way: a file per image."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.files[number % len(self.files)]) as image:
            return AUGMENT(image.convert("RGB"))


def files_and_dataloader(files: list[Path]) -> Iterator[object]:
    return iter(DataLoader(Files(files), BATCH, shuffle=True, num_workers=CORES))


def webdataset(made: Artifact) -> Iterator[object]:
    tars = [str(path) for path in sorted(made.path.glob("train-*.tar"))]
    samples = wds.WebDataset(cycle_of(tars), shardshuffle=False, nodesplitter=None, workersplitter=None)
    decoded = samples.shuffle(200).decode("pil").to_tuple("jpg").map_tuple(AUGMENT).batched(BATCH)
    return iter(wds.WebLoader(decoded, batch_size=None, num_workers=CORES))


def cycle_of(tars: list[str]) -> list[str]:
    return tars * 1000


def sharding(folder: Path, files: list[Path], long: int) -> Iterator[Row]:
    """Megabytes of further images a second through the whole stage, by number of workers.

    Each figure is the difference of a run with few images and one with many. What a run takes whatever its size, such as the data
    card and starting processes, is left out: it is most of a run of seconds, and nothing of one of hours.
    """
    few, many = folder / f"few{long}", folder / f"many{long}"
    copies = 20
    size = copies * sum(file.stat().st_size for file in files) / 1e6
    # Each in two halves, for two jobs
    for copy in range(-copies // 5, copies):
        half = (few if copy < 0 else many) / str(copy % 2)
        half.mkdir(parents=True, exist_ok=True)
        for file in files:
            # Different bytes after the end of the image, so that none is a duplicate
            (half / f"{copy}-{file.name}").write_bytes(file.read_bytes() + bytes([copy % 256]))
    shutil.copytree(few, many, dirs_exist_ok=True)
    contenders: dict[str, Callable[[Path], float]] = {
        "one thread": lambda source: job(source, folder, "threads", 1),
        f"{CORES} threads": lambda source: job(source, folder, "threads", CORES),
        f"{CORES} processes": lambda source: job(source, folder, "processes", CORES),
        f"{CORES} ray": lambda source: on_ray(source, folder, files[0]),
        "two jobs of one thread, half of it each": lambda source: two_jobs(source, few, folder),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(3):
        for name, taken in contenders.items():
            rates[name].append(size / (taken(many) - taken(few)))
    one = statistics.median(rates.pop("one thread"))
    for name, values in rates.items():
        yield Row(f"sharding JPEG, {long} long, {name}", statistics.median(values), "MB/s", one, "one thread")
    shutil.rmtree(few)
    shutil.rmtree(many)


def job(source: Path, folder: Path, on: str, workers: int) -> float:
    """Seconds of one run."""
    out = folder / "sharding"
    # Forty chunks, so that what one worker does while others have no more to do is little
    chunk = max(1, len(list(source.rglob("*.jpg"))) // 40)
    cfg = StageConfig(source=str(source), min_side=64, shard_mb=10, chunk_size=chunk, backend=on, num_workers=workers)
    taken = seconds(lambda: shard.run(cfg, out))
    shutil.rmtree(out)
    return taken


def on_ray(source: Path, folder: Path, file: Path) -> float:
    """Seconds of one run on a Ray that was started beforehand."""
    ray.init("local", num_cpus=CORES, include_dashboard=False, logging_level=logging.ERROR)
    ray.get([ray.remote(_decode).remote(file.read_bytes()) for _ in range(4 * CORES)])
    taken = job(source, folder, "ray", CORES)
    ray.shutdown()
    return taken


def two_jobs(source: Path, few: Path, folder: Path) -> float:
    """Seconds for two independent processes that shard a half each: what two workers could reach here at best."""
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    jobs = [
        context.Process(target=gated_job, args=(source / str(half), few / str(half), folder / str(half), gate))
        for half in range(2)
    ]
    for process in jobs:
        process.start()
    gate.wait()
    return seconds(lambda: [process.join() for process in jobs])


def gated_job(source: Path, few: Path, folder: Path, gate: threading.Barrier) -> None:
    # What is imported and set up once, since the run of one thread has it behind it, too
    job(few, folder, "threads", 1)
    gate.wait()
    job(source, folder, "threads", 1)
