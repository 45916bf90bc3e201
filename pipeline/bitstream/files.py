"""Image files to compressed files and back: the `compress`, `decompress` and `inspect` commands."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from pipeline.bitstream import container, naming
from pipeline.bitstream.container import Packet
from pipeline.bitstream.naming import Job
from pipeline.data import images
from pipeline.data.images import Decoded, Pixels
from pipeline.errors import BitstreamError, DataError
from pipeline.log import logger
from pipeline.registry import resolve, shipped
from pipeline.storage import outputs
from pipeline.text import printable

if TYPE_CHECKING:
    from pipeline.bitstream.codec import ImageCodec

T = TypeVar("T")
# Pillow's names of the formats that we write with an alpha channel
OPACITY = {"PNG", "WEBP", "TIFF"}


def compress(names: Sequence[str], output: str | None, codec: str, force: bool = False) -> None:
    """Compresses the images that `names` stand for; prints a line for each.

    names, output: as in `naming.plan`. codec: an artifact's name. force: replace outputs that are there.
    Raises: UserError before any work if a name does not fit, and at the end if some images could not be compressed.
    """

    def finish(network: "ImageCodec", job: Job, decoded: Decoded) -> str:
        content = network.compress(decoded.pixels, decoded.opacity)
        outputs.write(job.target, content, force)
        height, width = decoded.pixels.shape[:2]
        return f"{width}x{height}, {len(content)} bytes, {8 * len(content) / (height * width):.4f} bits per pixel"

    _each(naming.plan(naming.COMPRESS, names, output, force), lambda _: codec, _decoded, finish)


def decompress(names: Sequence[str], output: str | None, codec: str | None, force: bool = False) -> None:
    """Decompresses the files that `names` stand for, each to the image format of its output's suffix.

    codec: an artifact's name; None: for each file, the codec of this package that reads it. Otherwise like `compress`.
    """

    def choose(content: bytes) -> str:
        return shipped.that_reads(container.unpack(content).bitstream_id) if codec is None else codec

    def finish(network: "ImageCodec", job: Job, content: bytes) -> str:
        restored, format_ = network.decode(content), naming.format_of(job.target)
        pixels = restored.pixels
        if restored.opacity is not None:
            if format_ in OPACITY:
                pixels = images.with_opacity(pixels, restored.opacity)
            else:
                pixels = images.over_white(pixels, restored.opacity)
                logger.warning(f"{printable(job.name)} has transparency; {format_} has none, so it was laid over white")
        outputs.write(job.target, _encoded(pixels, format_), force)
        return f"{pixels.shape[1]}x{pixels.shape[0]}"

    _each(naming.plan(naming.DECOMPRESS, names, output, force), choose, _unpacked, finish)


def _each(
    jobs: Sequence[Job],
    choose: Callable[[T], str],
    prepare: Callable[[Job], T],
    finish: Callable[["ImageCodec", Job, T], str],
) -> None:
    """Prepares and finishes each job; among several, one that fails is logged and does not stop the others.

    prepare: reads and checks a file. choose: names the codec for it, which is loaded once. finish: returns what to print.
    """
    networks: dict[str, ImageCodec] = {}
    alone, done = len(jobs) == 1, 0
    for job in jobs:
        ready: T | None = None
        with _told(job, alone):
            ready = prepare(job)
        if ready is None:
            continue
        with _told(job, alone):
            name = choose(ready)
            if name not in networks:
                networks[name] = _load(name)
            line = finish(networks[name], job, ready)
            # what is written to standard output must stay as it is
            print(
                f"{printable(str(job.target or job.name))}: {line}",
                file=sys.stdout if job.target else sys.stderr,
                flush=True,
            )
            done += 1
    if done < len(jobs):
        raise BitstreamError(
            f"{len(jobs) - done} of {len(jobs)} files failed, for the reasons above; the others are done"
        )


@contextmanager
def _told(job: Job, alone: bool) -> Iterator[None]:
    """Prefixes an error with the file's name; logs it instead of raising it, unless the file is the only one."""
    try:
        yield
    except (BitstreamError, DataError, MemoryError) as error:
        reason = "not enough memory for it" if isinstance(error, MemoryError) else str(error)
        if alone:
            raise BitstreamError(f"{printable(job.name)}: {reason}") from None
        logger.error(f"{printable(job.name)}: {reason}")


def _load(codec: str) -> "ImageCodec":
    # Imports torch
    from pipeline.bitstream.codec import ImageCodec

    return ImageCodec.load(codec)


def _decoded(job: Job) -> Decoded:
    decoded = images.decode(_read(job.source), keep_opacity=True)
    for happened, told in (
        (decoded.animated, "is animated; its first frame was taken"),
        (decoded.deep, "has more than 8 bits per channel; they were rounded to 8"),
    ):
        if happened:
            logger.warning(f"{printable(job.name)} {told}")
    return decoded


def _unpacked(job: Job) -> bytes:
    """A compressed file's bytes. A damaged file is detected before any network is loaded."""
    content = _read(job.source)
    container.unpack(content)
    return content


def _encoded(pixels: Pixels, name: str) -> bytes:
    stream = io.BytesIO()
    try:
        Image.fromarray(pixels).save(stream, name)
    except (OSError, ValueError) as error:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise BitstreamError(f"{size} pixels cannot be written as {name} ({error}); use .png") from None
    return stream.getvalue()


def inspect(path: Path) -> str:
    """What a compressed file, a run or an artifact holds, after checking its digests."""
    if path.is_dir():
        return _inspect_artifact(path)
    try:
        content = _read(path)
        packet = container.unpack(content)
    except BitstreamError as error:
        raise BitstreamError(f"{path}: {error}") from None
    size = len(content)
    return "\n".join(
        [
            f"image           {packet.width}x{packet.height}",
            f"bitstream id    {packet.bitstream_id.hex()}, {_reader(packet)}",
            f"format          version {packet.version}{_told_flags(packet)}",
            f"bytes           {size}, {size - sum(map(len, packet.streams))} of them not of the latents",
            f"rate            {8 * size / (packet.width * packet.height):.4f} bits per pixel",
            "checksum        matches",
        ]
    )


def _reader(packet: Packet) -> str:
    try:
        return f"read by {shipped.that_reads(packet.bitstream_id)}"
    except BitstreamError:
        return "read by no codec of this package"


def _told_flags(packet: Packet) -> str:
    flags = [name for name, given in (("gray", packet.is_gray), ("transparent", packet.transparency)) if given]
    return "".join(f", {name}" for name in flags)


def _inspect_artifact(path: Path) -> str:
    artifact = resolve.read(str(path))
    manifest = artifact.manifest
    lines = [
        f"kind      {manifest.kind}",
        f"digest    {artifact.digest}",
        f"stage     {manifest.stage}",
        f"created   {manifest.created}",
    ]
    lines += [f"parent    {role}: {parent.digest} ({parent.source})" for role, parent in manifest.parents.items()]
    metrics = {name: "none" if value is None else f"{value:.6g}" for name, value in manifest.metrics.items()}
    lines += [f"metric    {name} = {value}" for name, value in metrics.items()]
    lines += [f"file      {name} ({entry.size} bytes)" for name, entry in manifest.files.items()]
    return "\n".join([*lines, "digests   match"])


def _read(file: Path | None) -> bytes:
    """Raises: BitstreamError that does not name the file."""
    try:
        return file.read_bytes() if file else sys.stdin.buffer.read()
    except FileNotFoundError:
        raise BitstreamError("no such file") from None
    except OSError as error:
        raise BitstreamError(f"cannot be read: {error.strerror}") from None
