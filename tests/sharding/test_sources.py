import io
import os
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import DataError
from pipeline.sharding import archives, sources
from pipeline.sharding.items import read_item
from pipeline.sharding.sources import Source
from tests.conftest import picture, write_images
from tests.data.test_shards import make


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(seed)).save(stream, "PNG")
    return stream.getvalue()


PICTURES = {f"folder/{i}.png": png(i) for i in range(3)}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def contents(place: object) -> list[bytes]:
    found = sources.items(Source(name="x", path=str(place)))
    return [read_item(item, 10**7) for item in found]


@pytest.mark.parametrize("how", ["tar", "stored", "deflated"])
def test_archives_are_read_without_unpacking(tmp_path, how):
    if how == "tar":
        path = write_tar(tmp_path / "a.tar", PICTURES)
    else:
        path = write_zip(tmp_path / "a.zip", PICTURES, zipfile.ZIP_STORED if how == "stored" else zipfile.ZIP_DEFLATED)
    assert contents(path) == list(PICTURES.values())
    assert list(tmp_path.iterdir()) == [path]
    inside = contents(tmp_path)  # an archive in a folder is opened as well
    assert inside == list(PICTURES.values())


@pytest.mark.slow
def test_two_members_of_one_name_are_two_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(4):
            entry = tarfile.TarInfo("same.png")
            entry.size = len(png(i))
            tar.addfile(entry, io.BytesIO(png(i)))
    made = make(tmp_path / "a.tar", tmp_path / "run")
    assert made.manifest.metrics["train_images"] + made.manifest.metrics["valid_images"] == 4


def test_globs_and_lists_name_files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    assert contents(tmp_path / "[01].png") == [png(0), png(1)]
    (tmp_path / "list.txt").write_text(f"# two of them\n2.png\n\n{tmp_path}/0.png\n")
    assert contents(tmp_path / "list.txt") == [png(2), png(0)]
    (tmp_path / "list.csv").write_text("id,path\n7,1.png\n8,2.png\n")
    assert contents(tmp_path / "list.csv") == [png(1), png(2)]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"url": ["0.png"], "id": [3]}), tmp_path / "list.parquet")
    assert contents(tmp_path / "list.parquet") == [png(0)]
    (tmp_path / "other.csv").write_text("id,name\n7,1.png\n")
    with pytest.raises(DataError, match="columns id, name; expected one called url, path"):
        contents(tmp_path / "other.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match="cannot be read as a list"):
        contents(tmp_path / "broken.parquet")


def test_files_of_a_folder_come_in_the_order_of_their_sorted_paths(tmp_path):
    for name in (
        "b/c.png",
        "b.png",
        "b-c/d.png",
        "b/c/d.png",
        "a/.hidden/x.png",
        ".x.png",
        "Z.png",
        "a/\udcff.png",
        "empty/e/f.x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name.replace("c.png", "c.jpg")).touch()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "linked.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "no")
    found = list(sources.find_files(str(tmp_path)))
    assert found == sorted(p for p in tmp_path.rglob("*") if p.is_file() and "/." not in str(p))
    assert len(found) == 8


def test_folders_that_may_not_be_read_are_left_out(tmp_path, monkeypatch):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "closed", 1)
    scandir = os.scandir

    def refused(folder: Path):
        # What the system does for everybody but the superuser
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    assert [path.parent.name for path in sources.find_files(str(tmp_path))] == ["a"]


def test_lists_have_the_lines_that_splitlines_finds(tmp_path):
    (tmp_path / "list.txt").write_bytes("a\rb\r\nc\x0bd\u2028e\n\n f \x85g".encode())
    found = [item.location for item in sources.items(Source(name="x", path=str(tmp_path / "list.txt")))]
    assert found == [f"{tmp_path}/{name}" for name in "abcdefg"]
    (tmp_path / "list.txt").write_bytes(b"a\n" * 100_000 + b"\xff")
    with pytest.raises(DataError, match="cannot be read as a list of images"):
        list(sources.items(Source(name="x", path=str(tmp_path / "list.txt"))))


def test_whatever_fsspec_opens_is_a_source(tmp_path):
    memory = fsspec.filesystem("memory")
    for name, content in PICTURES.items():
        memory.pipe(f"/bucket/{name}", content)
    memory.pipe("/bucket/.hidden/x.png", b"no")
    assert contents("memory://bucket/folder") == list(PICTURES.values())
    assert contents("memory://bucket/*/[12].png") == [png(1), png(2)]
    memory.pipe("/archive.tar", write_tar(tmp_path / "archive.tar", PICTURES).read_bytes())
    assert contents("memory://archive.tar") == list(PICTURES.values())


@pytest.mark.slow
def test_shards_can_be_sharded_again(tmp_path):
    first = make(write_images(tmp_path / "photos"), tmp_path / "first", shard_mb=0.05)
    again = make(tmp_path / "first", tmp_path / "again", shard_mb=1000)
    digests = [{line.split('"sha256": "')[1][:64] for p in a.path.glob("*.jsonl") for line in p.read_text().splitlines()}
               for a in (first, again)]  # fmt: skip
    assert digests[0] == digests[1]
    assert len(digests[0]) == 8


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "no such folder, file or pattern"),
        ("nowhere/*.png", "holds no files"),
        ("what://is/this.png*", "this|protocol"),
        ("archive.tar.gz", "unpack it to .tar first"),
        ("no.tar", "not a readable archive"),
        ("no.zip", "not a readable archive"),
    ],
)
def test_what_is_no_source_is_told(tmp_path, monkeypatch, place, told):
    monkeypatch.chdir(tmp_path)
    for name in ("archive.tar.gz", "no.tar", "no.zip"):
        (tmp_path / name).write_bytes(b"nothing that anybody would call an archive" * 100)
    with pytest.raises(DataError, match=told):
        list(sources.items(Source(name="x", path=place)))


def test_members_of_hostile_archives_are_labels_and_links_are_refused(tmp_path):
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../outside.png", "/etc/absolute.png", "fine.png"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"data"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        huge = tarfile.TarInfo("huge.png")
        huge.size = 10**12
        tar.addfile(huge)
    found = {member.name: member.problem for member in archives.members(str(path))}
    assert found["fine.png"] == ""
    assert "leads out" in found["../../outside.png"]
    assert "leads out" in found["/etc/absolute.png"]
    assert "link" in found["link.png"]
    assert "beyond the end" in found["huge.png"]


def test_an_encrypted_member_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"x" * 50}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    path.write_bytes(content)
    assert [m.problem for m in archives.members(str(path))] == ["encrypted"]


def _tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a" * 120 + ".png", "b.png"):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = 700, {"comment": "x"}
            tar.addfile(entry, io.BytesIO(bytes(700)))
    return stream.getvalue()


def _zip_bytes() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(700))
        archive.writestr("b.png", b"b" * 50)
    return stream.getvalue()


@pytest.mark.parametrize(("suffix", "whole"), [("tar", _tar_bytes()), ("zip", _zip_bytes())])
@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_archive_neither_crashes_nor_hangs(tmp_path_factory, suffix, whole, data):
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    places = st.integers(0, max(0, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=30)):
        if content:
            content[place] = value
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        found = list(sources.items(Source(name="x", path=str(path))))
    except DataError:
        return
    for item in found:
        with suppress(DataError):
            assert len(read_item(item, 10**6)) <= 10**6
