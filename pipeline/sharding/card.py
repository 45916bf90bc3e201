"""The data card: one HTML page that says what a set of shards holds."""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from pipeline.data.images import decode
from pipeline.data.reader import samples_of
from pipeline.data.shards import Shard
from pipeline.sharding.filters import RejectedFile
from pipeline.sharding.summary import Counts, Summary

# Images in the grid; pixels
SHOWN, THUMBNAIL = 48, 128
REFUSED_SHOWN = 50


def write(
    folder: Path,
    title: str,
    summary: Summary,
    written: Sequence[Shard],
    refused: Iterable[RejectedFile],
    config: Mapping[str, object],
) -> None:
    """Writes `card.html` into a folder that holds the shards."""
    page = jinja2.Environment(autoescape=True).from_string(
        (resources.files("pipeline.sharding") / "card.html").read_text(encoding="utf-8")
    )
    tables = {
        "Splits": {
            split: {
                "images": told.images,
                "per epoch": told.draws,
                "shards": len(mine := [shard for shard in written if shard.file.startswith(split)]),
                "MB": round(sum(shard.bytes for shard in mine) / 1e6, 1),
                "megapixels": round(told.pixels / 1e6, 1),
            }
            for split, told in summary.splits.items()
            if told.images
        },
        "Sources": shares(summary.by_source),
        "Formats": shares(summary.by_format),
        "Left out in decoding": shares(summary.by_note),
    }
    reasons, first = Counter[str](), list[RejectedFile]()
    for refusal in refused:
        reasons[reason_kind(refusal.reason)] += 1
        if len(first) < REFUSED_SHOWN:
            first.append(refusal)
    (folder / "card.html").write_text(
        page.render(
            title=title,
            tables={name: table for name, table in tables.items() if table},
            look_alikes=summary.look_alikes,
            reasons=reasons.most_common(),
            refused=first,
            more=summary.refused - len(first),
            figure=_uri(_sizes(summary), "image/png"),
            thumbnails=thumbnails(folder, written),
            config=config,
        ),
        encoding="utf-8",
    )


def shares(counts: Counts) -> dict[str, dict[str, object]]:
    """Images, bytes and share by name, the most frequent first."""
    images = Counter(counts.images)
    return {
        name: {"images": count, "MB": round(counts.bytes[name] / 1e6, 1), "share": f"{count / images.total():.1%}"}
        for name, count in images.most_common()
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


def _sizes(summary: Summary) -> bytes:
    """How many images have which size."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for plot, told in ((left, summary.sides), (right, summary.bits)):
        plot.hist(told.edges[:-1], told.edges, weights=told.counts, color="0.4")
    left.set(xlabel="shorter side in pixels", ylabel="images")
    right.set(xlabel="file size, log10 of bits per pixel")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90, metadata={"Software": None})
    return stream.getvalue()


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
