"""`illm prune`: what no registered version and no unfinished run needs any more."""

import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.artifacts.artifact import manifest_at
from pipeline.artifacts.manifest import MANIFEST, Manifest
from pipeline.artifacts.run_folder import RUN_FILE
from pipeline.errors import ArtifactError
from pipeline.registry import cache, versions
from pipeline.registry.versions import SCRATCH
from pipeline.tracking import store

# Folders below the given one in which runs are looked for
DEPTH = 6


@dataclass(frozen=True)
class Leftover:
    """A folder that can be removed, and why."""

    path: Path
    reason: str
    bytes: int


def find(folder: Path, older_than_days: float) -> list[Leftover]:
    """What can be removed below `folder`, if nothing in it has changed for this long.

    Kept are: unfinished runs with their checkpoints, inputs and trials, and every artifact that a registered version was made from,
    evaluated with or promoted by, whatever its age.

    Raises: ArtifactError if there is no such folder; TrackingError if the registry is unavailable; then nothing is listed.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected the one that holds the runs, for instance runs")
    places = sorted(p.parent for depth in range(DEPTH) for p in folder.glob("*/" * depth + RUN_FILE))
    finished = {place: manifest for place in places if (manifest := _manifest(place / "artifact")) is not None}
    registered = versions.needed()
    needed = _needed(places, finished, registered)
    found = []
    unfinished = {place for place in places if place not in finished}
    for place, manifest in finished.items():
        if unfinished.intersection(place.parents):
            # A trial of an unfinished sweep
            continue
        if manifest.digest not in needed:
            found.append((place / "artifact", f"{manifest.kind}: no registered version and no unfinished run needs it"))
        found += [(place / name, "of a finished run") for name in ("checkpoints", "work") if (place / name).is_dir()]
    for place in places:
        found += [(path, "left by a process that was killed") for path in place.glob(".artifact.*")]
    found += [(path, "left by a promotion that was killed") for path in store.HOME.glob(f"{SCRATCH}*")]
    for path in cache.codecs():
        if path.name not in registered:
            found.append((path, "copy of a version that is not registered any more"))
    if (formerly := store.HOME / "registry-cache").is_dir():
        found.append((formerly, f"copies that earlier versions of illm kept here; now they are in {cache.folder()}"))
    limit = time.time() - older_than_days * 86400
    return [Leftover(p, why, size) for p, why in found for size, changed in [_size(p)] if changed <= limit]


def as_text(leftovers: list[Leftover]) -> str:
    """One line per folder, and their size together."""
    lines = [f"{leftover.bytes / 1e6:10.1f} MB  {leftover.path}  ({leftover.reason})" for leftover in leftovers]
    return "\n".join([*lines, f"{sum(leftover.bytes for leftover in leftovers) / 1e6:10.1f} MB  in all"])


def remove(leftovers: list[Leftover]) -> None:
    """Removes them. An artifact loses its manifest first, so that what is half removed is not an artifact."""
    for leftover in leftovers:
        (leftover.path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(leftover.path)


def _needed(places: list[Path], finished: dict[Path, Manifest], registered: set[str]) -> set[str]:
    """Digests of all artifacts that have to stay."""
    by_digest = {manifest.digest: manifest for manifest in finished.values()}
    waiting = list(registered)
    for place in places:
        if place not in finished:
            waiting += list(_inputs(place))
    # A promotion's record is small, and is what a version's history refers to.
    waiting += [manifest.digest for manifest in finished.values() if manifest.kind == "promotion"]
    needed: set[str] = set()
    while waiting:
        digest = waiting.pop()
        if digest not in needed:
            needed.add(digest)
            waiting += [parent.digest for parent in by_digest[digest].parents.values()] if digest in by_digest else []
    return needed


def _inputs(place: Path) -> Iterator[str]:
    """Digests that an unfinished run's record names as inputs."""
    try:
        flat = yaml.safe_load((place / RUN_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return
    if isinstance(flat, dict):
        yield from (str(value) for key, value in flat.items() if str(key).startswith("(input "))


def _manifest(path: Path) -> Manifest | None:
    try:
        return manifest_at(path, str(path))
    except ArtifactError:
        return None


def _size(path: Path) -> tuple[int, float]:
    """Bytes below a folder, and when anything in it last changed."""
    found = []
    for entry in [path, *path.rglob("*")]:
        # Removed by another process meanwhile
        with suppress(FileNotFoundError):
            found.append(entry.lstat())
    return sum(s.st_size for s in found if not stat.S_ISDIR(s.st_mode)), max(
        (s.st_mtime for s in found), default=time.time()
    )
