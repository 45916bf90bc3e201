"""The order of samples: a pure function of the seed and the position in the stream, whatever the number of ranks and workers.

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
    """The endless stream of sample numbers over shards with `counts` samples each.

    visited: the shards that belong to the stream, by their places in `counts`; None: all of them.
    """

    def __init__(self, counts: Sequence[int], seed: int, shuffle_shards: int, visited: Sequence[int] | None = None):
        self.seed, self.shuffle_shards = seed, shuffle_shards
        self._visited = np.arange(len(counts)) if visited is None else np.asarray(visited, dtype=np.int64)
        self._counts = np.asarray(counts, dtype=np.int64)[self._visited]
        # Of all shards: numbers are the same in every stream
        self._starts = np.cumsum([0, *counts])
        self._ends = np.cumsum(self._counts)
        self._plan = lru_cache(2)(self._new_plan)
        self._numbers = lru_cache(2)(self._new_numbers)

    def __len__(self) -> int:
        """Samples per epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def at(self, position: int) -> int:
        """The number of the sample at `position` of the stream: every number once per `len(self)` positions."""
        epoch, group = self.group_at(position)
        return int(self._numbers(epoch, group)[position - epoch * len(self) - int(self._plan(epoch)[1][group])])

    def nth(self, place: int) -> int:
        """The number of the sample at `place` of an unshuffled epoch."""
        shard = int(np.searchsorted(self._ends, place, side="right"))
        return int(self._starts[self._visited[shard]]) + place - int(self._ends[shard] - self._counts[shard])

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
        return self._visited[order], starts[: -1 : self.shuffle_shards]

    def _new_numbers(self, epoch: int, group: int) -> Numbers:
        """The sample numbers of a group, in order."""
        shards = self.shards_of(epoch, group)
        numbers = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return np.random.default_rng([self.seed, epoch, group]).permutation(numbers)


class PartedOrder:
    """Streams over equal parts of the shards, side by side in every batch: of its `batch_size` places the first
    `batch_size / parts` belong to the first part, and so on.

    Processes take consecutive places of a batch. So with as many parts as nodes, those of a node need the shards of one part only.
    One part: a plain SampleOrder. batch_size: a multiple of `parts`.
    """

    def __init__(self, counts: Sequence[int], seed: int, shuffle_shards: int, parts: int, batch_size: int):
        every = [range(part, len(counts), parts) for part in range(parts)]
        self.streams = [SampleOrder(counts, seed, shuffle_shards, visited) for visited in every]
        self._each = batch_size // parts

    def locate(self, position: int) -> tuple[SampleOrder, int]:
        """The stream that fills `position`, and the position in that stream."""
        batch, place = divmod(position, self._each * len(self.streams))
        part, place = divmod(place, self._each)
        return self.streams[part], batch * self._each + place
