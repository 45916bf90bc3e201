"""What one stage hands to the next: publish, read, resolve a folder or a models:/ URI.

An artifact is a folder: files, and a `manifest.json` written last that holds every file's size and digest. It is
written under a scratch name, flushed and renamed, so it is complete or absent; it is never changed afterwards.
"""

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pipeline import __version__, patience
from pipeline.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = 1
INDEXED = (".tar", ".jsonl")  # files of shards, which index.json covers by digest
Kind = Literal["shards", "labeler", "codec", "evaluation", "promotion", "sweep"]


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
    """What an artifact is and what it was made from."""

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
            if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
                raise ValueError(f"names a file outside its folder: {name!r}")
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


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk. Of one elsewhere: `path` has what the manifest lists, and `origin` is its URL."""

    path: Path
    manifest: Manifest
    origin: str = ""

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def as_parent(self, source: str) -> Parent:
        return Parent(digest=self.digest, source=source, run_id=self.manifest.run_id)

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def publish(target: Path, manifest: Manifest, write: Callable[[Path], object]) -> Artifact:
    """Calls `write(scratch folder)`, adds the manifest, and renames the scratch folder to `target`.

    Raises: ArtifactError if `target` exists; whatever `write` raises, after removing the scratch folder.
    """
    if target.exists():
        raise ArtifactError(f"{target}: an artifact is already there and is never overwritten; choose another run=")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*"):  # of a process that was killed here
        shutil.rmtree(leftover)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(scratch)
        # Tars and their tables are left to the index of the shards: hashing them at every read would take hours.
        written = [p for p in sorted(scratch.rglob("*")) if p.is_file() and p.suffix not in INDEXED]
        files = {p.relative_to(scratch).as_posix(): _entry(p) for p in written}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        done = manifest.model_copy(update={"files": files, "created": created})
        write_durably(scratch / MANIFEST, done.model_dump_json(indent=1).encode())
        scratch.chmod(0o755)
        scratch.rename(target)
        flush_folder(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Artifact(target, done)


def resolve(name: str) -> Path:
    """The artifact folder that `runs/x`, `runs/x/artifact`, `models:/name@alias` or a URL stands for."""
    return _located(name)[0]


def _located(name: str) -> tuple[Path, str]:
    """The folder and, if it is a copy of what is elsewhere, the URL."""
    if name.startswith("models:/"):
        from pipeline import registry  # imports mlflow

        return registry.fetch(name), ""
    if "://" in name:
        from pipeline.data import cache

        return cache.mirror(name)
    path = Path(name)
    return path / "artifact" if (path / "artifact").is_dir() else path, ""


def read(name: str, kind: Kind) -> Artifact:
    """The artifact that `name` stands for, after checking its kind and the digest of every file.

    Raises: ArtifactError saying what is missing, of another kind, or damaged.
    """
    if "://" not in name and not name.startswith("models:/"):
        patience.wait_for(Path(name) / MANIFEST, Path(name) / "artifact" / MANIFEST)
    path, origin = _located(name)
    manifest = manifest_at(path, name)
    if manifest.kind != kind:
        raise ArtifactError(f"{name}: expected a {kind!r} artifact, found {manifest.kind!r}; name another input")
    if manifest.format != FORMAT:
        raise ArtifactError(f"{name}: artifact format {manifest.format}, this version reads {FORMAT}")
    for file, entry in manifest.files.items():
        _verify(path, file, entry)
    return Artifact(path, manifest, origin)


def parse(content: bytes, place: str) -> Manifest:
    """A manifest from the bytes of its file at `place`. Raises: ArtifactError if it is none, or names files elsewhere."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ArtifactError(
            f"{place}: damaged or foreign manifest ({error.error_count()} problem(s): {reason})"
        ) from None


def kind_of(name: str) -> Kind:
    """The kind of the artifact that `name` stands for. Raises: ArtifactError if there is none."""
    return manifest_at(resolve(name), name).kind


def digest_of(path: Path) -> str:
    """The digest that an artifact folder's manifest claims; `read` checks the files. Raises: ArtifactError."""
    return manifest_at(path, str(path)).digest


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`, so that a reader or a crash sees the old or the new content and nothing between.

    Several threads or processes may write the same file at the same time; one of them wins.
    """
    # 50 letters of the name: a whole one may be as long as a file system allows
    scratch = path.with_name(f".{path.name[:50]}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with scratch.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.rename(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_at(path: Path, name: str) -> Manifest:
    """The manifest in an artifact folder that the user calls `name`. Raises: ArtifactError if there is none."""
    if not (path / MANIFEST).is_file():
        unfinished = (path / "run.yaml").is_file()
        state = (
            "that stage has not finished yet; run it again and it continues" if unfinished else "run that stage first"
        )
        raise ArtifactError(f"{name}: expected a finished artifact, found none; {state}")
    return parse((path / MANIFEST).read_bytes(), str(path / MANIFEST))


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return FileEntry(size=path.stat().st_size, sha256=sha256(path))


def _verify(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder / MANIFEST}: names a file outside its folder: {name!r}")
    if not patience.wait_for(path):
        raise ArtifactError(f"{path}: missing, but the manifest lists it; make the artifact again")
    size = path.stat().st_size
    if size != entry.size:
        raise ArtifactError(
            f"{path}: {size} bytes, expected {entry.size} (truncated or changed); make the artifact again"
        )
    if sha256(path) != entry.sha256:
        raise ArtifactError(f"{path}: its SHA-256 differs from the manifest (damaged); make the artifact again")
