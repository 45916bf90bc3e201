"""Names that look like commands, URLs, escapes or paths elsewhere, and files that are none."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest
from pipeline.data.batch import BatchShard
from pipeline.data.loader import LoaderConfig, batches
from pipeline.data.reader import ShardReader
from pipeline.errors import DataError, UnreachableError
from pipeline.evaluation.held_out import HeldOut
from pipeline.registry import resolve
from pipeline.sharding import sources
from pipeline.sharding.items import read_item
from pipeline.sharding.sources import Source
from pipeline.stages import shard
from pipeline.stages.shard import StageConfig
from tests.conftest import picture, write_images
from tests.data.test_shards import make
from tests.sharding.test_sources import write_tar
from tests.support.ranks import free_port
from tests.support.servers import serving


@pytest.mark.parametrize("name", ["pipe:touch PWNED;#x", "file:x", "s3:/bucket", "a::file:"])
def test_a_folder_is_a_folder_whatever_its_name_looks_like(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / name / "photos")
    write_tar(tmp_path / name / "more.tar", {"a.png": (tmp_path / name / "photos/image0.png").read_bytes()})
    (tmp_path / name / "list.txt").write_text("photos/image0.png\nmore.tar\n")
    for source, count in (("photos", 8), ("photos/*.png", 4), ("more.tar", 1), ("list.txt", 2)):
        found = [read_item(item, 10**6) for item in sources.items(Source(name="x", path=f"{name}/{source}"))]
        assert len(found) == count
    cfg = StageConfig(source=f"{name}/photos", min_side=64, validation_fraction=0.3, num_workers=1)
    shard.run(cfg, Path(name) / "run")
    measured = HeldOut(f"{name}/run", 100)
    assert len(list(measured)) == len(measured) > 0
    loading = LoaderConfig(shards=f"{name}/run", batch_size=4, crop_size=64, num_workers=1)
    next(batches(loading, ShardReader(resolve.read(loading.shards, "shards"), "train"), 0, BatchShard(0, 4, 1), 0))
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
    with pytest.raises(DataError, match="not a table of samples"):
        next(ShardReader(artifact, "train").first(1))
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(DataError, match="not a regular file"):
        ShardReader(artifact, "train")
    index["splits"]["train"][0]["sha256"] = "../elsewhere"
    (artifact.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="make the shards again"):
        ShardReader(artifact, "train")


def test_a_list_names_what_it_may_and_the_rest_is_refused(tmp_path):
    folder = write_images(tmp_path / "photos", 2)
    content = (folder / "image0.png").read_bytes()
    os.mkfifo(folder / "fifo.png")
    (folder / "broken.tar").write_bytes(b"no archive" * 100)
    (folder / "broken.zip").write_bytes(b"no archive" * 100)
    write_tar(folder / "good.tar", {"a.png": content})
    write_tar(tmp_path / "outside.tar", {"a.png": content})
    entries = {
        "image0.png": "",
        "good.tar": "",
        "fifo.png": "cannot be read (a FIFO, socket or device)",
        "/dev/zero": "cannot be read (a FIFO, socket or device)",
        "nul\0.png": "cannot be read (",
        "nul\0.tar": "not a readable archive (",
        "broken.tar": "not a readable archive (",
        "broken.zip": "not a readable archive (",
        "missing.tar": "not a readable archive (No such file or directory)",
        f"file://{folder}/image0.png": "may not name file:// URLs",
        "memory://bucket/a.png": "may not name memory:// URLs",
        f"zip://a.png::file://{tmp_path}/a.zip": "may not name zip:// URLs",
        f"s3://bucket/a.tar::file://{tmp_path}/outside.tar": "may not name chains",
    }
    (folder / "list.txt").write_text("\n".join(entries))
    found = list(sources.items(Source(name="x", path=str(folder / "list.txt"))))
    assert len(found) == len(entries)
    for item, (entry, problem) in zip(found, entries.items(), strict=True):
        if problem:
            with pytest.raises(DataError) as told:
                read_item(item, 10**6)
            assert problem in str(told.value), entry
            assert item.name.isprintable()
        else:
            assert read_item(item, 10**6) == content


def test_a_list_on_a_server_names_no_files_here_and_its_archives_are_tried_again(tmp_path):
    folder = write_images(tmp_path / "served", 2)
    with serving(folder) as server:
        (folder / "list.txt").write_text(f"image0.png\n{folder}/image0.png\nmissing.tar\n")
        found = list(sources.items(Source(name="x", path=f"{server.url}/list.txt")))
        assert found[0].location == f"{server.url}/image0.png"
        assert read_item(found[0], 10**6) == (folder / "image0.png").read_bytes()
        assert "may not name files of this machine" in found[1].problem
        assert "not a readable archive" in found[2].problem
    (folder / "list.txt").write_text(f"image0.png\nhttp://127.0.0.1:{free_port()}/archive.tar\n")
    with pytest.raises(UnreachableError, match="cannot be reached now"):
        list(sources.items(Source(name="x", path=str(folder / "list.txt"))))


NAMES = [b"two\nlines.png", b"\x1b[2Jescape.png", b"\xff\xfe.png", b"l" * 250 + b".png", "größe 1.png".encode()]


def test_any_file_name_goes_through_sharding_and_evaluation(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate(NAMES):
        Image.fromarray(picture(number)).save(tmp_path / "x.png")
        (photos / os.fsdecode(name)).write_bytes((tmp_path / "x.png").read_bytes())
        (photos / os.fsdecode(b"bad" + name[-200:])).write_bytes(b"no image")
    made = make(photos, tmp_path / "shards")
    assert capsys.readouterr().out.replace("\n", "").isprintable()
    assert made.manifest.metrics["train_images"] + made.manifest.metrics["valid_images"] == len(NAMES)
    for images in (tmp_path / "shards", only(photos, NAMES, tmp_path / "good")):
        names = [name for name, _ in HeldOut(str(images), 100)]
        assert len(set(names)) == len(names) > 0
        write = partial(touch_all, names)
        made = publish(tmp_path / f"{images.name}.artifact", Manifest(kind="evaluation"), write)
        assert len(resolve.read(str(made.path), "evaluation").manifest.files) == len(names) + 2


def touch_all(names: list[str], folder: Path) -> None:
    """What an evaluation of images of these names consists of."""
    for file in ("totals.json", "per_image.csv", *(f"{name}.illm" for name in names)):
        (folder / file).touch()


def only(photos: Path, names: list[bytes], target: Path) -> Path:
    """A folder with some of the files of another one."""
    target.mkdir()
    for name in names:
        (target / os.fsdecode(name)).write_bytes((photos / os.fsdecode(name)).read_bytes())
    return target
