"""Which images are accepted."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from threading import Semaphore
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline import redaction
from pipeline.config import Config
from pipeline.data.images import MAX_PIXELS, SUFFIXES, Pixels, decode, pixels_in
from pipeline.errors import DataError, UnreachableError
from pipeline.sharding import decode_limit, duplicates
from pipeline.sharding.items import Item, read_item
from pipeline.storage import disk, fetch
from pipeline.text import printable

_PIXELS_COUNTED = 2**16


class FilterConfig(Config):
    """What an image must be to be accepted."""

    min_side: PositiveInt = 256
    """Smallest shorter side of an accepted image, in pixels."""
    max_aspect: PositiveFloat | None = None
    """Largest ratio of the longer to the shorter side; null: no limit."""
    max_pixels: Annotated[PositiveInt, Field(le=MAX_PIXELS)] = MAX_PIXELS
    """Largest number of pixels of an image; checked before it is decoded."""
    min_colors: NonNegativeInt = 0
    """Fewest different colors among 65,536 pixels; 64 rejects most drawings and screenshots."""
    duplicate_distance: NonNegativeInt | None = Field(default=3, le=15)
    """Images whose 64-bit perceptual hashes differ in at most this many bits look alike; null: not compared."""
    drop_near_duplicates: bool = False
    """Keep only the largest of the images that look alike; otherwise all of them, on one side of the split."""
    allow_list: str | None = None
    """File of names, paths or SHA-256s, one per line: only these images are accepted."""
    deny_list: str | None = None
    """File of names, paths or SHA-256s, one per line: these images are rejected."""


@dataclass(frozen=True, slots=True)
class AcceptedImage:
    """An image that was examined and accepted."""

    path: str
    dataset: str
    extension: str
    # Bytes
    size: int
    sha256: str
    # Pixels of the image as it is shown, after its EXIF orientation
    width: int
    height: int
    plain_jpeg: bool
    # What decoding left out
    note: str = ""
    # Its number among the listed items
    item: int = -1
    # Of what it looks like
    hash: int = 0
    # Times per epoch
    repeats: int = 1


# As a row of values, which takes less room on disk and less time than a dictionary
row: Callable[[AcceptedImage], tuple[Any, ...]] = attrgetter(*(field.name for field in fields(AcceptedImage)))


@dataclass(frozen=True, slots=True)
class RejectedFile:
    """A file that was not accepted, and why."""

    path: str
    dataset: str
    reason: str


def described(refusal: RejectedFile) -> str:
    """One line about a refused file."""
    return printable(f"{refusal.path}: {refusal.reason}")


@dataclass(frozen=True)
class NameLists:
    """The allow and deny lists."""

    allowed: frozenset[str] | None
    denied: frozenset[str]

    @classmethod
    def of(cls, rules: FilterConfig) -> "NameLists":
        return cls(
            _lines(rules.allow_list) if rules.allow_list else None,
            _lines(rules.deny_list) if rules.deny_list else frozenset(),
        )

    def refuse(self, path: str, digest: str) -> str | None:
        names = {path, path.rsplit("/", 1)[-1], digest}
        if names & self.denied:
            return "on the deny list"
        return "not on the allow list" if self.allowed is not None and not names & self.allowed else None


def examine(
    path: str, dataset: str, content: bytes, rules: FilterConfig, lists: NameLists
) -> AcceptedImage | RejectedFile:
    """Decodes one file to see that it is a whole image as the rules want it."""
    suffix = "." + path.rsplit("/", 1)[-1].rpartition(".")[2].lower()
    digest = hashlib.sha256(content).hexdigest()
    if reason := lists.refuse(path, digest):
        return RejectedFile(path, dataset, reason)
    if not content:
        return RejectedFile(path, dataset, "unreadable: zero bytes")
    try:
        decoded = decode(content, rules.max_pixels)
    except DataError as error:
        named = suffix in SUFFIXES
        return RejectedFile(path, dataset, f"unreadable: {error}" if named else f"not an image ({suffix})")
    height, width = decoded.pixels.shape[:2]
    if reason := _reason(decoded.pixels, rules):
        return RejectedFile(path, dataset, reason)
    notes = [word for word in ("animated", "deep", "flattened") if getattr(decoded, word)]
    looks = duplicates.perceptual_hash(decoded.pixels) if rules.duplicate_distance is not None else 0
    return AcceptedImage(
        path=path,
        dataset=dataset,
        extension=decoded.extension,
        size=len(content),
        sha256=digest,
        width=width,
        height=height,
        plain_jpeg=decoded.plain_jpeg,
        note=" ".join(notes),
        hash=looks,
    )


def _reason(pixels: Pixels, rules: FilterConfig) -> str | None:
    """Why an image is refused, if it is."""
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    if short < rules.min_side:
        return f"too small: {width}x{height}, shorter side below {rules.min_side}"
    if rules.max_aspect and long > rules.max_aspect * short:
        return f"too long: {width}x{height}, sides further apart than 1:{rules.max_aspect:g}"
    if rules.min_colors and (found := _colors(pixels)) < rules.min_colors:
        return f"not a photo: {found} colors, expected at least {rules.min_colors}"
    return None


def _colors(pixels: Pixels) -> int:
    flat = pixels.reshape(-1, 3)[:: max(1, pixels.size // 3 // _PIXELS_COUNTED)].astype(np.uint32)
    return len(np.unique(flat[:, 0] << 16 | flat[:, 1] << 8 | flat[:, 2]))


def _lines(path: str) -> frozenset[str]:
    try:
        with open(path, encoding="utf-8") as stream:  # noqa: PTH123
            return frozenset(line.strip() for line in stream if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read this list ({error}); expected a name or SHA-256 per line") from None


# Images that each worker downloads at the same time
FETCHED_AT_ONCE = 8


def examine_chunk(
    items: list[Item], rules: FilterConfig, lists: NameLists, spool: Path, max_bytes: int, threads: int = 1
) -> list[AcceptedImage | RejectedFile]:
    """Examines some items; keeps the bytes of accepted ones that came over a network.

    threads: images that are decoded at a time; more are fetched.
    """
    decoders = Semaphore(threads)

    def one(item: Item) -> AcceptedImage | RejectedFile:
        try:
            content = read_item(item, max_bytes)
        except UnreachableError as error:
            why = printable(redaction.masked(str(error).removeprefix(f"{item.location}: ")))
            return RejectedFile(item.name, item.dataset, f"unreadable: {why}")
        except DataError as error:
            return RejectedFile(item.name, item.dataset, item.problem or f"unreadable: {error}")
        with decoders, decode_limit.for_image(pixels_in(content), spool):
            result = examine(item.name, item.dataset, content, rules, lists)
        if isinstance(result, AcceptedImage) and fetch.is_url(item.location):
            disk.write_atomic(spool / result.sha256, content)
        return result

    remote = any(fetch.is_url(item.location) for item in items)
    with ThreadPoolExecutor(FETCHED_AT_ONCE if remote else threads) as pool:
        return list(pool.map(one, items))
