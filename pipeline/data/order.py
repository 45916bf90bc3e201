"""The order of samples: a pure function of (seed, epoch, place), whatever the number of ranks and workers.

Every epoch visits all shards in a new random order, `shuffle_shards` at a time, and the samples of those in random order.
So a small data set is permuted as a whole, and of a large one only some shards are needed at any moment. Nothing grows
with the number of samples but the permutation of the current shards.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class SampleOrder:
    """The endless stream of sample numbers over shards with `counts` samples each."""

    def __init__(self, counts: Sequence[int], seed: int, shuffle_shards: int):
        self.seed, self.shuffle_shards = seed, shuffle_shards
        self._counts = np.asarray(counts, dtype=np.int64)
        self._starts = np.cumsum([0, *counts])
        self._plan = lru_cache(2)(self._new_plan)
        self._numbers = lru_cache(2)(self._new_numbers)

    def __len__(self) -> int:
        """Samples per epoch."""
        return int(self._starts[-1])

    def at(self, position: int) -> int:
        """The number of the sample at `position` of the stream: every number once per `len(self)` positions."""
        epoch, group = self.group_at(position)
        return int(self._numbers(epoch, group)[position - epoch * len(self) - int(self._plan(epoch)[1][group])])

    def group_at(self, position: int) -> tuple[int, int]:
        """The epoch, and the group of shards that `position` falls into."""
        epoch, place = divmod(position, len(self))
        return epoch, int(np.searchsorted(self._plan(epoch)[1], place, side="right")) - 1

    def group_after(self, epoch: int, group: int) -> tuple[int, int]:
        """The group that follows."""
        return (epoch, group + 1) if group + 1 < len(self._plan(epoch)[1]) else (epoch + 1, 0)

    def shards_of(self, epoch: int, group: int) -> list[int]:
        """The shards that are read together."""
        return self._plan(epoch)[0][group * self.shuffle_shards : (group + 1) * self.shuffle_shards].tolist()

    def _new_plan(self, epoch: int) -> tuple[Numbers, Numbers]:
        """The shards in this epoch's order, and the place at which each group of them begins."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._counts))
        starts = np.concatenate([[0], np.cumsum(self._counts[order])])
        return order, starts[: -1 : self.shuffle_shards]

    def _new_numbers(self, epoch: int, group: int) -> Numbers:
        """The sample numbers of a group, in order."""
        shards = self.shards_of(epoch, group)
        numbers = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return np.random.default_rng([self.seed, epoch, group]).permutation(numbers)
