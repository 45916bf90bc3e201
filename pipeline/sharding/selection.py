"""Which accepted images are kept, how often each comes, and which of them look alike.

Images are records in files, which are sorted by merging, so that their number is not bounded by the memory.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.sharding import duplicates, filters, items
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.duplicates import Numbers
from pipeline.sharding.filters import AcceptedImage, RejectedFile
from pipeline.sharding.items import Item
from pipeline.storage.sorting import SortedLines

# The last of them is `repeats`
_PHOTO_FIELDS = len(fields(AcceptedImage))
Results = Iterable[tuple[Item, AcceptedImage | RejectedFile]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image with where its bytes are. number: its place among all different images in the order of their digests."""

    number: int
    photo: AcceptedImage
    item: Item


def parse(line: bytes) -> Candidate:
    """The image of a line: its number, how often it comes per epoch, and a record that no step changes."""
    number, repeats, record = line.split(b" ", 2)
    values = json.loads(record.decode())
    values[_PHOTO_FIELDS - 1] = int(repeats)
    photo = AcceptedImage(*values[:_PHOTO_FIELDS])
    return Candidate(int(number), photo, Item(photo.path, photo.dataset, *values[_PHOTO_FIELDS:]))


def _record(photo: AcceptedImage, item: Item) -> str:
    # Name and data set of the item are the photo's
    return json.dumps([*filters.row(photo), *items.row(item)[2:]])


class Refusals:
    """Refused files, in an order that follows from the files alone."""

    def __init__(self, folder: Path):
        self._lines = SortedLines(folder)

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, step: int, first: int, second: int, refusal: RejectedFile) -> None:
        """Adds a file that was refused in a step of the selection; within the step, the two numbers are its place."""
        self._lines.add(f"{step}{first:012d}{second:012d} {json.dumps(astuple(refusal))}".encode())

    def rows(self) -> Iterator[bytes]:
        """What `refusal_of` takes, in order."""
        return (line.split(b" ", 1)[1] for line in self._lines)

    def remove(self) -> None:
        self._lines.remove()


def refusal_of(row: bytes) -> RejectedFile:
    return RejectedFile(*json.loads(row))


class Selection:
    """The kept images in the order of their digests, which mixes folders and ignores names.

    groups: for each number, the smallest number among the images that look like it; kept or not.
    """

    def __init__(self, folder: Path, num_images: int, groups: Numbers | None):
        self._folder, self.num_images, self._groups = folder, num_images, groups
        self._digests = (folder / "digests").open("rb")

    def lines(self) -> Iterator[bytes]:
        with (self._folder / "photos.jsonl").open("rb") as stream:
            yield from stream

    def group(self, number: int) -> int:
        return number if self._groups is None else int(self._groups[number])

    def digest(self, number: int) -> str:
        """The SHA-256 of any image, also of one that is not kept."""
        self._digests.seek(32 * number)
        return self._digests.read(32).hex()

    def remove(self) -> None:
        self._digests.close()
        for name in ("digests", "photos.jsonl"):
            (self._folder / name).unlink()


def select(cfg: ShardConfig, results: Results, folder: Path, refusals: Refusals) -> Selection:
    """What is kept of the examined files; the rest is added to the refusals.

    Of equal bytes the first is kept; of images that look alike the largest, if the config says so; of a source with a
    weight below 1 a part.
    """
    num_images = _write_different(cfg, _by_digest(results, folder, refusals), folder, refusals)
    groups = None
    if cfg.duplicate_distance is not None:
        groups = duplicates.groups(np.fromfile(folder / "hashes", np.uint64), cfg.duplicate_distance)
    (folder / "hashes").unlink()
    selection = Selection(folder, num_images, groups)
    if _drops(cfg):
        _drop_look_alikes(selection, folder, refusals)
    return selection


def _drops(cfg: ShardConfig) -> bool:
    return cfg.drop_near_duplicates and cfg.duplicate_distance is not None


def _by_digest(results: Results, folder: Path, refusals: Refusals) -> SortedLines:
    """The accepted images by digest and, if that is equal, by number among the items; with hash and draws per epoch."""
    accepted = SortedLines(folder / "accepted")
    for number, (item, result) in enumerate(results):
        if isinstance(result, RejectedFile):
            refusals.add(0, number, 0, result)
        else:
            key = f"{result.sha256} {number:012d} {result.hash} {_repeats(result.sha256, item.weight)}"
            accepted.add(f"{key} {_record(result, item)}".encode())
    return accepted


def _repeats(sha256: str, weight: float) -> int:
    """How often an image comes per epoch: of weight 1.5, half of them come twice, chosen by content."""
    place = int(hashlib.sha256(f"weight {sha256}".encode()).hexdigest()[:8], 16) / 2**32
    return math.floor(weight) + (place < weight % 1)


def _write_different(cfg: ShardConfig, accepted: SortedLines, folder: Path, refusals: Refusals) -> int:
    """Writes the first image of each digest, all digests and all hashes; the number of them."""
    count, last, first = 0, b"", b""
    with (
        (folder / "photos.jsonl").open("wb") as photos,
        (folder / "digests").open("wb") as digests,
        (folder / "hashes").open("wb") as hashes,
    ):
        for line in accepted:
            digest, number, looks, repeats, record = line.split(b" ", 4)
            if digest == last:
                photo = parse(b"0 0 " + record).photo
                reason = f"same bytes as {parse(b'0 0 ' + first).photo.path}"
                refusals.add(0, int(number), 0, RejectedFile(photo.path, photo.dataset, reason))
                continue
            last, first = digest, record
            digests.write(bytes.fromhex(digest.decode()))
            hashes.write(np.uint64(int(looks)).tobytes())
            _write_weighted(b"%d %b %b" % (count, repeats, record), photos, refusals, keep=_drops(cfg))
            count += 1
    accepted.remove()
    return count


def _write_weighted(line: bytes, photos: BinaryIO, refusals: Refusals, keep: bool = False) -> None:
    """Writes an image, unless its source's weight leaves it out. keep: even then."""
    if keep or line.split(b" ", 2)[1] != b"0":
        photos.write(line)
        return
    left_out = parse(line)
    reason = f"left out: its source has weight {left_out.item.weight:g}"
    refusals.add(2, left_out.number, 0, RejectedFile(left_out.photo.path, left_out.photo.dataset, reason))


def _drop_look_alikes(selection: Selection, folder: Path, refusals: Refusals) -> None:
    """Keeps the largest image of each group."""
    by_size, kept = SortedLines(folder / "by-size"), SortedLines(folder / "kept")
    for line in selection.lines():
        image = parse(line)
        smallness = 10**12 - 1 - image.photo.width * image.photo.height
        by_size.add(
            f"{selection.group(image.number):012d} {smallness:012d} {image.number:012d} ".encode() + line.rstrip()
        )
    last, best = b"", ""
    for sized in by_size:
        group, smallness_, number, rest = sized.split(b" ", 3)
        photo = parse(rest).photo
        if group != last:
            last, best = group, photo.path
            kept.add(number + b" " + rest.rstrip())
        else:
            refusal = RejectedFile(photo.path, photo.dataset, f"looks like {best}")
            refusals.add(1, int(smallness_), int(number), refusal)
    with (folder / "photos.jsonl").open("wb") as photos:
        for line in kept:
            _write_weighted(line.split(b" ", 1)[1], photos, refusals)
    by_size.remove()
    kept.remove()
