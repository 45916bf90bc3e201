"""Names that look like commands, URLs, escapes or paths elsewhere, and files that are none."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.data import fetch, sources
from pipeline.data.loader import LoaderConfig, Share, batches
from pipeline.data.reader import ShardReader
from pipeline.data.sources import Source
from pipeline.errors import DataError
from pipeline.evaluation.held_out import HeldOut
from pipeline.stages import shard
from tests.conftest import write_images
from tests.data.test_shards import make
from tests.data.test_sources import write_tar


@pytest.mark.parametrize("name", ["pipe:touch PWNED;#x", "file:x", "s3:/bucket", "a::file:"])
def test_a_folder_is_a_folder_whatever_its_name_looks_like(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / name / "photos")
    write_tar(tmp_path / name / "more.tar", {"a.png": (tmp_path / name / "photos/image0.png").read_bytes()})
    (tmp_path / name / "list.txt").write_text("photos/image0.png\nmore.tar\n")
    for source, count in (("photos", 8), ("photos/*.png", 4), ("more.tar", 1), ("list.txt", 2)):
        found = [fetch.read(item, 10**6) for item in sources.items(Source(name="x", path=f"{name}/{source}"))]
        assert len(found) == count
    cfg = shard.StageConfig(source=f"{name}/photos", min_side=64, validation_share=0.3, workers=1)
    shard.run(cfg, Path(name) / "run")
    measured = HeldOut(f"{name}/run", 100)
    assert len(list(measured)) == len(measured) > 0
    loading = LoaderConfig(shards=f"{name}/run", batch_size=4, crop=64, workers=1)
    next(batches(loading, ShardReader(artifacts.read(loading.shards, "shards"), "train"), 0, Share(0, 4, 1), 0))
    assert not list(tmp_path.rglob("PWNED"))


def test_a_table_that_would_name_files_elsewhere_or_never_ends_is_refused(tmp_path):
    artifact = make(write_images(tmp_path / "photos"), tmp_path / "artifact")
    (table,) = artifact.path.glob("train-*.jsonl")
    hostile = table.read_bytes().replace(b'"key": "', b'"key": "../../')
    index = artifact.json("index.json")
    index["splits"]["train"][0] |= {"table_bytes": len(hostile), "table_sha256": hashlib.sha256(hostile).hexdigest()}
    (artifact.path / "index.json").write_text(json.dumps(index))
    table.unlink()
    table.write_bytes(hostile)
    with pytest.raises(DataError, match="no table of samples"):
        next(ShardReader(artifact, "train").first(1))
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(DataError, match="a FIFO, socket or device"):
        next(ShardReader(artifact, "train").first(1))
    index["splits"]["train"][0]["sha256"] = "../elsewhere"
    (artifact.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="make the shards again"):
        ShardReader(artifact, "train")
