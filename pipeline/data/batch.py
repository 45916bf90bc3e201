"""A batch of crops, and the part of every batch that a process takes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.transforms import in_unit_range
from pipeline.errors import DataError


@dataclass(frozen=True)
class Batch:
    """x (B, 3, crop, crop): pixels in 0..255 while they are uint8, on their device in [0, 1]; positions: the place in the
    endless sample stream of each of the B crops; images: the number of the image that each was meant to come from."""

    x: Tensor
    positions: list[int]
    images: list[int]

    def to(self, device: torch.device, memory_format: torch.memory_format) -> "Batch":
        """Sent as bytes, a quarter of what floats take, and without waiting for the device where they are pinned."""
        x = self.x.to(device, non_blocking=True)
        x = x if x.is_floating_point() else in_unit_range(x)
        return Batch(x.contiguous(memory_format=memory_format), self.positions, self.images)

    def split(self, parts: int) -> "list[Batch]":
        """Equal parts, in order."""
        size = len(self.positions) // parts
        spans = [slice(start, start + size) for start in range(0, size * parts, size)]
        return [Batch(self.x[span], self.positions[span], self.images[span]) for span in spans]


@dataclass(frozen=True)
class BatchShard:
    """The part of every global batch that this process takes: `size` crops after the first `rank * size`."""

    rank: int
    size: int
    ranks: int

    @classmethod
    def of(cls, batch_size: int, rank: int, ranks: int, multiple: int = 1) -> "BatchShard":
        """Raises: DataError if `batch_size` does not split evenly into multiples of `multiple`."""
        if batch_size % (ranks * multiple):
            raise DataError(
                f"data.batch_size is {batch_size}, expected a multiple of {ranks * multiple} "
                f"({ranks} process(es) x {multiple}); it counts the crops of all processes together"
            )
        return cls(rank, batch_size // ranks, ranks)


def positions(share: BatchShard, start: int) -> Iterator[list[int]]:
    """This process's part of one global batch after another, from position `start` of the stream."""
    while True:
        first = start + share.rank * share.size
        yield list(range(first, first + share.size))
        start += share.size * share.ranks
