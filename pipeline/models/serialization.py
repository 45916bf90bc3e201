"""Networks in artifacts: weights as safetensors beside `model.yaml`, which rebuilds the network without our configs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline import config, renamed_keys
from pipeline.artifacts.artifact import Artifact, publish
from pipeline.artifacts.manifest import Manifest
from pipeline.config import Config
from pipeline.errors import ArtifactError
from pipeline.models import compact, fixed_point
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.exact_scales import ExactScales
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.models.tables import checked_tables

WEIGHTS, MODEL = "weights.safetensors", "model.yaml"
# Of codecs: the integers that choose the tables of a file's symbols
EXACT_SCALES = "exact_scales.safetensors"
C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=nn.Module)


def save(folder: Path, module: nn.Module, cfg: Config, compactly: bool = False) -> None:
    """Writes both files into `folder`. compactly: in 8 bits, see `compact`."""
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    if compactly:
        state = compact.compacted(state)
    (folder / MODEL).write_text(config.dump(cfg), encoding="utf-8")
    save_file(state, folder / WEIGHTS)
    share_like(folder / MODEL, folder / WEIGHTS)


def save_codec(folder: Path, codec: Codec, cfg: CodecConfig, compactly: bool = False) -> None:
    """Writes the files of `save`, and the integers that its compressed files are decoded with.

    compactly: the codec is one that `compact_codec` made.

    Raises: ArtifactError if these would cost more than fixed_point.MAX_COST of a file.
    """
    assert codec.exact_scales is not None
    cost = fixed_point.cost(codec, codec.exact_scales, *checked_tables(codec))
    if not cost <= fixed_point.MAX_COST:
        raise ArtifactError(
            f"tables chosen in integers would cost {100 * cost:.2f} % of a file's bits, expected at most "
            f"{100 * fixed_point.MAX_COST:g} %: the scales that this codec predicts are too extreme; train it at another rate"
        )
    save(folder, codec, cfg, compactly)
    state = {name: value.contiguous() for name, value in codec.exact_scales.state_dict().items()}
    save_file(state, folder / EXACT_SCALES, metadata={"cost": f"{cost:.3g}"})
    share_like(folder / MODEL, folder / EXACT_SCALES)


def compact_codec(codec: Codec) -> Codec:
    """The same codec with weights that 8 bits hold. Its files are not the other's: the integers follow from the weights.

    Raises: ArtifactError if no tables can be made.
    """
    rounded = Codec(codec.cfg)
    rounded.load_weights(compact.expanded(compact.compacted(codec.state_dict())))
    try:
        rounded.update_tables()
    except ValueError as error:
        raise ArtifactError(f"the codec cannot code files: {error}") from None
    return rounded.requires_grad_(False).eval()


def publish_compact(artifact: Artifact, source: str, folder: Path) -> Artifact:
    """Publishes the compact codec of an artifact, which is called `source`, in `folder`.

    Raises: ArtifactError if there is an artifact already.
    """
    if (folder / "artifact").exists():
        raise ArtifactError(f"{folder / 'artifact'}: exists already and is never overwritten; choose another folder")
    codec = compact_codec(load_codec(artifact))
    about = {"codec": source, "bitstream_id": codec.bitstream_id().hex()}
    manifest = Manifest(kind="codec", stage="compact", parents={"codec": artifact.as_parent(source)}, config=about)
    return publish(folder / "artifact", manifest, lambda scratch: save_codec(scratch, codec, codec.cfg, compactly=True))


def share_like(example: Path, file: Path) -> None:
    """Gives a file that safetensors wrote, which only its owner may read, the permissions of another one."""
    shutil.copymode(example, file)


def load_codec(artifact: Artifact) -> Codec:
    """The codec of an artifact, frozen, in eval mode, on the CPU, with its entropy tables.

    Raises: ArtifactError if the files do not fit together.
    """
    codec = _make(artifact, CodecConfig, Codec)
    _fill(artifact, codec, codec.load_weights)
    stored = artifact.path / EXACT_SCALES
    path = artifact.path / WEIGHTS
    try:
        z_tables, _ = checked_tables(codec)
        # artifacts of earlier versions have none, and the same are made of their weights on every machine
        if not stored.is_file():
            codec.exact_scales = fixed_point.exact_scales(codec, z_tables)
        else:
            path = stored
            codec.exact_scales = ExactScales.from_state(load_file(stored))
            codec.exact_scales.check_fits(
                codec.cfg.hyper_channels, codec.cfg.latent_channels, len(codec.entropy.scale_table)
            )
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {error}; get the artifact again from its source") from None
    return codec.requires_grad_(False).eval()


def load_labeler(artifact: Artifact) -> Labeler:
    """The labeler of an artifact, frozen, in eval mode, on the CPU.

    Raises: ArtifactError if the files do not fit together.
    """
    labeler = _make(artifact, LabelerConfig, Labeler)
    _fill(artifact, labeler, labeler.load_state_dict)
    return labeler.requires_grad_(False).eval()


def model_config(artifact: Artifact, cls: type[C]) -> C:
    """The architecture that an artifact's `model.yaml` describes. Raises: ArtifactError."""
    try:
        values = config.read_yaml(artifact.path / MODEL, may_extend=False)
        return cls.model_validate(renamed_keys.renamed(values, tuple(cls.model_fields), artifact.manifest.kind))
    except ValidationError as error:
        raise ArtifactError(f"{artifact.path / MODEL}: does not describe a {cls.__name__}: {error}") from None


def _make(artifact: Artifact, cls: type[C], network: Callable[[C], M]) -> M:
    """The network that `model.yaml` describes, if the weights file is large enough to fill it."""
    cfg = model_config(artifact, cls)
    # Takes no memory, whatever an untrusted file describes
    with torch.device("meta"):
        needed = sum(p.numel() * p.element_size() for p in network(cfg).parameters())
    found = (artifact.path / WEIGHTS).stat().st_size if (artifact.path / WEIGHTS).is_file() else 0
    # at least a byte per weight
    if needed > torch.float32.itemsize * found:
        raise ArtifactError(f"{artifact.path / MODEL}: describes {needed} bytes of weights, {WEIGHTS} has {found}")
    return network(cfg)


def _fill(artifact: Artifact, network: nn.Module, load_state: Callable[[dict[str, Tensor]], object]) -> None:
    path = artifact.path / WEIGHTS
    try:
        state: dict[str, Tensor] = compact.expanded(load_file(path))
        with torch.no_grad():
            load_state(state)
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{path}: does not fit its {MODEL}: {error}") from None
    for name, value in network.state_dict().items():
        if state[name].dtype != value.dtype:
            raise ArtifactError(f"{path}: {name} is {state[name].dtype}, expected {value.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArtifactError(
                f"{path}: {name} holds numbers that are not finite: its training diverged, or it is damaged"
            )
