"""What one stage hands to the next: publish, read, resolve a folder or a models:/ URI.

An artifact is a folder: files, and a `manifest.json` written last that holds every file's size and digest. It is
written under a scratch name, flushed and renamed, so it is complete or absent; it is never changed afterwards.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pipeline import __version__, disk, patience
from pipeline.errors import ArtifactError
from pipeline.wording import reason

MANIFEST = "manifest.json"
FORMAT = 1
INDEXED = (".tar", ".jsonl")  # files of shards, which index.json covers by digest
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
MOST_NAME, MOST_PATH = 255, 1024  # bytes of a file's name, and of its path in the artifact: what file systems take


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
            if len(name.encode()) > MOST_PATH or any(len(part.encode()) > MOST_NAME for part in parts):
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
        """The content of a JSON file that the manifest lists. Raises: ArtifactError if it does not."""
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path / MANIFEST}: does not list {name}; make the artifact again")
        with _readable(self.path / name):
            return json.loads(disk.content_of(self.path / name))


def publish(
    target: Path, manifest: Manifest, write: Callable[[Path], object], check: Callable[[], object] = lambda: None
) -> Artifact:
    """Calls `write(scratch folder)`, adds the manifest, calls `check`, and renames the scratch folder to `target`.

    Raises: ArtifactError if `target` exists, or if `read` would not take what was written; whatever `write` or `check`
    raises. The scratch folder is removed then.
    """
    taken = ArtifactError(f"{target}: an artifact is already there and is never overwritten; choose another run=")
    if target.exists():
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk.naming(target), disk.scratch_folder(target) as scratch:
        write(scratch)
        # Tars and their tables are left to the index of the shards: hashing them at every read would take hours.
        written = [p for p in sorted(scratch.rglob("*")) if p.is_file() and p.suffix not in INDEXED]
        files = {p.relative_to(scratch).as_posix(): _entry(p) for p in written}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        content = manifest.model_copy(update={"files": files, "created": created}).model_dump_json(indent=1).encode()
        done = parse(content, str(target))
        _refuse_incomplete(done, str(target))
        for name in files:
            refuse_outside(scratch, name)
        disk.write_durably(scratch / MANIFEST, content)
        check()
        try:
            scratch.rename(target)
        except OSError:
            if target.exists():  # published by another machine in the meantime
                raise taken from None
            raise
        disk.flush_folder(target.parent)
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
        raise ArtifactError(f"{name}: expected {a_kind(kind)} artifact, found {manifest.kind!r}; name another input")
    if manifest.format != FORMAT:
        raise ArtifactError(f"{name}: artifact format {manifest.format}, this version reads {FORMAT}")
    _refuse_incomplete(manifest, name)
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


def a_kind(kind: str) -> str:
    """The kind in quotes with its article, for messages: a 'codec', an 'evaluation'."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind!r}"


def kind_of(name: str) -> Kind:
    """The kind of the artifact that `name` stands for. Raises: ArtifactError if there is none."""
    return manifest_at(resolve(name), name).kind


def digest_of(path: Path) -> str:
    """The digest that an artifact folder's manifest claims; `read` checks the files. Raises: ArtifactError."""
    return manifest_at(path, str(path)).digest


def manifest_at(path: Path, name: str) -> Manifest:
    """The manifest in an artifact folder that the user calls `name`. Raises: ArtifactError if there is none."""
    if not (path / MANIFEST).is_file():
        unfinished = (path / "run.yaml").is_file()
        state = (
            "that stage has not finished yet; run it again and it continues" if unfinished else "run that stage first"
        )
        raise ArtifactError(f"{name}: expected a finished artifact, found none; {state}")
    with _readable(path / MANIFEST):
        content = disk.content_of(path / MANIFEST)
    return parse(content, str(path / MANIFEST))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises: ArtifactError for errors of the system, within it."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({reason(error)}); make the artifact again") from None


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return FileEntry(size=path.stat().st_size, sha256=disk.sha256(path))


def _refuse_incomplete(manifest: Manifest, name: str) -> None:
    """Raises ArtifactError if a file that such an artifact consists of is not listed, and so would not be verified."""
    if missing := [file for file in NEEDED[manifest.kind] if file not in manifest.files]:
        raise ArtifactError(
            f"{name}: its manifest does not list {' and '.join(missing)}, as {a_kind(manifest.kind)} artifact needs; "
            "make the artifact again"
        )


def refuse_outside(folder: Path, name: str) -> None:
    """Raises: ArtifactError if the file is a link that leads out of the artifact's folder."""
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder / MANIFEST}: names a file outside its folder: {name!r}")


def _verify(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    refuse_outside(folder, name)
    if not patience.wait_for(path):
        raise ArtifactError(f"{path}: missing, but the manifest lists it; make the artifact again")
    with _readable(path):
        size = path.stat().st_size
    if size != entry.size:
        raise ArtifactError(
            f"{path}: {size} bytes, expected {entry.size} (truncated or changed); make the artifact again"
        )
    with _readable(path):
        digest = disk.sha256(path)
    if digest != entry.sha256:
        raise ArtifactError(f"{path}: its SHA-256 differs from the manifest (damaged); make the artifact again")
