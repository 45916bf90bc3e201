import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import loader, transforms
from pipeline.data.batch import BatchShard, positions
from pipeline.data.loader import LoaderConfig
from pipeline.data.order import PartedOrder, SampleOrder
from pipeline.data.reader import ShardReader
from pipeline.data.windows import Window
from pipeline.errors import DataError
from tests.conftest import ROOT, write_images
from tests.data.test_shards import make


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda c: sum(c) > 0),
    seed=st.integers(0, 2**31),
    mixed=st.integers(1, 14),
    epoch=st.integers(0, 5),
)
def test_every_sample_comes_once_per_epoch(counts, seed, mixed, epoch):
    order = SampleOrder(counts, seed, mixed)
    first = epoch * len(order)
    assert sorted(order.at(first + i) for i in range(len(order))) == list(range(sum(counts)))
    again = SampleOrder(counts, seed, mixed)  # a position alone is enough: nothing before it was asked for
    assert again.at(first + len(order) - 1) == order.at(first + len(order) - 1)


@settings(max_examples=40)
@given(ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), start=st.integers(0, 40), steps=st.integers(1, 5))
def test_ranks_divide_every_global_batch(ranks, start, steps):
    streams = [positions(BatchShard.of(12, rank, ranks), 12 * start) for rank in range(ranks)]
    taken = [position for _ in range(steps) for stream in streams for position in next(stream)]
    assert taken == list(range(12 * start, 12 * (start + steps)))


@pytest.mark.parametrize("mixed", [1, 8, 1000])
def test_the_order_has_nothing_to_do_with_that_of_the_shards(mixed):
    order = SampleOrder([40] * 100, 5, mixed)
    for epoch in (0, 1):
        numbers = [order.at(epoch * 4000 + i) for i in range(4000)]
        shard_of = np.asarray(numbers) // 40
        assert abs(np.corrcoef(shard_of, range(4000))[0, 1]) < 0.2  # of 100 shards in random order: deviation 0.1
        neighbours = np.mean(np.abs(np.diff(numbers)) == 1)
        assert neighbours < 0.06  # within one shard of 40: 2 / 40


def test_only_the_mixed_shards_are_needed_at_a_time():
    order = SampleOrder([10] * 20, 3, 4)
    for group in range(5):
        numbers = {order.at(group * 40 + i) // 10 for i in range(40)}
        assert numbers == set(order.shards_of(0, group))
        assert len(numbers) == 4


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        [SampleOrder([50], seed, 64).at(epoch * 50 + i) for i in range(50)] for seed in (1, 2) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_position_far_away_costs_nothing_to_find():
    order = SampleOrder([2500] * 40_000, 0, 64)  # a hundred million samples
    assert 0 <= order.at(7 * len(order) + 123_456_789 % len(order)) < 100_000_000
    assert order._numbers.cache_info().currsize == 1


def numbers_at(order: PartedOrder, positions) -> list[int]:
    return [stream.at(place) for stream, place in map(order.locate, positions)]


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 9), min_size=3, max_size=12),
    parts=st.sampled_from([1, 2, 3]),
    each=st.integers(1, 4),
    mixed=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_each_part_of_a_batch_has_every_sample_of_its_shards_once_per_epoch(counts, parts, each, mixed, epoch):
    order = PartedOrder(counts, 7, mixed, parts, parts * each)
    starts = np.cumsum([0, *counts])
    for part in range(parts):
        mine = [n for s in range(part, len(counts), parts) for n in range(starts[s], starts[s + 1])]
        # the stream of a part, place by place: `each` of them in every batch
        batches = [divmod(place, each) for place in range(epoch * len(mine), (epoch + 1) * len(mine))]
        places = [batch * parts * each + part * each + rest for batch, rest in batches]
        assert sorted(numbers_at(order, places)) == mine
        assert [order.streams[part].nth(place) for place in range(len(mine))] == mine


def test_one_part_is_the_order_of_all_shards():
    alone, parted = SampleOrder([5, 0, 7], 3, 2), PartedOrder([5, 0, 7], 3, 2, 1, 4)
    assert numbers_at(parted, range(30)) == [alone.at(position) for position in range(30)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    return make(write_images(folder / "photos", 10), folder / "artifact", shard_mb=0.06)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
    workers=st.integers(0, 5),
    mixed=st.integers(1, 6),
    start=st.integers(0, 5),
    parts=st.sampled_from([1, 2, 3]),
    decoded_cache_mb=st.sampled_from([0, 1]),
)
def test_crops_depend_on_seed_and_position_alone(shards, ranks, workers, mixed, start, parts, decoded_cache_mb):
    def stream(ranks: int, rank: int, workers: int, decoded_cache_mb: int) -> list[np.ndarray]:
        cfg = LoaderConfig(
            shards="",
            batch_size=12,
            crop_size=64,
            num_workers=workers,
            shuffle_shards=mixed,
            shard_parts=parts,
            decoded_cache_mb=decoded_cache_mb,
            downscale_prob=0.5,
        )
        batches = loader.batches(cfg, ShardReader(shards, "train"), 11, BatchShard.of(12, rank, ranks), 12 * start)
        return [batch.x.numpy() for batch in itertools.islice(batches, 3)]

    alone = stream(1, 0, 0, 0)
    together = [stream(ranks, rank, workers, decoded_cache_mb) for rank in range(ranks)]
    for step, whole in enumerate(alone):
        assert np.array_equal(whole, np.concatenate([parts[step] for parts in together]))


def test_an_unreadable_sample_is_replaced_by_one_of_its_part(tmp_path):
    made = make(write_images(tmp_path / "photos", 10), tmp_path / "artifact", shard_mb=0.06)
    reader = ShardReader(made, "train")
    for shard in reader.shards[::2]:
        tar = reader.folder / shard.file
        tar.chmod(0o644)
        tar.write_bytes(bytes(shard.bytes))
    cfg = LoaderConfig(shards="x", batch_size=2, crop_size=64, shard_parts=2)
    # the first part has no readable sample; one of the other part would do if it were asked for
    with pytest.raises(DataError, match="unreadable samples"):
        next(loader.batches(cfg, reader, 0, BatchShard.of(2, 0, 2), 0))
    next(loader.batches(cfg, reader, 0, BatchShard.of(2, 1, 2), 0))


def test_more_parts_than_shards_are_refused(shards):
    cfg = LoaderConfig(shards="x", batch_size=40, crop_size=64, shard_parts=40)
    with pytest.raises(DataError, match=r"data.shard_parts is 40, but the training images are in \d shard"):
        next(loader.batches(cfg, ShardReader(shards, "train"), 0, BatchShard.of(40, 0, 1), 0))
    with pytest.raises(ValueError, match=r"data.batch_size is 6, expected a multiple of data.shard_parts, 4"):
        LoaderConfig(shards="x", batch_size=6, shard_parts=4)


def test_scaled_crops_are_those_of_torchvision(shards):
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    pixels = ShardReader(shards, "train").pixels(0)
    window = Window(20, 31, 150, 110)
    theirs = resized_crop(torch.from_numpy(pixels).permute(2, 0, 1), *window, [64, 64], InterpolationMode.BILINEAR)
    difference = transforms.scaled(window.of(pixels), 64).astype(int) - theirs.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 1  # bytes are rounded in between; floats are not
    assert np.array_equal(transforms.mirrored(pixels), pixels[:, ::-1])


def test_loading_starts_no_threads_besides_its_own(tmp_path):
    """Torch's own, one team per calling thread, would be hundreds on a large machine."""
    program = """
import os, sys, torch
from pipeline.data import loader
from pipeline.data.batch import BatchShard
from pipeline.data.reader import ShardReader
from pipeline.registry import resolve
torch.set_num_threads(8)
cfg = loader.LoaderConfig(shards="", batch_size=4, crop_size=256, num_workers=2)
reader = ShardReader(resolve.read(sys.argv[1], "shards"), "train")
before = len(os.listdir("/proc/self/task"))
batches = loader.batches(cfg, reader, 0, BatchShard(0, 4, 1), 0)
for _ in range(20):
    next(batches)
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""
    shards = make(write_images(tmp_path / "photos", suffix=".jpg"), tmp_path / "artifact")
    command = [sys.executable, "-c", program, shards.path.parent]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "2 8\n"


def test_images_scaled_down_first_keep_room_for_the_crop():
    rng = np.random.default_rng(0)
    scales = [transforms.random_scale(300, 500, 100, 1.0, rng) for _ in range(200)]
    assert 1 <= min(scales) < 1.2
    assert 2.7 < max(scales) <= 3  # 300 / 100
    assert {transforms.random_scale(300, 500, 100, 0.0, rng) for _ in range(9)} == {1.0}
    assert {transforms.random_scale(90, 500, 100, 1.0, rng) for _ in range(9)} == {1.0}
    assert transforms.shrink_for(Window(0, 0, 512, 600), 256) == 2
    assert transforms.shrink_for(Window(0, 0, 511, 600), 256) == 1
    assert transforms.shrink_for(Window(0, 0, 4096, 4096), 256) == 8
