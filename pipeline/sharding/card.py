"""The data card: one HTML page that says what a set of shards holds."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipeline.data.images import decode
from pipeline.data.reader import samples_of
from pipeline.data.shards import Shard, Split
from pipeline.sharding.filters import AcceptedImage, RejectedFile

# Images in the grid; pixels
SHOWN, THUMBNAIL = 48, 128
REFUSED_SHOWN = 50


def write(
    folder: Path,
    title: str,
    splits: Mapping[Split, Sequence[AcceptedImage]],
    written: Sequence[Shard],
    refused: Sequence[RejectedFile],
    config: Mapping[str, object],
) -> None:
    """Writes `card.html` into a folder that holds the shards."""
    photos = [photo for group in splits.values() for photo in group]
    page = jinja2.Environment(autoescape=True).from_string(
        (resources.files("pipeline.sharding") / "card.html").read_text(encoding="utf-8")
    )
    tables = {
        "Splits": {
            split: {
                "images": len(group),
                "per epoch": sum(photo.repeats for photo in group),
                "shards": len(mine := [shard for shard in written if shard.file.startswith(split)]),
                "MB": round(sum(shard.bytes for shard in mine) / 1e6, 1),
                "megapixels": round(sum(photo.width * photo.height for photo in group) / 1e6, 1),
            }
            for split, group in splits.items()
            if group
        },
        "Sources": counted(photos, lambda photo: photo.dataset),
        "Formats": counted(photos, lambda photo: photo.extension + (" (plain)" if photo.plain_jpeg else "")),
        "Left out in decoding": counted([p for p in photos if p.note], lambda photo: photo.note),
    }
    reasons = Counter(reason_kind(refusal.reason) for refusal in refused)
    look_alikes = len(photos) - len({photo.group for photo in photos})
    (folder / "card.html").write_text(
        page.render(
            title=title,
            tables={name: table for name, table in tables.items() if table},
            look_alikes=look_alikes,
            reasons=reasons.most_common(),
            refused=refused[:REFUSED_SHOWN],
            more=max(0, len(refused) - REFUSED_SHOWN),
            figure=_uri(_sizes(photos), "image/png"),
            thumbnails=thumbnails(folder, written),
            config=config,
        ),
        encoding="utf-8",
    )


def counted(photos: Sequence[AcceptedImage], key: Callable[[AcceptedImage], str]) -> dict[str, dict[str, object]]:
    """Images, bytes and share by what `key` says of each."""
    counts = Counter(key(photo) for photo in photos)
    sizes: Counter[str] = Counter()
    for photo in photos:
        sizes[key(photo)] += photo.size
    return {
        name: {"images": count, "MB": round(sizes[name] / 1e6, 1), "share": f"{count / len(photos):.1%}"}
        for name, count in counts.most_common()
    }


def reason_kind(reason: str) -> str:
    """A reason without what is particular to the file."""
    for mark in (":", " (", " as /", " 1", " as ", " like "):
        reason = reason.split(mark)[0]
    return reason


def thumbnails(folder: Path, written: Sequence[Shard]) -> list[str]:
    """The first images of shards spread over the set, as WebP data URIs."""
    found: list[str] = []
    each = -(-SHOWN // max(1, len(written)))
    step = max(1, len(written) // SHOWN)
    for shard in written[::step]:
        for _, content in islice(samples_of(folder, shard), each):
            image = Image.fromarray(decode(content).pixels)
            image.thumbnail((2 * THUMBNAIL, THUMBNAIL))
            stream = io.BytesIO()
            image.save(stream, "WEBP", quality=75)
            found.append(_uri(stream.getvalue(), "image/webp"))
    return found[:SHOWN]


def _sizes(photos: Sequence[AcceptedImage]) -> bytes:
    """How many images have which size."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist([min(photo.width, photo.height) for photo in photos], bins=40, color="0.4")
    left.set(xlabel="shorter side in pixels", ylabel="images")
    right.hist(np.log10([8 * photo.size / (photo.width * photo.height) for photo in photos]), bins=40, color="0.4")
    right.set(xlabel="file size, log10 of bits per pixel")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90, metadata={"Software": None})
    return stream.getvalue()


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
