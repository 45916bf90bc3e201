import contextlib
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from pipeline.artifacts.artifact import Artifact
from pipeline.data import shards
from pipeline.data.reader import ShardReader
from pipeline.errors import ArtifactError, DataError
from pipeline.registry import resolve
from pipeline.sharding.filters import AcceptedImage, FilterConfig, NameLists, RejectedFile, examine
from pipeline.stages import shard
from pipeline.stages.shard import StageConfig
from pipeline.storage import disk
from tests.conftest import picture, write_images

RULES = FilterConfig(min_side=64)
LISTS = NameLists.of(RULES)


def examined(folder: Path, rules: FilterConfig = RULES) -> list[AcceptedImage | RejectedFile]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [examine(str(p), "x", p.read_bytes(), rules, LISTS) for p in files]


def make(folder: Path | str, target: Path, workers: int = 1, shard_mb: float = 1000) -> Artifact:
    """Shards of a folder, made by the stage."""
    cfg = StageConfig(
        source=str(folder), min_side=64, validation_fraction=0.3, shard_mb=shard_mb, num_workers=workers, chunk_size=3
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(target.parent):  # runs/mlflow.db is written there
        return resolve.read(str(shard.run(cfg, target)), "shards")


def test_shards_hold_the_original_bytes_and_plain_webdataset_reads_them(tmp_path):
    folder = write_images(tmp_path / "photos")
    artifact = make(folder, tmp_path / "artifact")
    originals = {hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.png")}
    readers = [ShardReader(artifact, split) for split in shards.SPLITS]
    by_index = {hashlib.sha256(r.read(i)).hexdigest() for r in readers for i in range(len(r))}
    in_order = {hashlib.sha256(content).hexdigest() for r in readers for _, content in r.first(100)}
    tars = [str(p) for p in artifact.path.glob("*.tar")]
    plain = {hashlib.sha256(s["png"]).hexdigest() for s in wds.WebDataset(tars, shardshuffle=False)}
    assert by_index == in_order == plain == originals


def test_the_index_counts_bytes_and_digests_of_every_shard(tmp_path):
    artifact = make(write_images(tmp_path / "photos"), tmp_path / "artifact", shard_mb=1e-6)
    listed = [s for split in artifact.json("index.json")["splits"].values() for s in split]
    assert len(listed) == 8  # one image each, at this size
    for entry in listed:
        path = artifact.path / entry["file"]
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == disk.sha256(path)
        assert entry["table_sha256"] == disk.sha256(path.with_suffix(".jsonl"))
        assert entry["count"] == 1


@pytest.mark.slow
def test_shards_do_not_depend_on_the_number_of_workers_or_on_file_names(tmp_path):
    one = make(write_images(tmp_path / "a"), tmp_path / "one", workers=1, shard_mb=0.05)
    renamed = write_images(tmp_path / "b")
    (renamed / "image0.png").rename(renamed / "zzz.png")
    two = make(renamed, tmp_path / "two", workers=2, shard_mb=0.05)
    tars = [p.name for p in sorted(one.path.glob("*.tar"))]
    assert tars == [p.name for p in sorted(two.path.glob("*.tar"))]
    assert len(tars) > 2

    def members(artifact: Artifact) -> list[list[str]]:
        return [tarfile.TarFile(artifact.path / tar).getnames() for tar in tars]

    assert members(one) == members(two)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "zero bytes"),
        ("noise.jpg", bytes(range(256)), "not a readable image"),
        ("notes.txt", b"hello", "not an image"),
        ("tiny.png", None, "too small"),
        ("cut.png", None, "not a readable image"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, name, content, reason):
    if content is None:
        stream = io.BytesIO()
        Image.fromarray(picture(0, 20, 20) if "tiny" in name else picture(0)).save(stream, "PNG")
        content = stream.getvalue() if "tiny" in name else stream.getvalue()[:-400]
    refusal = examine(name, "x", content, RULES, LISTS)
    assert isinstance(refusal, RejectedFile)
    assert reason in refusal.reason


def test_every_promised_format_is_accepted_under_its_real_type(tmp_path):
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("TIFF", "tiff"), ("BMP", "bmp")):
        Image.fromarray(picture(1)).save(tmp_path / f"x.{suffix}", kind)
    Image.fromarray(picture(2)).save(tmp_path / "really_a_jpeg.png", "JPEG")
    found = {Path(p.path).name: p.extension for p in examined(tmp_path) if isinstance(p, AcceptedImage)}
    assert found == {
        "x.png": "png", "x.jpeg": "jpg", "x.webp": "webp", "x.tiff": "tif", "x.bmp": "bmp", "really_a_jpeg.png": "jpg",
    }  # fmt: skip


def test_a_truncated_shard_is_named(tmp_path):
    artifact = make(write_images(tmp_path / "photos"), tmp_path / "artifact")
    tar = artifact.path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-000000\.tar: \d+ bytes, expected \d+ \(truncated"):
        ShardReader(artifact, "train")


@pytest.mark.parametrize("suffix", ["tar", "jsonl"])
def test_a_link_out_of_the_folder_or_a_pipe_is_no_shard(tmp_path, suffix):
    made = make(write_images(tmp_path / "photos"), tmp_path / "artifact")
    path = made.path / f"train-000000.{suffix}"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="names a file outside its folder"):
        ShardReader(made, "train")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        ShardReader(made, "train")


def test_a_table_of_another_size_is_not_read(tmp_path):
    made = make(write_images(tmp_path / "photos"), tmp_path / "artifact")
    path = made.path / "train-000000.jsonl"
    path.chmod(0o644)
    os.truncate(path, 50 * 10**9)  # takes no room on the disk
    with pytest.raises(DataError, match="50000000000 bytes, expected"):
        ShardReader(made, "train")


def test_a_changed_byte_is_found_when_its_sample_is_read(tmp_path):
    artifact = make(write_images(tmp_path / "photos"), tmp_path / "artifact")
    reader = ShardReader(artifact, "train")
    tar = artifact.path / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[reader.sample(0)[1].offset + 50] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match="differ from the index"):
        reader.read(0)
    assert reader.read(1)


def test_an_index_cannot_name_a_file_elsewhere(tmp_path):
    artifact = make(write_images(tmp_path / "photos"), tmp_path / "artifact")
    index = artifact.json("index.json")
    index["splits"]["train"][0]["file"] = "../../etc/passwd"
    (artifact.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not the name of a shard"):
        ShardReader(artifact, "train")


def test_an_index_of_another_version_is_told(tmp_path):
    artifact = make(write_images(tmp_path / "photos"), tmp_path / "artifact")
    index = artifact.json("index.json")
    del index["splits"]["train"][0]["draws"]
    (artifact.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="written by another version"):
        ShardReader(artifact, "train")


def test_pictures_of_the_test_suite_differ():
    assert not np.array_equal(picture(0), picture(1))
