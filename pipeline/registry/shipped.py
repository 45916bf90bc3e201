"""Codecs that are part of this package, by quality: `shipped:low`, `shipped:medium` and `shipped:high`."""

from enum import StrEnum
from pathlib import Path

from pipeline.artifacts.artifact import manifest_at
from pipeline.errors import ArtifactError, BitstreamError

PREFIX = "shipped:"
# A folder of artifacts, one per quality
HOME = Path(__file__).parents[1] / "shipped"


class Quality(StrEnum):
    low = "low"
    medium = "medium"
    high = "high"


def folder(name: str) -> Path:
    """Where `shipped:QUALITY` lies. Raises: ArtifactError if there is no such quality."""
    quality = name.removeprefix(PREFIX)
    if quality not in [*Quality]:
        there = ", ".join(f"{PREFIX}{known}" for known in Quality)
        raise ArtifactError(f"{name}: no such codec is part of this package; there are: {there}")
    return HOME / quality


def that_reads(bitstream_id: bytes) -> str:
    """The name of the codec that reads files with this bitstream id, or with one that begins so.

    Raises: BitstreamError if none does.
    """
    for quality in Quality:
        if bitstream_id_of(quality).startswith(bitstream_id.hex()):
            return PREFIX + quality
    raise BitstreamError(
        f"made by another codec than those of this package (bitstream id {bitstream_id.hex()}): name it with --codec, a run "
        "folder or models:/NAME@ALIAS"
    )


def bitstream_id_of(quality: Quality) -> str:
    """In hexadecimal, as `illm compact` wrote it down: so no network is loaded."""
    return str(manifest_at(HOME / quality, PREFIX + quality).config["bitstream_id"])
