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
from pipeline.data.loader import BatchShard, LoaderConfig
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
    """Megabytes a second through the whole stage, by number of workers; and what bounds it: the machine, and Amdahl's law."""
    size = sum(file.stat().st_size for file in files) / 1e6
    many, copies = folder / f"many{long}", max(1, 2000 // len(files)) if long < 1000 else 10
    for half in range(2):
        (many / str(half)).mkdir(parents=True)
    for copy in range(copies):  # different bytes after the end of the image, so that none is a duplicate
        for file in files:
            (many / str(copy % 2) / f"{copy}-{file.name}").write_bytes(file.read_bytes() + bytes([copy]))
    rate = {}
    for on, workers in (("threads", 1), ("threads", CORES), ("processes", CORES), ("ray", CORES)):
        cfg = shard_config(many, num_workers=workers, backend=on)
        if on == "ray":  # started beforehand: its ten seconds would be most of what is measured
            ray.init("local", num_cpus=CORES, include_dashboard=False, logging_level=logging.ERROR)
            ray.get([ray.remote(_decode).remote(files[0].read_bytes()) for _ in range(4 * CORES)])
        taken = seconds(lambda cfg=cfg: shard.run(cfg, folder / "sharding"))
        shutil.rmtree(folder / "sharding")
        rate[f"{workers} {on}"] = copies * size / taken
    ray.shutdown()
    rate["two jobs of one thread, half of it each"] = copies * size / two_jobs(many, folder / "halves")
    for name, value in islice(rate.items(), 1, None):
        yield Row(f"sharding JPEG, {long} long, {name}", value, "MB/s", rate["1 threads"], "one thread")
    share = serial_share(many / "0", many, folder / "sharding")
    yield Row(f"sharding JPEG, {long} long, CPU time of each further image in the main thread", 100 * share, "%")
    yield Row(f"sharding JPEG, {long} long, two real cores by Amdahl's law", 1 / (share + (1 - share) / 2), "times")
    shutil.rmtree(many)


def shard_config(source: Path, **options: object) -> StageConfig:
    return StageConfig(**{"source": str(source), "min_side": 64, "shard_mb": 20, "chunk_size": 64} | options)


def two_jobs(many: Path, folder: Path) -> float:
    """Seconds for two independent processes that shard a half each: what two workers could reach here at best."""
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    few = folder / "few"
    few.mkdir(parents=True)
    for file in sorted((many / "0").iterdir())[:20]:
        shutil.copy(file, few)
    jobs = [context.Process(target=job, args=(many / str(half), few, folder / str(half), gate)) for half in range(2)]
    for process in jobs:
        process.start()
    gate.wait()
    taken = seconds(lambda: [process.join() for process in jobs])
    shutil.rmtree(folder)
    return taken


def job(source: Path, few: Path, folder: Path, gate: threading.Barrier) -> None:
    # What is imported and set up once, since the run of one thread has it behind it, too
    shard.run(shard_config(few, num_workers=1, backend="threads"), folder.with_suffix(".few"))
    gate.wait()
    shard.run(shard_config(source, num_workers=1, backend="threads"), folder)


def serial_share(half: Path, whole: Path, folder: Path) -> float:
    """Of the CPU time that a further image takes, the fraction that the main thread does, and so no second worker.

    The difference of two runs: what a run takes whatever its size, such as the data card, is left out.
    """
    serial, total = [], []
    for source in (half, whole):
        main, process = time.thread_time(), time.process_time()
        shard.run(shard_config(source, num_workers=1, backend="threads"), folder)
        serial.append(time.thread_time() - main)
        total.append(time.process_time() - process)
        shutil.rmtree(folder)
    return (serial[1] - serial[0]) / (total[1] - total[0])
