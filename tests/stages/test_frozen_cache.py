"""Labels and latents of fixed crops are computed once."""

import pytest
import torch

from pipeline.config import load
from pipeline.errors import ConfigError
from pipeline.stages import gan
from pipeline.stages.gan import FrozenOutputCache, FrozenOutputs
from tests.conftest import CONFIGS

CPU = torch.device("cpu")


def seen(*images: int) -> FrozenOutputs:
    """Recognisable values for each image."""
    values = torch.tensor([float(i) for i in images])
    return FrozenOutputs(
        labels=values.long().view(-1, 1, 1).expand(-1, 8, 8),
        y_hat=values.view(-1, 1, 1, 1).expand(-1, 6, 4, 4).contiguous(memory_format=torch.channels_last),
        bits=values,
    )


def test_what_was_seen_comes_back_in_any_order_and_mixture():
    cache = FrozenOutputCache(10**6)
    cache.put([1, 2], seen(1, 2))
    cache.put([3, 4], seen(3, 4))
    found = cache.get([4, 1], CPU)
    expected = seen(4, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found.labels.dtype == torch.int64
    assert found.y_hat.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_of_which_something_is_missing_is_computed_whole():
    cache = FrozenOutputCache(10**6)
    cache.put([1, 2], seen(1, 2))
    assert cache.get([1, 5], CPU) is None


def test_without_room_nothing_is_kept_and_a_full_cache_grows_no_more():
    none = FrozenOutputCache(0)
    none.put([1], seen(1))
    assert none.get([1], CPU) is None
    one = sum(value.nbytes for value in seen(1)) - 8 * 8 * 4  # labels are kept in four bytes, not eight
    small = FrozenOutputCache(2 * one)
    for i in range(5):
        small.put([i], seen(i))
    assert len(small.rows) == 2
    assert small.get([0, 1], CPU) is not None


def test_a_cache_needs_crops_that_come_again():
    with pytest.raises(ConfigError, match="frozen_cache_mb needs"):
        load(gan.StageConfig, CONFIGS / "gan.yaml", ["frozen_cache_mb=10"])
