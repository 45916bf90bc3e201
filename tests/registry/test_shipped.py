"""The codecs that are part of the package."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from pipeline.bitstream.codec import ImageCodec
from pipeline.errors import ArtifactError
from pipeline.registry import resolve, shipped
from tests.conftest import ROOT, assert_one_clear_line, illm, illm_here
from tests.models.test_networks import small_codec
from tests.support.photos import crops

QUALITIES = ("low", "medium", "high")


def test_they_are_at_most_16_mib_in_all():
    assert tuple(shipped.Quality) == QUALITIES
    assert sum(file.stat().st_size for file in shipped.HOME.rglob("*") if file.is_file()) <= 16 * 2**20


@pytest.mark.parametrize("quality", QUALITIES)
def test_each_has_the_id_by_which_its_files_find_it(quality):
    codec = ImageCodec.load(f"shipped:{quality}")
    assert codec.bitstream_id.hex() == shipped.bitstream_id_of(quality)
    assert shipped.that_reads(codec.bitstream_id[:2]) == f"shipped:{quality}"


@pytest.mark.parametrize("quality", QUALITIES)
def test_each_passed_its_gates(quality):
    decision = json.loads((ROOT / f"docs/runs/light/promoted-{quality}.json").read_text())
    assert decision["codec"] == resolve.read(f"shipped:{quality}", "codec").digest
    assert not decision["forced"]
    assert {gate["gate"] for gate in decision["gates"] if gate["holds"]} >= {"undecodable", "bpp", "psnr_db", "lpips"}
    assert False not in [gate["holds"] for gate in decision["gates"]]


def test_a_better_quality_takes_more_bytes_and_is_nearer_to_the_photo():
    photo = crops(1, 256)[0]
    sizes, errors = [], []
    for quality in QUALITIES:
        codec = ImageCodec.load(f"shipped:{quality}")
        content = codec.compress(photo)
        sizes.append(len(content))
        errors.append(np.square(codec.decompress(content).astype(float) - photo).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    # of 8-bit levels, squared: 24 dB
    assert errors[-1] < 260


def test_a_photo_goes_there_and_back_without_a_codec_being_named(tmp_path):
    Image.fromarray(crops(1, 128)[0]).save(tmp_path / "photo.png")
    for quality in ("low", "high"):
        assert illm_here("compress", "photo.png", f"{quality}.illm", "-q", quality, cwd=tmp_path).code == 0
    ended = illm_here("decompress", "low.illm", "high.illm", "-o", "back", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert Image.open(tmp_path / "back" / "low.restored.png").size == (128, 128)
    assert Image.open(tmp_path / "back" / "high.restored.png").size == (128, 128)


def test_what_pip_installs_is_all_that_is_needed(tmp_path):
    """From a wheel, in a folder of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "pipeline"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in ["pyproject.toml", "README.md", "LICENSE", "NOTICE", *listed.splitlines()]:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        assert set(listed.splitlines()) <= set(content.namelist())
        content.extractall(tmp_path / "installed")
    installed = {"PYTHONPATH": str(tmp_path / "installed")}
    where = [sys.executable, "-c", "import pipeline; print(pipeline.__file__)"]
    told = subprocess.run(where, cwd=tmp_path, env=os.environ | installed, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(tmp_path / "installed/pipeline/__init__.py")
    Image.fromarray(crops(1, 128)[0]).save(tmp_path / "photo.png")
    for words in (["compress", "photo.png"], ["decompress", "photo.illm"]):
        ended = illm(*words, cwd=tmp_path, env=installed, cold=True)
        assert ended.code == 0, ended
    assert Image.open(tmp_path / "photo.restored.png").size == (128, 128)


def test_quality_and_codec_exclude_each_other(tmp_path):
    Image.fromarray(crops(1, 64)[0]).save(tmp_path / "photo.png")
    ended = illm_here("compress", "photo.png", "-q", "low", "--codec", "runs/x", cwd=tmp_path)
    assert_one_clear_line(ended, "--quality chooses among the codecs of this package")


def test_files_of_other_codecs_are_told(tmp_path):
    content = ImageCodec(small_codec()).compress(crops(1, 64)[0])
    (tmp_path / "other.illm").write_bytes(content)
    ended = illm_here("decompress", "other.illm", cwd=tmp_path)
    assert_one_clear_line(ended, "other.illm: made by another codec than those of this package")


def test_a_file_of_another_codec_does_not_stop_the_others(tmp_path):
    (tmp_path / "a.illm").write_bytes(ImageCodec(small_codec()).compress(crops(1, 64)[0]))
    (tmp_path / "b.illm").write_bytes(ImageCodec.load("shipped:low").compress(crops(1, 64)[0]))
    ended = illm_here("decompress", "a.illm", "b.illm", "-o", "back", cwd=tmp_path)
    assert_one_clear_line(ended, "1 of 2 files failed")
    assert (tmp_path / "back" / "b.restored.png").is_file()


def test_an_empty_codec_is_none_of_the_package(tmp_path):
    Image.fromarray(crops(1, 64)[0]).save(tmp_path / "photo.png")
    ended = illm_here("compress", "photo.png", "--codec", "", cwd=tmp_path)
    assert ended.code == 2
    assert not (tmp_path / "photo.illm").exists()


def test_an_unknown_quality_is_told():
    with pytest.raises(ArtifactError, match="there are: shipped:low, shipped:medium, shipped:high"):
        resolve.read("shipped:best", "codec")
