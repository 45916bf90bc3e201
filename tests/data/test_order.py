import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import Share, positions
from pipeline.data.order import Order


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda c: sum(c) > 0),
    seed=st.integers(0, 2**31),
    mixed=st.integers(1, 14),
    epoch=st.integers(0, 5),
)
def test_every_sample_comes_once_per_epoch(counts, seed, mixed, epoch):
    order = Order(counts, seed, mixed)
    first = epoch * len(order)
    assert sorted(order.at(first + i) for i in range(len(order))) == list(range(sum(counts)))
    again = Order(counts, seed, mixed)  # a position alone is enough: nothing before it was asked for
    assert again.at(first + len(order) - 1) == order.at(first + len(order) - 1)


@settings(max_examples=40, deadline=None)
@given(ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), start=st.integers(0, 40), steps=st.integers(1, 5))
def test_ranks_divide_every_global_batch(ranks, start, steps):
    streams = [positions(Share.of(12, rank, ranks), 12 * start) for rank in range(ranks)]
    taken = [position for _ in range(steps) for stream in streams for position in next(stream)]
    assert taken == list(range(12 * start, 12 * (start + steps)))


@pytest.mark.parametrize("mixed", [1, 8, 1000])
def test_the_order_has_nothing_to_do_with_that_of_the_shards(mixed):
    order = Order([40] * 100, 5, mixed)
    for epoch in (0, 1):
        numbers = [order.at(epoch * 4000 + i) for i in range(4000)]
        shard_of = np.asarray(numbers) // 40
        assert abs(np.corrcoef(shard_of, range(4000))[0, 1]) < 0.2  # of 100 shards in random order: deviation 0.1
        neighbours = np.mean(np.abs(np.diff(numbers)) == 1)
        assert neighbours < 0.06  # within one shard of 40: 2 / 40


def test_only_the_mixed_shards_are_needed_at_a_time():
    order = Order([10] * 20, 3, 4)
    for group in range(5):
        numbers = {order.at(group * 40 + i) // 10 for i in range(40)}
        assert numbers == set(order.shards_of(0, group))
        assert len(numbers) == 4


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [[Order([50], seed, 64).at(epoch * 50 + i) for i in range(50)] for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_position_far_away_costs_nothing_to_find():
    order = Order([2500] * 40_000, 0, 64)  # a hundred million samples
    assert 0 <= order.at(7 * len(order) + 123_456_789 % len(order)) < 100_000_000
    assert order._numbers.cache_info().currsize == 1
