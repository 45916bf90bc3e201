"""What one stage hands to the next: a folder that is published whole, and verified when it is read.

An artifact is a folder: files, and a `manifest.json` written last that holds every file's size and digest. It is
written under a scratch name, flushed and renamed, so it is complete or absent; it is never changed afterwards.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts.manifest import (
    FORMAT,
    INDEXED,
    MANIFEST,
    NEEDED,
    FileEntry,
    Kind,
    Manifest,
    Parent,
    a_kind,
    parse_manifest,
)
from pipeline.errors import ArtifactError
from pipeline.storage import disk
from pipeline.text import reason, timestamp


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk. Of a remote one, `path` is a local copy of what the manifest lists, and `origin` its URL."""

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

    Raises: ArtifactError if `target` exists or `read` would refuse what was written; whatever `write` or `check`
    raises. The scratch folder is removed then.
    """
    taken = ArtifactError(f"{target}: an artifact is already there and is never overwritten; choose another run=")
    if target.exists():
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk.naming(target), disk.scratch_folder(target) as scratch:
        write(scratch)
        # Tars and their tables are covered by the index of the shards: hashing them at every read would take hours.
        written = [p for p in sorted(scratch.rglob("*")) if p.is_file() and p.suffix not in INDEXED]
        files = {p.relative_to(scratch).as_posix(): _entry(p) for p in written}
        created = timestamp()
        content = manifest.model_copy(update={"files": files, "created": created}).model_dump_json(indent=1).encode()
        done = parse_manifest(content, str(target))
        _refuse_incomplete(done, str(target))
        for name in files:
            refuse_outside(scratch, name)
        disk.write_atomic(scratch / MANIFEST, content)
        check()
        try:
            scratch.rename(target)
        except OSError:
            # Published by another machine in the meantime
            if target.exists():
                raise taken from None
            raise
        disk.fsync_folder(target.parent)
    return Artifact(target, done)


def read_folder(path: Path, name: str, kinds: Sequence[Kind], origin: str = "") -> Artifact:
    """The artifact in a folder that the user calls `name`, after checking its kind and the digest of every file.

    kinds: the ones that will do; none: all.
    Raises: ArtifactError saying what is missing, of another kind, or damaged.
    """
    manifest = manifest_at(path, name)
    if kinds and manifest.kind not in kinds:
        expected = " or ".join([a_kind(kinds[0]), *map(repr, kinds[1:])])
        raise ArtifactError(f"{name}: expected {expected} artifact, found {manifest.kind!r}; name another input")
    if manifest.format != FORMAT:
        raise ArtifactError(f"{name}: artifact format {manifest.format}, this version reads {FORMAT}")
    _refuse_incomplete(manifest, name)
    for file, entry in manifest.files.items():
        _verify(path, file, entry)
    return Artifact(path, manifest, origin)


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
    return parse_manifest(content, str(path / MANIFEST))


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
    if not disk.wait_for_file(path):
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
