"""Decoded images that are kept in memory, for data sets that fit in it."""

import threading
from collections import OrderedDict

from pipeline.data.images import Pixels


class DecodedCache:
    """The most recently used decoded images, by number and shrinkage, up to a number of bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.images: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, index: tuple[int, int]) -> Pixels | None:
        with self._lock:
            if index in self.images:
                self.images.move_to_end(index)
            return self.images.get(index)

    def put(self, index: tuple[int, int], pixels: Pixels) -> None:
        with self._lock:
            # Another thread may have decoded it meanwhile
            if index not in self.images:
                self.images[index] = pixels
                self.bytes += pixels.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self.images.popitem(last=False)[1].nbytes
