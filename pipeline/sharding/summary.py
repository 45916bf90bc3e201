"""What a plan holds, in numbers: where its shards begin, and what the index and the data card say."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.data.shards import SPLITS, Split, StoredFormat
from pipeline.sharding.filters import AcceptedImage
from pipeline.storage import disk

BINS = 40
# Values of a histogram that are in memory at a time
_BLOCK = 2**20


@dataclass
class SplitSummary:
    """Images, draws per epoch and pixels of a split; start and end of each of its shards in the split's file, and its digest."""

    images: int = 0
    draws: int = 0
    pixels: int = 0
    shards: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass
class Counts:
    """Images and bytes by name, in the order in which the names came."""

    images: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, images: int, size: int) -> None:
        self.images[name] = self.images.get(name, 0) + images
        self.bytes[name] = self.bytes.get(name, 0) + size

    @classmethod
    def together(cls, parts: Iterable["Counts"]) -> "Counts":
        whole = cls()
        for part in parts:
            for name, images in part.images.items():
                whole.add(name, images, part.bytes[name])
        return whole


@dataclass
class Histogram:
    """How many values are in each of some intervals of equal width."""

    counts: list[int]
    edges: list[float]


@dataclass
class Summary:
    """sources: images of each, in the order of digests. look_alikes: images that look like an earlier one."""

    splits: dict[Split, SplitSummary]
    sources: dict[str, int]
    look_alikes: int
    by_source: Counts
    by_format: Counts
    # Of what decoding left out
    by_note: Counts
    # Of the shorter side in pixels, and of log10 of bits per pixel
    sides: Histogram
    bits: Histogram
    refused: int = 0

    def write(self, path: Path) -> None:
        disk.write_atomic(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> "Summary":
        told = json.loads(path.read_text())
        told["splits"] = {
            split: SplitSummary(
                **values | {"shards": [(start, end, digest) for start, end, digest in values["shards"]]}
            )
            for split, values in told["splits"].items()
        }
        for name in ("by_source", "by_format", "by_note"):
            told[name] = Counts(**told[name])
        return cls(**told | {name: Histogram(**told[name]) for name in ("sides", "bits")})


def shard_digest(store: StoredFormat, photos: Iterable[AcceptedImage]) -> str:
    """Digest of everything that determines the bytes of a shard of these images."""
    digest = hashlib.sha256(store.encode())
    for photo in photos:
        digest.update(_determining(photo))
    return digest.hexdigest()


def _determining(photo: AcceptedImage) -> bytes:
    return f"\n{photo.sha256} {photo.repeats} {photo.dataset} {photo.path}".encode(errors="surrogatepass")


class Counting:
    """Makes the summary of a plan in a folder, image by image. A shard is consecutive images of about `shard_bytes`."""

    def __init__(self, folder: Path, num_images: int, shard_bytes: int, store: StoredFormat):
        self._shard_bytes, self._store = shard_bytes, store
        self._splits = {split: SplitSummary() for split in SPLITS}
        # Start and end in the split's file, and bytes of images, of the shard that is being filled
        self._open = dict.fromkeys(SPLITS, (0, 0, 0))
        self._digests = {split: hashlib.sha256(store.encode()) for split in SPLITS}
        self._by = {split: (Counts(), Counts(), Counts()) for split in SPLITS}
        self._sources: dict[str, int] = {}
        self._groups = np.zeros(num_images, bool)
        self._sides, self._bits = ((folder / name).open("w+b") for name in ("sides", "bits"))

    def __enter__(self) -> "Counting":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._sides, self._bits):
            stream.close()
            Path(stream.name).unlink()

    def add(self, split: Split, photo: AcceptedImage, group: int, line_bytes: int) -> None:
        told, pixels = self._splits[split], photo.width * photo.height
        told.images += 1
        told.draws += photo.repeats
        told.pixels += pixels
        start, end, filled = self._open[split]
        end, filled = end + line_bytes, filled + photo.size
        self._digests[split].update(_determining(photo))
        if filled >= self._shard_bytes:
            told.shards.append((start, end, self._digests[split].hexdigest()))
            start, filled, self._digests[split] = end, 0, hashlib.sha256(self._store.encode())
        self._open[split] = start, end, filled
        by_source, by_format, by_note = self._by[split]
        by_source.add(photo.dataset, 1, photo.size)
        by_format.add(photo.extension + (" (plain)" if photo.plain_jpeg else ""), 1, photo.size)
        if photo.note:
            by_note.add(photo.note, 1, photo.size)
        self._sources[photo.dataset] = self._sources.get(photo.dataset, 0) + 1
        self._groups[group] = True
        self._sides.write(struct.pack("d", min(photo.width, photo.height)))
        self._bits.write(struct.pack("d", 8 * photo.size / pixels))

    def summary(self) -> Summary:
        for split, (start, end, _) in self._open.items():
            if end > start:
                self._splits[split].shards.append((start, end, self._digests[split].hexdigest()))
        look_alikes = sum(self._sources.values()) - int(self._groups.sum())
        by_source, by_format, by_note = (Counts.together(parts) for parts in zip(*self._by.values(), strict=True))
        sides, bits = _histogram(self._sides), _histogram(self._bits, log10=True)
        return Summary(self._splits, self._sources, look_alikes, by_source, by_format, by_note, sides, bits)


def _histogram(stream: BinaryIO, log10: bool = False) -> Histogram:
    """Of the numbers in a file."""

    def blocks() -> "Iterator[np.ndarray[tuple[int], np.dtype[np.float64]]]":
        stream.seek(0)
        while content := stream.read(8 * _BLOCK):
            values = np.frombuffer(content)
            yield np.log10(values) if log10 else values

    ranges = [(block.min(), block.max()) for block in blocks()] or [(0.0, 1.0)]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    counts, edges = np.zeros(BINS, int), np.zeros(BINS + 1)
    for block in blocks():
        more, edges = np.histogram(block, BINS, (low, high))
        counts += more
    return Histogram(counts.tolist(), edges.tolist())
