"""What the sources hold: files and members of archives, and their bytes."""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from pipeline.errors import DataError
from pipeline.storage import disk
from pipeline.storage.fetch import is_url, pull
from pipeline.text import reason


@dataclass(frozen=True, slots=True)
class Item:
    """A file, or `size` stored bytes at `offset` of an archive.

    name: what the user calls it. problem: why it cannot be taken, if that is known already.
    """

    name: str
    dataset: str
    # Path or URL of the file or archive
    location: str
    offset: int = 0
    # Stored bytes; -1: the whole file
    size: int = -1
    # A member of a zip archive that has to be inflated
    deflated: bool = False
    weight: float = 1.0
    problem: str = ""


# As a row of values, which takes less room on disk and less time than a dictionary
row: Callable[[Item], tuple[Any, ...]] = attrgetter(*(field.name for field in fields(Item)))


def read_item(item: Item, max_bytes: int) -> bytes:
    """The bytes of an item.

    Raises: DataError if they cannot be read, or are more than `max_bytes`.
    """
    if item.problem:
        raise DataError(item.problem)
    if item.size > max_bytes:
        raise DataError(f"{item.size} bytes are more than max_file_mb allows")
    if is_url(item.location):
        stream = io.BytesIO()
        pull(item.location, stream, max_bytes, item.offset, item.size)
        content = stream.getvalue()
    else:
        try:
            with disk.open_regular(item.location) as file:
                file.seek(item.offset)
                content = file.read(item.size if item.size >= 0 else max_bytes + 1)
        except OSError as error:
            raise DataError(f"cannot be read ({reason(error)})") from None
    if item.size >= 0 and len(content) != item.size:
        raise DataError(f"{len(content)} bytes where its archive lists {item.size}")
    content = _inflate(content, max_bytes) if item.deflated else content
    if len(content) > max_bytes:
        raise DataError(f"more than the {max_bytes} bytes that max_file_mb allows")
    return content


def _inflate(content: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        whole = inflater.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise DataError(f"damaged in its archive ({reason(error)})") from None
    if len(whole) <= max_bytes and not inflater.eof:
        raise DataError("cut off in its archive")
    return whole
