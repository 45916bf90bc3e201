"""Shards to batches. The sample at a position of the stream is a pure function of (seed, position), nothing else.

So the order does not depend on ranks or workers, and a run resumes by naming the next position. webdataset offers
neither, which is why training reads samples by index and not through its pipeline.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, NamedTuple

import numpy as np
import psutil
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline.config import Changeable, Config, Input
from pipeline.data import transforms
from pipeline.data.batch import Batch, BatchShard, positions
from pipeline.data.decoded_cache import DecodedCache
from pipeline.data.images import Pixels
from pipeline.data.order import PartedOrder, SampleOrder
from pipeline.data.reader import ShardReader
from pipeline.data.transforms import to_float
from pipeline.data.windows import Window, partial_decoder
from pipeline.errors import DataError, UnreachableError
from pipeline.log import ANY_RANK, logger


class LoaderConfig(Config):
    """Which shards, and how crops are drawn from them."""

    shards: Annotated[str, Input("shards")]
    """Artifact of kind "shards": a run folder or models:/ URI."""
    batch_size: PositiveInt
    """Crops per step, over all processes together."""
    crop_size: Annotated[int, Field(gt=0, multiple_of=64)] = 256
    """Side of a training crop in pixels."""
    random_resize_prob: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a crop is scaled from a random window of the image."""
    downscale_prob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that an image is scaled down first, which hides artifacts of its JPEG compression."""
    flip: bool = True
    """Mirror crops left-right with probability 1/2."""
    fixed_crops: bool = False
    """One crop per image, the same in every epoch, so that what is computed from it can be cached."""
    shuffle_shards: PositiveInt = 64
    """Number of shards whose samples are shuffled together; they have to be on disk at the same time."""
    shard_parts: PositiveInt = 1
    """Number of parts of the shards, for as many nodes: each fetches the remote shards of one part only. An image meets only those
    of its part in the shuffle, and data.batch_size becomes part of the order."""
    shard_cache_gb: Annotated[PositiveFloat, Changeable()] = 50.0
    """Space under $ILLM_CACHE for remote shards, in GB; best is twice the size of data.shuffle_shards shards."""
    num_workers: Annotated[NonNegativeInt, Changeable()] = 4
    """Number of threads that read and decode ahead; 0: load when the step asks for data."""
    decoded_cache_mb: Annotated[NonNegativeInt, Changeable()] = 0
    """Memory per training process for decoded images, in MB; for data sets that fit in memory."""
    num_validation_crops: PositiveInt = 64
    """Largest number of validation crops, spread evenly over the validation images."""
    validation_crop_size: Annotated[int, Field(gt=0, multiple_of=64)] | None = None
    """Side of a validation crop in pixels; null: data.crop_size."""
    max_bad_samples: NonNegativeInt = 100
    """Number of unreadable samples per training process after which the stage stops."""

    @model_validator(mode="after")
    def parts_divide_the_batch(self) -> "LoaderConfig":
        if self.batch_size % self.shard_parts:
            raise ValueError(
                f"data.batch_size is {self.batch_size}, expected a multiple of data.shard_parts, {self.shard_parts}"
            )
        return self


BATCHES_AHEAD = 4


def check_memory(cfg: LoaderConfig, share: BatchShard) -> None:
    """Raises: DataError if the pixels of the loaded batches, and of one in floats, are more than this machine has free."""
    needed = share.size * 3 * cfg.crop_size**2 * (BATCHES_AHEAD + 2 + 4)
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"data.batch_size is {share.size * share.ranks}: the {share.size} crops of {cfg.crop_size}x{cfg.crop_size} of each "
            f"process need {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free; lower data.batch_size or data.crop_size"
        )


class LoadedCrop(NamedTuple):
    """Where a crop stands in the stream, the image it was meant to come from, and what was unreadable on the way."""

    position: int
    image: int
    bad: list[str]
    # Some readable image
    found: bool


class Crops:
    """Position of the stream -> crop. Safe to use from several threads."""

    def __init__(self, cfg: LoaderConfig, reader: ShardReader, seed: int):
        self.cfg, self.reader, self.seed = cfg, reader, seed
        self.order = PartedOrder(reader.draws, seed, cfg.shuffle_shards, cfg.shard_parts, cfg.batch_size)
        if not all(map(len, self.order.streams)):
            raise DataError(
                f"data.shard_parts is {cfg.shard_parts}, but the training images are in {len(reader.shards)} shard(s); lower it, "
                "or make smaller shards (shard_mb)"
            )
        self.cache = DecodedCache(cfg.decoded_cache_mb * 2**20)
        # Before there are threads
        partial_decoder()
        # Of each stream: the group that was asked for last
        self._groups: dict[SampleOrder, tuple[int, int]] = {}

    def load(self, position: int, out: Pixels) -> LoadedCrop:
        """Writes the crop at `position` into `out` (crop, crop, 3)."""
        stream, place = self.order.locate(position)
        number = image = stream.at(place)
        rng = np.random.default_rng([self.seed, image, 0] if self.cfg.fixed_crops else [self.seed, position])
        bad: list[str] = []
        # An unreadable sample is replaced by a random other one of its part, the same in every run
        while len(bad) < 10:
            try:
                out[...] = self._crop(number, rng)
                return LoadedCrop(position, image, bad, True)
            except UnreachableError:
                # Another sample in its place would make training depend on network failures
                raise
            except DataError:
                bad.append(self.reader.name(number))
                number = stream.nth(int(rng.integers(len(stream))))
        return LoadedCrop(position, image, bad, False)

    def load_all(self, jobs: list[tuple[int, Pixels]]) -> list[LoadedCrop]:
        """`load` for each of several positions."""
        return [self.load(*job) for job in jobs]

    def look_ahead(self, positions: Sequence[int]) -> None:
        """Fetches the shards that are needed at these positions, which are in order, and the next ones, in the background."""
        firsts: dict[SampleOrder, int] = {}
        for stream, place in map(self.order.locate, positions):
            firsts.setdefault(stream, place)
        for stream, place in firsts.items():
            if (at := stream.group_at(place)) != self._groups.get(stream):
                self._groups[stream] = at
                for epoch, group in (at, stream.group_after(*at)):
                    self.reader.prepare(stream.shards_of(epoch, group))

    def _crop(self, number: int, rng: np.random.Generator) -> Pixels:
        sample, size = self.reader.sample(number)[1], self.cfg.crop_size
        if rng.random() < self.cfg.random_resize_prob:
            window, scale = transforms.random_window(sample.height, sample.width, rng), None
        else:
            scale = transforms.random_scale(sample.height, sample.width, size, self.cfg.downscale_prob, rng)
            window = transforms.random_square(sample.height, sample.width, round(size * scale), rng)
        if scale == 1:
            crop = transforms.pad_to(self._part(number, window, 1), size, size)
        else:
            shrink = transforms.shrink_for(window, size) if sample.plain_jpeg else 1
            crop = transforms.scaled(self._part(number, transforms.shrunk(window, shrink), shrink), size)
        return transforms.mirrored(crop) if self.cfg.flip and rng.random() < 0.5 else crop

    def _part(self, number: int, window: Window, shrink: int) -> Pixels:
        """What an image at 1 / shrink of its size shows in a window. Where images are kept, all of it is decoded."""
        if not self.cache.max_bytes:
            return self.reader.part(number, window, shrink)
        pixels = self.cache.get((number, shrink))
        if pixels is None:
            pixels = self.reader.pixels(number, shrink)
            self.cache.put((number, shrink), pixels)
        return window.of(pixels)


def batches(
    cfg: LoaderConfig, reader: ShardReader, seed: int, share: BatchShard, start: int, pinned: bool = False
) -> Iterator[Batch]:
    """Endless training batches of this process, beginning at position `start` of the stream; pixels in uint8.

    pinned: in page-locked memory, for asynchronous copies to a GPU.
    Raises: DataError if there is no training image, or more samples are unreadable than the config allows.
    """
    if not len(reader):
        raise DataError(f"{cfg.shards}: no training images in these shards")
    crops = Crops(cfg, reader, seed)
    all_bad: set[str] = set()
    for pixels, samples in _ahead(crops, positions(share, start), cfg.num_workers, pinned):
        for name in (name for sample in samples for name in sample.bad):
            if name not in all_bad:
                logger.warning(f"skipping unreadable sample {name}", extra=ANY_RANK)
                all_bad.add(name)
        if len(all_bad) > cfg.max_bad_samples or not all(sample.found for sample in samples):
            listed = "\n".join(f"  {name}" for name in sorted(all_bad)[:20])
            raise DataError(
                f"{len(all_bad)} unreadable samples (data.max_bad_samples={cfg.max_bad_samples}):\n{listed}"
            )
        x = pixels.permute(0, 3, 1, 2)
        yield Batch(x, [sample.position for sample in samples], [sample.image for sample in samples])


def _ahead(
    crops: Crops, batches: Iterator[list[int]], workers: int, pinned: bool
) -> Iterator[tuple[Tensor, list[LoadedCrop]]]:
    """The pixels (B, crop, crop, 3) uint8 and samples of each batch, in order; threads work on the next BATCHES_AHEAD.

    Threads and not processes: decoding and scaling release the interpreter's lock; nothing is copied between processes,
    a signal to the job reaches no helper, and no process is forked while other threads hold locks.
    """
    size = crops.cfg.crop_size
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="loader", initializer=_one_openmp_thread)
    waiting: deque[tuple[Tensor, list[Future[list[LoadedCrop]]]]] = deque()
    try:
        for batch in batches:
            crops.look_ahead(batch)
            pixels = torch.empty(len(batch), size, size, 3, dtype=torch.uint8, pin_memory=pinned)
            jobs = list(zip(batch, pixels.numpy(), strict=True))
            if not workers:
                yield pixels, crops.load_all(jobs)
                continue
            each = -(-len(jobs) // workers)
            parts = [jobs[at : at + each] for at in range(0, len(jobs), each)]
            waiting.append((pixels, [pool.submit(crops.load_all, part) for part in parts]))
            if len(waiting) > BATCHES_AHEAD:
                pixels, loading = waiting.popleft()
                yield pixels, [sample for part in loading for sample in part.result()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _one_openmp_thread() -> None:
    """Keeps torch from dividing this thread's scaling and flipping among as many threads as there are cores."""
    # Torch sets the number at its first use in a thread
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")


def validation_crops(cfg: LoaderConfig, reader: ShardReader) -> Tensor:
    """Crops of validation images without scaling: as many from each as needed, from its center or spread over it.

    Shapes: returns (N, 3, validation_crop_size, validation_crop_size) in [0, 1], N at most cfg.num_validation_crops.
    Raises: DataError if the shards have no validation image.
    """
    count = min(len(reader), cfg.num_validation_crops)
    if not count:
        raise DataError(
            f"{cfg.shards}: no validation images in these shards; raise validation_fraction of the shard stage"
        )
    each = cfg.num_validation_crops // count
    images = (reader.pixels(i) for i in range(count))
    size = cfg.validation_crop_size or cfg.crop_size
    return to_float(np.stack([crop for pixels in images for crop in transforms.spread_crops(pixels, size, each)]))
