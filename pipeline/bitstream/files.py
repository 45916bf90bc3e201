"""Image file to compressed file and back: the `compress`, `decompress` and `inspect` commands."""

import io
from pathlib import Path

from PIL import Image

from pipeline import artifacts
from pipeline.bitstream import container
from pipeline.data import images
from pipeline.errors import BitstreamError


def compress(image: Path, output: Path, codec: str) -> str:
    """Compresses `image` to `output` with the codec of that name; returns a line for the user."""
    decoded = images.decode(image)
    if decoded.flattened:
        print(f"warning: {image} has transparency; it was laid over white")
    from pipeline.bitstream.codec import ImageCodec

    content = ImageCodec.load(codec).compress(decoded.pixels)
    _write(output, content)
    height, width = decoded.pixels.shape[:2]
    return f"{output}: {width}x{height}, {len(content)} bytes, {8 * len(content) / (height * width):.4f} bits per pixel"


def decompress(file: Path, output: Path, codec: str) -> str:
    """Decompresses `file` to `output`, an image format by its suffix; returns a line for the user."""
    content = _read(file)
    try:
        container.unpack(content)  # a damaged file is told from the header, before any network is loaded
        from pipeline.bitstream.codec import ImageCodec

        pixels = ImageCodec.load(codec).decompress(content)
    except BitstreamError as error:
        raise BitstreamError(f"{file}: {error}") from None
    stream = io.BytesIO()
    suffix = output.suffix.lower()
    known = Image.registered_extensions()
    if suffix not in known:
        raise BitstreamError(f"{output}: no image format is called {suffix!r}; use .png")
    Image.fromarray(pixels).save(stream, known[suffix])
    _write(output, stream.getvalue())
    return f"{output}: {pixels.shape[1]}x{pixels.shape[0]}"


def inspect(path: Path) -> str:
    """What a compressed file, a run or an artifact holds, after checking its digests."""
    if path.is_dir():
        return _inspect_artifact(path)
    try:
        packet = container.unpack(_read(path))
    except BitstreamError as error:
        raise BitstreamError(f"{path}: {error}") from None
    size = path.stat().st_size
    return "\n".join(
        [
            f"image           {packet.width}x{packet.height}",
            f"bitstream id    {packet.bitstream_id.hex()}",
            f"bytes           {size} ({len(packet.hyper_stream)} hyper-latent, {len(packet.latent_stream)} latent)",
            f"rate            {8 * size / (packet.width * packet.height):.4f} bits per pixel",
            "checksum        matches",
        ]
    )


def _inspect_artifact(path: Path) -> str:
    kind = artifacts.kind_of(str(path))
    artifact = artifacts.read(str(path), kind)
    manifest = artifact.manifest
    lines = [
        f"kind      {kind}",
        f"digest    {artifact.digest}",
        f"stage     {manifest.stage}",
        f"created   {manifest.created}",
    ]
    lines += [f"parent    {role}: {parent.digest} ({parent.source})" for role, parent in manifest.parents.items()]
    lines += [f"metric    {name} = {value}" for name, value in manifest.metrics.items()]
    lines += [f"file      {name} ({entry.size} bytes)" for name, entry in manifest.files.items()]
    return "\n".join([*lines, "digests   match"])


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise BitstreamError(f"{file}: no such file") from None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_durably(path, content)
