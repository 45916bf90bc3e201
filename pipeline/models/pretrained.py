"""Third-party weights: where they are, how they are verified, where they come from. Nothing loads unverified."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.storage import disk

Name = Literal["alexnet", "vgg16", "inception"]


@dataclass(frozen=True)
class WeightsFile:
    """A file whose name ends, as usual for torch.hub, in the first eight hex digits of its SHA-256.

    `features_sha256` is of its convolutions alone: every `features.N.weight` and `.bias` in that order, fp32, little-endian.
    A file that holds just those, `NAME_features.safetensors`, serves as well: of these networks only convolutions are used.
    """

    file: str
    url: str
    use: str
    features_sha256: str = ""

    @property
    def sha256_prefix(self) -> str:
        return Path(self.file).stem.rsplit("-", 1)[1]


FILES: dict[Name, WeightsFile] = {
    "alexnet": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "LPIPS",
        "2b566cc3a4d6f0a7343701af22f461f1ac3dcd03a3ac28cce10968a1d3c85fdc",
    ),
    "vgg16": WeightsFile(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "DISTS and VGG-FD/64",
        "40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6",
    ),
    "inception": WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "FID and KID",
    ),
}


def folder() -> Path:
    """The cache folder that torch.hub uses: $TORCH_HOME/hub/checkpoints, by default under ~/.cache/torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints"


def find(name: Name) -> Path | None:
    """The verified file, else one with the same convolutions alone, else None.

    Raises: ArtifactError if a file of that name has another digest.
    """
    wanted = FILES[name]
    path = folder() / wanted.file
    if not path.is_file():
        return _find_features(name)
    if not disk.sha256(path).startswith(wanted.sha256_prefix):
        raise ArtifactError(
            f"{path}: its SHA-256 does not start with {wanted.sha256_prefix}; remove it, then `make fetch-weights`"
        )
    return path


def convolutions(path: Path) -> dict[str, Tensor]:
    """`features.N.weight` and `.bias` of a file that `find` returned."""
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value for name, value in state.items() if name.startswith("features.")}


def features_file(name: Name) -> str:
    """The name of a file with a network's convolutions alone."""
    return f"{name}_features.safetensors"


def read_features(name: Name, path: Path) -> dict[str, Tensor]:
    """The convolutions of a file that has them alone. Raises: ArtifactError if they are not the known ones."""
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be used ({error}); remove it") from None
    check_features(name, tensors, path)
    return tensors


def check_features(name: Name, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises: ArtifactError that names `path` if the tensors are not a network's known convolutions."""
    wanted = FILES[name].features_sha256
    try:
        found = _features_sha256(tensors)
    except ValueError as error:
        raise ArtifactError(f"{path}: cannot be used ({error}); remove it") from None
    if found != wanted:
        raise ArtifactError(f"{path}: the SHA-256 of its convolutions is {found}, expected {wanted}; remove it")


def _find_features(name: Name) -> Path | None:
    path = folder() / features_file(name)
    if not FILES[name].features_sha256 or not path.is_file():
        return None
    read_features(name, path)
    return path


def _features_sha256(tensors: dict[str, Tensor]) -> str:
    """Digest of convolutions, by their numbers alone: layers in order, each weight before its bias.

    Raises: ValueError if a tensor has another name than torchvision's.
    """
    places: dict[tuple[int, bool], Tensor] = {}
    for name, value in tensors.items():
        found = re.fullmatch(r"features\.(\d+)\.(weight|bias)", name)
        if not found:
            raise ValueError(f"it has {name!r}, expected features.N.weight and features.N.bias alone")
        places[int(found[1]), found[2] == "bias"] = value
    digest = hashlib.sha256()
    for _, value in sorted(places.items(), key=lambda item: item[0]):
        digest.update(value.float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def how_to_get(name: Name) -> str:
    """One line for a user who lacks the file."""
    wanted = FILES[name]
    return (
        f"{folder() / wanted.file} is missing (SHA-256 starts with {wanted.sha256_prefix}), so {wanted.use} cannot be "
        "computed; `illm fetch-weights` fills that folder"
    )
