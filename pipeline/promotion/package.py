"""What is registered: the codec's artifact, a model card, its ancestors' manifests, and how MLflow loads it. No pickle."""

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from pipeline import __version__
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.manifest import Manifest
from pipeline.evaluation.comparison import Interval
from pipeline.models import serialization
from pipeline.promotion.serving import COLUMN
from pipeline.registry import lineage
from pipeline.registry.versions import CODEC, LINEAGE

REQUIREMENTS = ("torch", "compressai", "numpy", "pillow", "safetensors", "mlflow")
LIMITS = (
    "Its files decode to the same symbols on every machine; pixels may differ by a level where processors round differently.",
    "Details are invented where bits are few: not for medical, forensic or other uses in which a detail must be true.",
    "8-bit RGB; transparency is kept, without loss.",
)


Results = tuple[str, int, Mapping[str, Interval]]


def weights_mb(artifact: Artifact) -> float:
    """Size of a codec's weights."""
    return artifact.manifest.files[serialization.WEIGHTS].size / 1e6


def pack(
    folder: Path,
    name: str,
    artifact: Artifact,
    results: Results,
    license: str,
    limits: Sequence[str],
) -> str:
    """Writes the folder that is registered; returns its model card.

    results: what it was measured on, on how many images, and metric -> mean with interval.
    """
    import mlflow
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    column = Schema([ColSpec(DataType.binary, COLUMN)])
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module="pipeline.promotion.serving",
        signature=ModelSignature(inputs=column, outputs=column),
        input_example=pandas.DataFrame({COLUMN: [_example()]}),
        pip_requirements=[f"illm-pipeline=={__version__}", *(f"{r}=={metadata.version(r)}" for r in REQUIREMENTS)],
    )
    shutil.copytree(artifact.path, folder / CODEC, copy_function=_link)
    ancestors = lineage.manifests(artifact)
    written = [json.loads(manifest.model_dump_json()) for manifest in ancestors]
    (folder / LINEAGE).write_text(json.dumps(written, indent=1), encoding="utf-8")
    card = _card(name, artifact, ancestors, results, license, [*limits, *LIMITS])
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card


def _link(source: str, target: str) -> None:
    """Weights are large; a link costs nothing where both places are on one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _example() -> bytes:
    """A small image file."""
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), axis=-1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _card(
    name: str, artifact: Artifact, ancestors: Sequence[Manifest], results: Results,
    license: str, limits: Sequence[str],
) -> str:  # fmt: skip
    codec = serialization.load_codec(artifact)
    images, num_images, intervals = results
    template = jinja2.Environment(trim_blocks=False).from_string(
        (resources.files("pipeline.promotion") / "model_card.md").read_text(encoding="utf-8")
    )
    return template.render(
        name=name,
        stage=artifact.manifest.stage,
        digest=artifact.digest,
        bitstream_id=codec.bitstream_id().hex(),
        parameters=sum(p.numel() for p in codec.parameters()),
        weights_mb=weights_mb(artifact),
        license=license,
        version=__version__,
        images=images,
        num_images=num_images,
        intervals=intervals,
        data=[_data(manifest) for manifest in ancestors if manifest.kind == "shards"] or ["not recorded"],
        training=[_training(m) for m in [artifact.manifest, *ancestors] if m.kind in ("codec", "labeler")],
        limits=limits,
    )


def _data(manifest: Manifest) -> str:
    counts = ", ".join(f"{value:g} {name}" for name, value in manifest.metrics.items() if value is not None)
    return f"shards `{manifest.digest[:12]}` from {manifest.config.get('source') or 'several sources'}: {counts}"


def _training(manifest: Manifest) -> str:
    keys = ("fit.steps", "data.batch_size", "data.crop_size", "seed", "rate.bpp", "gan_weight")
    told = ", ".join(f"{key} {manifest.config[key]}" for key in keys if manifest.config.get(key) is not None)
    return f"{manifest.stage} `{manifest.digest[:12]}` ({manifest.created}, version {manifest.version}): {told}"
