"""What stages read: `runs/x`, a URL, `models:/NAME@ALIAS` or `shipped:QUALITY` becomes a verified artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pipeline.artifacts.artifact import Artifact, manifest_at, read_folder
from pipeline.artifacts.manifest import MANIFEST, Kind, parse_manifest
from pipeline.artifacts.run_folder import Inputs
from pipeline.config import Config, inputs
from pipeline.errors import ArtifactError, DataError, UserError
from pipeline.registry import shipped
from pipeline.storage import cache, disk, fetch


def path_of(name: str) -> Path:
    """The artifact folder that `runs/x`, `runs/x/artifact`, `models:/name@alias` or a URL stands for."""
    return _located(name)[0]


def _located(name: str) -> tuple[Path, str]:
    """The folder and, if it is a copy of what is elsewhere, the URL."""
    if name.startswith("models:/"):
        # Imports mlflow
        from pipeline.registry import versions

        return versions.fetch(name), ""
    if name.startswith(shipped.PREFIX):
        return shipped.folder(name), ""
    if "://" in name:
        return mirror(name)
    path = Path(name)
    return path / "artifact" if (path / "artifact").is_dir() else path, ""


def read(name: str, *kinds: Kind) -> Artifact:
    """The artifact that `name` stands for, after checking that it is of one of the kinds, if any are named, and the digest
    of every file.

    Raises: ArtifactError saying what is missing, of another kind, or damaged.
    """
    if "://" not in name and not name.startswith(("models:/", shipped.PREFIX)):
        disk.wait_for_file(Path(name) / MANIFEST, Path(name) / "artifact" / MANIFEST)
    path, origin = _located(name)
    return read_folder(path, name, kinds, origin)


def kind_of(name: str) -> Kind:
    """The kind of the artifact that `name` stands for. Raises: ArtifactError if there is none."""
    return manifest_at(path_of(name), name).kind


def read_inputs(cfg: Config, facts: dict[str, str] | None = None) -> Inputs:
    """Reads and verifies every artifact that a config names; an artifact's role is the last part of its key.

    Raises: UserError that names all that cannot be used.
    """
    named = {key.rpartition(".")[2]: (str(value), cast(Kind, marker.kind)) for key, value, marker in inputs(cfg)}
    return Inputs(read_all(named), facts or {})


def read_all(named: Mapping[str, tuple[str, Kind]]) -> dict[str, tuple[str, Artifact]]:
    """Role -> name and verified artifact. Raises: UserError that names all that cannot be used."""
    found: dict[str, tuple[str, Artifact]] = {}
    refused: list[tuple[str, UserError]] = []
    for role, (name, kind) in named.items():
        try:
            found[role] = (name, read(name, kind))
        except UserError as error:
            refused.append((role, error))
    if len(refused) == 1:
        raise refused[0][1]
    if refused:
        listed = "\n".join(f"  {role}: {error}" for role, error in refused)
        raise ArtifactError(f"{len(refused)} input artifacts cannot be used, {len(refused)} problem(s):\n{listed}")
    return found


def mirror(url: str) -> tuple[Path, str]:
    """A local copy of an artifact's manifest and the files it lists (of shards: the index), and the artifact's URL.

    Raises: ArtifactError if there is no artifact at `url` or `url`/artifact.
    """
    reasons = []
    for base in (url.rstrip("/"), f"{url.rstrip('/')}/artifact"):
        try:
            content = fetch.content(f"{base}/{MANIFEST}")
        except DataError as error:
            reasons.append(str(error))
            continue
        manifest = parse_manifest(content, f"{base}/{MANIFEST}")
        folder = cache.home() / "artifacts" / manifest.digest
        folder.mkdir(parents=True, exist_ok=True)
        for name, entry in manifest.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with disk.exclusive_lock(folder / f".{Path(name).name}.lock"):
                if not (folder / name).is_file() or disk.sha256(folder / name) != entry.sha256:
                    fetch.download(f"{base}/{name}", folder / name, entry.size, entry.sha256)
        disk.write_atomic(folder / MANIFEST, content)
        return folder, base
    raise ArtifactError(f"{url}: expected an artifact there; {reasons[0]}")
