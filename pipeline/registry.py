"""Registered model versions: register, alias, fetch. With tracking.py, the only files that import mlflow."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts, tracking
from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_URI = re.compile(r"models:/(?P<name>[A-Za-z0-9_.-]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>\d+))")


def register(name: str, artifact: Artifact, run_id: str, tags: dict[str, str]) -> str:
    """Uploads an artifact to its tracked run and makes it the next version of a model; returns the version."""
    client = tracking.client()
    from mlflow.exceptions import MlflowException

    client.log_artifacts(run_id, str(artifact.path), "codec")
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description="MS-ILLM image codec; loads with `illm compress --codec`")
    source = f"{client.get_run(run_id).info.artifact_uri}/codec"
    version = client.create_model_version(name, source, run_id, tags=tags | {"artifact.digest": artifact.digest})
    return str(version.version)


def set_alias(name: str, alias: str, version: str) -> None:
    """Points an alias at a version. The last act of a promotion: until then the old version stays in place."""
    tracking.client().set_registered_model_alias(name, alias, version)


def fetch(uri: str) -> Path:
    """The artifact folder of `models:/name@alias` or `models:/name/version`, downloaded once.

    Raises: ArtifactError if the URI is malformed or nothing is registered under it.
    """
    version = _version(uri)
    digest = version.tags.get("artifact.digest", "")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ArtifactError(
            f"{uri}: version {version.version} was not registered by `illm promote` (no artifact digest)"
        )
    folder = tracking.HOME / "registry-cache" / digest
    if not folder.is_dir():
        import mlflow

        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{digest[:8]}.", dir=folder.parent))
        try:
            downloaded = Path(mlflow.artifacts.download_artifacts(artifact_uri=version.source, dst_path=str(scratch)))
            downloaded.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if artifacts.digest_of(folder) != digest:
        raise ArtifactError(f"{folder}: is not what {uri} was registered as; remove the folder to download it again")
    return folder


def _version(uri: str) -> "ModelVersion":
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise ArtifactError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    client = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        if parts["alias"]:
            return client.get_model_version_by_alias(parts["name"], parts["alias"])
        return client.get_model_version(parts["name"], parts["version"])
    except MlflowException:
        raise ArtifactError(
            f"{uri}: nothing is registered under that name at {tracking.uri()}; `illm promote` first"
        ) from None
