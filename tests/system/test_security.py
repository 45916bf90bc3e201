"""Hostile models and careless secrets: nothing is executed, nothing is written outside, nothing leaks."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest

from pipeline import redaction
from pipeline.artifacts.manifest import MANIFEST, Manifest
from pipeline.errors import ArtifactError, UserError
from pipeline.registry import cache, resolve, versions
from pipeline.storage import disk
from pipeline.tracking import page
from tests.conftest import CONFIGS, assert_one_clear_line, illm_here

RUNS = "runs/smoke"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def codec(smoke_copy, monkeypatch) -> Path:
    """The artifact folder of a codec, to be tampered with."""
    folder = smoke_copy("gan")
    monkeypatch.chdir(folder)
    return folder / RUNS / "gan/artifact"


def reseal(folder: Path) -> None:
    """Makes a manifest agree with files that were tampered with, as who made both would."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    for name, entry in manifest.files.items():
        entry.size, entry.sha256 = (folder / name).stat().st_size, disk.sha256(folder / name)
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def header(length: int, content: dict | bytes) -> bytes:
    told = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", length or len(told)) + told


def tensor(shape: list[int], start: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


HOSTILE_WEIGHTS = {
    "empty": b"",
    "a length beyond the file": header(2**62, b"{}"),
    "no JSON": header(0, b"{" * 100),
    "deep JSON": header(0, b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "overlapping tensors": header(0, {"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}) + bytes(12),
    "a hole": header(0, {"a": tensor([1], 8, 12)}) + bytes(12),
    "offsets beyond the file": header(0, {"a": tensor([2**40], 0, 2**42)}) + bytes(8),
    "a shape that overflows": header(0, {"a": tensor([2**33, 2**33], 0, 8)}) + bytes(8),
    "names of other things": header(0, {"../../evil": tensor([2], 0, 8)}) + bytes(8),
}


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_hostile_weights_are_refused(codec, name, tmp_path):
    (codec / "weights.safetensors").write_bytes(HOSTILE_WEIGHTS[name])
    reseal(codec)
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    ended = illm_here("compress", "photo.png", "x.illm", "--codec", f"{RUNS}/gan", cwd=tmp_path)
    assert_one_clear_line(ended, "weights.safetensors")
    assert not (tmp_path / "x.illm").exists()


@pytest.mark.parametrize("file", ["weights.safetensors", "model.yaml", MANIFEST])
def test_a_pickle_in_the_place_of_any_file_is_not_executed(codec, file, tmp_path):
    (codec / file).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    if file != MANIFEST:
        reseal(codec)
    ended = illm_here("inspect", codec, cwd=tmp_path)
    assert "Traceback" not in ended.err
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    assert_one_clear_line(illm_here("compress", "photo.png", "--codec", codec, cwd=tmp_path), file.split(".")[0])
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "yaml",
    [
        "!!python/object/apply:os.mkdir [marker]",
        "latent_channels: !!python/object/apply:os.mkdir [marker]",
        "extends: ../../../../../etc/hostname",
        "latent_channels: 100000000000",
    ],
)
def test_a_hostile_model_description_is_refused(codec, yaml, tmp_path):
    (codec / "model.yaml").write_text(yaml)
    reseal(codec)
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    assert_one_clear_line(illm_here("compress", "photo.png", "--codec", codec, cwd=tmp_path), "model.yaml")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil", "", "a//b", "./a", "a\nb"])
def test_a_manifest_names_only_files_in_its_folder(codec, name):
    manifest = json.loads((codec / MANIFEST).read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    (codec / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside its folder"):
        resolve.read(f"{RUNS}/gan", "codec")


def test_a_link_out_of_the_folder_is_refused(codec, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((codec / "weights.safetensors").read_bytes())
    (codec / "weights.safetensors").unlink()
    (codec / "weights.safetensors").symlink_to(secret)
    with pytest.raises(ArtifactError, match="outside its folder"):
        resolve.read(f"{RUNS}/gan", "codec")


@pytest.fixture
def registered(smoke, tmp_path, monkeypatch) -> Path:
    """The store's folder of a registered version, to be tampered with; nothing of it was downloaded yet."""
    for name in ("mlflow.db",):
        (tmp_path / "runs").mkdir(exist_ok=True)
        shutil.copy(smoke / "runs" / name, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    source = Path(versions.find("models:/illm-smoke/2").source)
    shutil.copytree(source, tmp_path / "kept")
    monkeypatch.setattr(versions, "_described", lambda v, made=versions._described: _moved(made(v), tmp_path / "kept"))
    return tmp_path / "kept"


def _moved(version: versions.Version, source: Path) -> versions.Version:
    return versions.Version(version.name, version.number, version.digest, str(source), version.run_id)


def below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "mlflow" not in str(p) and "kept" not in str(p)}


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil-of-a-test"])
def test_a_registry_that_names_files_elsewhere_is_refused_and_writes_nothing(registered, name, tmp_path):
    manifest = json.loads((registered / "codec" / MANIFEST).read_text())
    manifest["files"][name] = {"size": 4, "sha256": "0" * 64}
    (registered / "codec" / MANIFEST).write_text(json.dumps(manifest))
    before = below(tmp_path)
    with pytest.raises(ArtifactError, match="outside its folder"):
        versions.fetch("models:/illm-smoke/2")
    assert below(tmp_path) == before
    assert cache.codecs() == []
    assert not Path("/tmp/evil-of-a-test").exists()


def test_a_registry_whose_files_are_not_what_was_registered_is_refused(registered, tmp_path):
    (registered / "codec" / "weights.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    reseal(registered / "codec")
    with pytest.raises(ArtifactError, match="not what was registered"):
        versions.fetch("models:/illm-smoke/2")
    manifest = json.loads((registered / "codec" / MANIFEST).read_text())
    assert manifest
    assert not (tmp_path / "marker").exists()


def test_files_beside_the_manifest_are_not_even_downloaded(registered):
    (registered / "codec" / "extra.py").write_text("raise SystemExit")
    folder = versions.fetch("models:/illm-smoke/2")
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST,
        "model.yaml",
        "weights.safetensors",
        "exact_scales.safetensors",
    }


SECRETS = (
    "https://user:hunter2@example.org/photos.tar",
    "https://example.org/a.tar?X-Amz-Signature=hunter2abc&b=1",
    "s3://bucket/a?token=hunter2",
)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_config_with_a_secret_is_refused_without_repeating_it(secret, tmp_path):
    ended = illm_here("shard", CONFIGS / "shard.yaml", "run=runs/x", f"source={secret}", cwd=tmp_path)
    assert_one_clear_line(ended, "source: holds a password, token or signature")
    assert "hunter2" not in ended.err + ended.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("secret", [*SECRETS, "AKIAABCDEFGHIJKLMNOP", "ghp_" + "a" * 36])
def test_secrets_are_masked(secret):
    shown = redaction.masked(f"before {secret} after")
    assert "hunter2" not in shown
    assert "***" in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert redaction.has_secret(secret)


@pytest.mark.parametrize(
    "plain", ["runs/shard", "s3://bucket/photos/*.tar", "https://example.org:8080/a?page=2", "models:/a@b"]
)
def test_ordinary_addresses_are_left_alone(plain):
    assert redaction.masked(plain) == plain
    assert not redaction.has_secret(plain)


@pytest.mark.slow
def test_the_password_of_a_store_is_not_printed(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    ended = illm_here("history", "m", cwd=tmp_path)
    assert_one_clear_line(ended, "cannot")
    assert "hunter2" not in ended.err + ended.out
    assert "hunter2" not in page.command()
    assert page.address("7").startswith("http://")
    assert "hunter2" not in page.address("7")
    with pytest.raises(UserError) as caught:
        versions.find("models:/m@champion")
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_signatures_of_listed_urls_stay_out_of_tables_and_cards(tmp_path):
    from tests.conftest import write_images
    from tests.support.servers import serving

    secret = os.urandom(8).hex()  # not in this file, which may be part of the changes that a run records
    write_images(tmp_path / "photos", 4)
    with serving(tmp_path / "photos") as server:
        names = ["image0.png", "image2.png", "more/image1.png", "missing.png"]
        (tmp_path / "list.txt").write_text("".join(f"{server.url}/{n}?X-Amz-Signature={secret}\n" for n in names))
        words = ("source=list.txt", "validation_fraction=0.4", "max_failed_fraction=0.5")
        ended = illm_here("shard", CONFIGS / "shard.yaml", "run=runs/x", *words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    for path in [*(tmp_path / "runs/x").rglob("*"), tmp_path / "runs/mlflow.db"]:
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
