"""How many large images are decoded at the same time: few enough for the machine's memory."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.storage import disk

# While an image is decoded and hashed: Pillow's copy takes 4, our pixels 3, the gray ones 1
BYTES_PER_PIXEL = 8
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
# Pixels per core that together take a quarter of it
SHARE = _MEMORY // 4 // (os.cpu_count() or 1) // BYTES_PER_PIXEL


@contextmanager
def for_image(pixels: int, folder: Path) -> Iterator[None]:
    """Waits until an image of so many pixels may be decoded: beyond a core's share of the memory, one at a time.

    folder: where all threads and processes that do this work keep the machine's lock.
    """
    if pixels <= SHARE:
        yield
        return
    with disk.exclusive_lock(folder / f".{socket.gethostname()}.lock"):
        yield
