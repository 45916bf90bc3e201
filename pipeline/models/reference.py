"""`illm import-reference` and `illm export-reference`: checkpoints of the published implementation, in and out."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import config
from pipeline.artifacts.artifact import Artifact, publish
from pipeline.artifacts.manifest import Manifest
from pipeline.errors import ArtifactError
from pipeline.models import fixed_point, serialization
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.models.reference_keys import export_state, import_state
from pipeline.models.tables import MAX_SYMBOL, checked_tables
from pipeline.storage import disk, outputs

# What a later export needs to write the same file again
EXTRAS, ORIGIN = "reference.safetensors", "reference.yaml"
Names = Literal["as-imported", "old", "new"]


def import_file(file: Path, kind: Literal["codec", "labeler"], folder: Path, overrides: Sequence[str]) -> str:
    """Publishes the network in `file` as an artifact in `folder`; returns lines for the user.

    `overrides` change the architecture, which is the published one by default. Missing entropy tables are built.
    Raises: ArtifactError if the file is not a state dict of that architecture, or `folder` has an artifact.
    """
    if (folder / "artifact").exists():
        raise ArtifactError(f"{folder / 'artifact'}: exists already and is never overwritten; choose another --output")
    cls: type[CodecConfig] | type[LabelerConfig] = CodecConfig if kind == "codec" else LabelerConfig
    cfg = config.parse(cls, {}, overrides, "import-reference")
    try:
        found = import_state(_load(file), cfg)
        module = _codec(cfg, found.state) if isinstance(cfg, CodecConfig) else _labeler(cfg, found.state)
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}") from None

    def write(scratch: Path) -> None:
        if isinstance(module, Codec) and isinstance(cfg, CodecConfig):
            serialization.save_codec(scratch, module, cfg)
        else:
            serialization.save(scratch, module, cfg)
        save_file({name: value.contiguous() for name, value in found.extras.items()}, scratch / EXTRAS)
        serialization.share_like(scratch / serialization.MODEL, scratch / EXTRAS)
        (scratch / ORIGIN).write_text(yaml.safe_dump({"old_names": found.old_names}), encoding="utf-8")

    origin = {"file": file.name, "sha256": disk.sha256(file)}
    manifest = Manifest(kind=kind, stage="import-reference", config=origin | config.flatten(cfg))
    artifact = publish(folder / "artifact", manifest, write)
    lines = [f"{kind} with {len(found.state)} tensors from {file}: {artifact.path}"]
    if found.ignored:
        lines.append(f"{len(found.ignored)} tensors of other networks were left out, for instance {found.ignored[0]}")
    return "\n".join(lines)


def export_file(artifact: Artifact, file: Path | None, names: Names, force: bool = False) -> str:
    """Writes a codec or labeler artifact as the reference's state dict; returns a line for the user.

    file: None is standard output. Raises: OutputError if `file` exists, ArtifactError for light transforms.
    """
    kind = artifact.manifest.kind
    if kind == "codec" and serialization.model_config(artifact, CodecConfig).transforms != "published":
        raise ArtifactError(
            "its transforms are light, and the authors' code knows the published ones alone; train with transforms: published"
        )
    module = serialization.load_codec(artifact) if kind == "codec" else serialization.load_labeler(artifact)
    extras: dict[str, Tensor] = {}
    old_names = False
    if {EXTRAS, ORIGIN} <= artifact.manifest.files.keys():
        extras = load_file(artifact.path / EXTRAS)
        old_names = config.read_yaml(artifact.path / ORIGIN)["old_names"]
    if names != "as-imported":
        old_names = names == "old"
    state = export_state(module.state_dict(), module.cfg, extras, old_names)
    stream = io.BytesIO()
    torch.save(state, stream)
    outputs.write(file, stream.getvalue(), force)
    return f"{file or 'standard output'}: {len(state)} tensors of a {kind}"


def _codec(cfg: CodecConfig, state: dict[str, Tensor]) -> Codec:
    codec = Codec(cfg)
    codec.load_weights(state)
    # building tables from other quantiles would never end
    quantiles = codec.hyper_entropy.quantiles
    if not all(bool(p.isfinite().all()) for p in codec.parameters()) or bool((quantiles.abs() > MAX_SYMBOL).any()):
        raise ArtifactError(
            f"holds weights that are not finite, or quantiles beyond {MAX_SYMBOL}: no trained codec has them"
        )
    try:
        if all(state[f"{model}._quantized_cdf"].numel() for model in ("entropy", "hyper_entropy")):
            codec.exact_scales = fixed_point.exact_scales(codec, checked_tables(codec)[0])
        else:
            codec.update_tables()
    except ValueError as error:
        raise ArtifactError(str(error)) from None
    return codec


def _labeler(cfg: LabelerConfig, state: dict[str, Tensor]) -> Labeler:
    labeler = Labeler(cfg)
    labeler.load_state_dict(state)
    return labeler


def _load(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise ArtifactError("no such file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"not a file of tensors alone, and nothing else is unpickled ({reason}); save its state dict by itself"
        ) from None
    if not isinstance(content, dict):
        raise ArtifactError(f"holds a {type(content).__name__}, expected a state dict")
    return content
