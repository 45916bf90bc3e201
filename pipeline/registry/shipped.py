"""Codecs that are part of this package, by quality: `shipped:low`, `shipped:medium` and `shipped:high`."""

import json
from pathlib import Path

from pipeline.errors import ArtifactError, BitstreamError

PREFIX = "shipped:"
# A folder of artifacts, one per quality, and beside them the bitstream id of each
HOME = Path(__file__).parents[1] / "shipped"
INDEX = "index.json"


def folder(name: str) -> Path:
    """Where `shipped:QUALITY` lies. Raises: ArtifactError if there is no such quality."""
    quality = name.removeprefix(PREFIX)
    if quality not in bitstream_ids():
        there = ", ".join(f"{PREFIX}{known}" for known in bitstream_ids()) or "none"
        raise ArtifactError(f"{name}: no such codec is part of this package; there are: {there}")
    return HOME / quality


def that_reads(bitstream_id: bytes) -> str:
    """The name of the codec that reads files with this bitstream id, or with one that begins so.

    Raises: BitstreamError if none does.
    """
    for quality, known in bitstream_ids().items():
        if known.startswith(bitstream_id.hex()):
            return PREFIX + quality
    raise BitstreamError(
        f"made by another codec than those of this package (bitstream id {bitstream_id.hex()}): name it with --codec, a run "
        "folder or models:/NAME@ALIAS"
    )


def bitstream_ids() -> dict[str, str]:
    """Quality -> bitstream id of its codec, in hexadecimal."""
    found: dict[str, str] = json.loads((HOME / INDEX).read_text(encoding="utf-8"))
    return found
