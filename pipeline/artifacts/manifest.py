"""What an artifact is and what it was made from: the file `manifest.json`."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pipeline import __version__
from pipeline.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = 1
# Files of shards, which index.json covers by digest
INDEXED = (".tar", ".jsonl")
Kind = Literal["shards", "labeler", "codec", "evaluation", "promotion", "sweep"]
# What stages read of an artifact: its manifest has to list these, so that they are verified
NEEDED: dict[str, tuple[str, ...]] = {
    "shards": ("index.json",),
    "labeler": ("model.yaml", "weights.safetensors"),
    "codec": ("model.yaml", "weights.safetensors"),
    "evaluation": ("totals.json", "per_image.csv"),
    "promotion": ("decision.json",),
    "sweep": ("trials.csv",),
}
# Bytes of a file's name, and of its path in the artifact: limits of file systems
MAX_NAME, MAX_PATH = 255, 1024


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class Parent(BaseModel):
    """An input of the stage: where it was, its artifact digest and the tracked run that made it."""

    digest: str
    source: str
    run_id: str | None = None


class Manifest(BaseModel):
    """What an artifact is and what it was made from.

    `digest` covers kind, parents and files. Metrics, configuration, stage, run id, version and time are notes for people
    and trackers: they are as trustworthy as whoever wrote the file.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    format: int = FORMAT
    stage: str = ""
    parents: dict[str, Parent] = {}
    metrics: dict[str, float | None] = {}
    config: dict[str, Any] = {}
    run_id: str | None = None
    version: str = __version__
    created: str = ""
    files: dict[str, FileEntry] = {}

    @field_validator("files")
    @classmethod
    def stays_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            parts = name.split("/")
            if not name.isprintable():
                raise ValueError(f"names a file with unprintable characters, or outside its folder: {name!r}")
            if "\\" in name or any(part in ("", ".", "..") for part in parts) or name == MANIFEST:
                raise ValueError(f"names a file outside its folder: {name!r}")
            if len(name.encode()) > MAX_PATH or any(len(part.encode()) > MAX_NAME for part in parts):
                raise ValueError(f"names a file of {len(name)} letters, too long for file systems: {name[:40]!r}...")
        return files

    @property
    def digest(self) -> str:
        """Identity of the content: kind, parents' digests and every file's digest, but not time, place or run id."""
        content = {
            "kind": self.kind,
            "format": self.format,
            "parents": {role: parent.digest for role, parent in sorted(self.parents.items())},
            "files": {name: entry.sha256 for name, entry in sorted(self.files.items())},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_manifest(content: bytes, place: str) -> Manifest:
    """A manifest from the bytes of its file at `place`. Raises: ArtifactError if it is not a manifest, or names files outside."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ArtifactError(
            f"{place}: damaged or foreign manifest ({error.error_count()} problem(s): {reason})"
        ) from None


def a_kind(kind: str) -> str:
    """The kind in quotes with its article, for messages: a 'codec', an 'evaluation'."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind!r}"
