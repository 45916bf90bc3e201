"""Versions of registered models: register, find, fetch. What moves an alias is in aliases.py."""

import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts.artifact import Artifact, digest_of
from pipeline.artifacts.manifest import MANIFEST, Manifest
from pipeline.errors import ArtifactError, TrackingError
from pipeline.log import logger
from pipeline.registry import aliases, cache
from pipeline.registry.cache import DIGEST
from pipeline.registry.cache import Version as Version
from pipeline.text import printable
from pipeline.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


# Characters of a description or a tag that every database takes
MAX_TEXT = 4900
# In a version's folder
CODEC, LINEAGE = "codec", "lineage.json"
_URI = re.compile(r"models:/(?P<name>[A-Za-z0-9_.-]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>\d+))")


def register(name: str, package: Path, artifact: Artifact, run_id: str, tags: dict[str, str], about: str) -> Version:
    """Uploads a package to its tracked run and makes it the next version of a model.

    The same codec is one version: what an interrupted promotion registered, or a challenger's, is reused.
    """
    client = store.client()
    with store.mlflow_errors("register a model"):
        aliases.ensure_model(client, name)
        same = client.search_model_versions(f"name='{name}' and tags.`artifact.digest` = '{artifact.digest}'")
        if same:
            found = max(same, key=lambda version: int(version.version))
        else:
            client.log_artifacts(run_id, str(package), "model")
            source = f"{client.get_run(run_id).info.artifact_uri}/model"
            known = tags | {"artifact.digest": artifact.digest}
            found = client.create_model_version(name, source, run_id, tags=known, description=about[:MAX_TEXT])
    return _described(found)


def tag(version: Version, tags: dict[str, str]) -> None:
    """Sets tags of a version."""
    client = store.client()
    with store.mlflow_errors("tag a version"):
        for key, value in tags.items():
            store.retried(partial(client.set_model_version_tag, version.name, version.number, key, value[:MAX_TEXT]))


def find(uri: str) -> Version:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for.

    If the store is unavailable: the one found at the last successful look-up on this machine, with a warning.

    Raises: ArtifactError if the URI is malformed or nothing is registered under it; TrackingError.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise ArtifactError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        client = store.reader()
    except store.NoAnswer as error:
        return _remembered(uri, error.reason)
    from mlflow.exceptions import MlflowException

    try:
        found = _described(_ask(client, parts["name"], parts["alias"], parts["version"]))
    except (MlflowException, OSError) as error:
        if store.is_unavailable(error):
            return _remembered(uri, f"{store.masked_uri()} cannot be reached ({store.first_line(error)})")
        raise ArtifactError(f"{uri}: {aliases.instead_of(client, parts['name'], parts['alias'])}") from None
    if not DIGEST.fullmatch(found.digest):
        raise ArtifactError(f"{uri}: version {found.number} was not registered by `illm promote` (no artifact digest)")
    cache.remember(uri, found)
    return found


def fetch(uri: str) -> Path:
    """The codec artifact's folder of `models:/name@alias` or `models:/name/version`, downloaded once.

    Only files that the manifest lists are downloaded, and the manifest must be the registered one.

    Raises: ArtifactError if it is not there or not what was registered; TrackingError.
    """
    version = find(uri)
    folder = cache.codec(version.digest)
    if not folder.is_dir():
        _download(uri, version, folder)
    if digest_of(folder) != version.digest:
        raise ArtifactError(f"{folder}: is not what {uri} was registered as; remove the folder to download it again")
    return folder


def ancestry(uri: str) -> list[Manifest]:
    """The manifests of everything a version was made from, as they were packed with it."""
    version = find(uri)
    kept = cache.lineage(version.digest)
    if kept is not None:
        return kept
    with tempfile.TemporaryDirectory() as scratch:
        content = _get(uri, version, LINEAGE, Path(scratch)).read_bytes()
    try:
        found = cache.parsed(content)
    except ValueError:
        raise ArtifactError(
            f"{uri}: its {LINEAGE} in {store.masked_uri()} is damaged; register the codec again"
        ) from None
    cache.keep_lineage(version.digest, content)
    return found


def needed() -> set[str]:
    """Digests of all registered versions' codecs, evaluations and ancestors."""
    client = store.reader()
    found: set[str] = set()
    with store.mlflow_errors("list versions"):
        page: str | None = ""
        while page is not None:
            versions = client.search_model_versions(max_results=1000, page_token=page or None)
            found |= {
                v.tags[tag] for v in versions for tag in ("artifact.digest", "evaluation.digest") if tag in v.tags
            }
            for version in (v for v in versions if "artifact.digest" in v.tags):
                found |= {manifest.digest for manifest in ancestry(f"models:/{version.name}/{version.version}")}
            page = versions.token or None
    return found


def _described(version: "ModelVersion") -> Version:
    digest = version.tags.get("artifact.digest", "")
    return Version(version.name, str(version.version), digest, str(version.source), version.run_id or "")


def _ask(client: "MlflowClient", name: str, alias: str | None, number: str) -> "ModelVersion":
    return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)


def _remembered(uri: str, reason: str) -> Version:
    """The version found at the last successful look-up, with a warning. Raises: TrackingError if there was none."""
    known = cache.recall(uri)
    if known is None:
        raise TrackingError(f"{uri}: {reason}; try again, or correct MLFLOW_TRACKING_URI") from None
    asked, version = known
    logger.warning(f"{reason}; using {uri} as of {printable(asked)}")
    return version


def _download(uri: str, version: Version, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{version.digest[:8]}.", dir=folder.parent))
    except OSError as error:
        raise ArtifactError(
            f"{uri}: no copy of it can be kept in {folder.parent} ({error.strerror}); set ILLM_CACHE to a folder that can be "
            "written"
        ) from None
    try:
        codec = scratch / "codec"
        codec.mkdir()
        _get(uri, version, f"{CODEC}/{MANIFEST}", scratch).rename(codec / MANIFEST)
        if digest_of(codec) != version.digest:
            raise ArtifactError(f"{uri}: the store's files are not what was registered; register the codec again")
        for name in Manifest.model_validate_json((codec / MANIFEST).read_bytes()).files:
            target = codec / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _get(uri, version, f"{CODEC}/{name}", scratch / "download").rename(target)
        try:
            codec.rename(folder)
        except OSError:
            # If it is there, another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _get(uri: str, version: Version, name: str, folder: Path) -> Path:
    """One file of a version's folder, streamed to disk."""
    import mlflow

    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = mlflow.artifacts.download_artifacts(artifact_uri=f"{version.source}/{name}", dst_path=str(folder))
    except Exception as error:
        # Artifact stores raise errors of their own kinds
        raise TrackingError(
            f"{uri}: {name} cannot be downloaded from {store.masked_uri()} ({store.first_line(error)})"
        ) from None
    return Path(found)


# Begins the names of folders in which versions are packed
SCRATCH = ".package."
