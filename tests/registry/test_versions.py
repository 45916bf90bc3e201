"""Look-ups in a real registry in a SQLite file: what they leave behind, what they remember, and what they say."""

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest, Parent
from pipeline.errors import ArtifactError, RegistryChanged, TrackingError
from pipeline.registry import aliases, cache, lineage, resolve, versions
from pipeline.text import printable
from pipeline.tracking import store
from tests.conftest import assert_one_clear_line, illm_here
from tests.support.ranks import free_port


def registered(folder: Path, name: str, weights: str) -> None:
    """Registers a codec whose files are in `folder`, and makes it the champion."""
    ancestor = Manifest(kind="shards", stage=f"shards of {weights}")
    package = folder / "package"
    given = {"shards": Parent(digest=ancestor.digest, source="elsewhere")}

    def write(to: Path) -> None:
        (to / "model.yaml").write_text("")
        (to / "weights.safetensors").write_text(weights)

    codec = publish(package / "codec", Manifest(kind="codec", stage="pretrain", parents=given), write)
    (package / "lineage.json").write_text(json.dumps([json.loads(ancestor.model_dump_json())]))
    client = store.client()
    aliases.ensure_model(client, name)
    client.create_model_version(name, str(package), None, tags={"artifact.digest": codec.digest})
    aliases.move(name, "champion", "1", "promote", "why", "")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A folder with a store in which `m` is registered."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        registered(folder, "m", "first")
    return folder


@pytest.fixture
def here(filled, tmp_path, monkeypatch) -> Path:
    """A working folder with a copy of that store, and a cache of its own."""
    monkeypatch.setenv("ILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "here"
    (folder / "runs").mkdir(parents=True)
    shutil.copy(filled / "runs/mlflow.db", folder / "runs/mlflow.db")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """A working folder with a photo, and without a store."""
    monkeypatch.setenv("ILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "nowhere"
    (folder / "photos").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "photos/photo.png")
    monkeypatch.chdir(folder)
    return folder


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


READING = (
    ("compress", "photos/photo.png", "x.illm", "--codec", "models:/m@champion"),
    ("history", "m"),
    ("lineage", "models:/m@champion"),
    ("compare", "champion", "previous", "--images", "photos"),
    ("prune", "photos"),
    ("rollback", "m", "--reason", "test"),
)


@pytest.mark.parametrize("words", READING, ids=lambda words: words[0])
def test_a_look_up_where_there_is_no_registry_says_so_and_makes_nothing(nowhere, words):
    before = below(nowhere)
    ended = illm_here(*words, cwd=nowhere)
    assert_one_clear_line(ended, "no registry here", str(nowhere / "runs/mlflow.db"), "MLFLOW_TRACKING_URI")
    assert below(nowhere) == before


@pytest.mark.slow
@pytest.mark.parametrize("words", [("history", "m"), ("lineage", "models:/m@champion"), ("prune", "runs")])
def test_a_look_up_in_a_registry_leaves_nothing_in_the_folder(here, words):
    (here / "runs/.mlflow.db.lock").unlink(missing_ok=True)
    before = below(here)
    ended = illm_here(*words, cwd=here)
    assert ended.code == 0, ended.err
    assert below(here) == before


def test_what_is_registered_instead_is_named(here):
    with pytest.raises(ArtifactError, match=r"nothing is registered under that name at .*; there is m@champion"):
        versions.find("models:/illm@champion")
    with pytest.raises(ArtifactError, match=r"has no alias 'previous' at .*; it has champion \(version 1\)"):
        versions.find("models:/m@previous")
    with pytest.raises(ArtifactError, match=r"has no such version at .*; it has champion \(version 1\)"):
        versions.find("models:/m/7")
    with pytest.raises(ArtifactError, match=r"no such registered model at .*; there is m@champion"):
        aliases.history("illm", "champion")


def test_a_name_is_remembered_for_the_store_that_said_it_only(here, monkeypatch):
    found = versions.find("models:/m@champion")
    assert cache.recall("models:/m@champion")[1] == found
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="cannot be reached"):
        versions.find("models:/m@champion")
    theirs = cache.folder()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.copytree(cache.folder(), theirs, dirs_exist_ok=True)  # a cache that was copied by hand
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert cache.recall("models:/m@champion") is None


def test_a_store_is_told_from_others_by_its_whole_path_and_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    found = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.add(cache.folder())
    assert len(found) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@host:5000/")
    assert store.identity() == "http://user:***@host:5000"


def test_a_server_that_was_reached_is_remembered_while_it_is_unavailable(here, monkeypatch, capsys, cli_log):
    found = versions.find("models:/m@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cache.remember("models:/m@champion", found)
    assert versions.find("models:/m@champion") == found
    told = capsys.readouterr().err
    assert "cannot be reached" in told
    assert "using models:/m@champion as of 20" in told


DAMAGE = ("", "{", "[1]", "null", "{}", '"x"', '{"asked": 1, "store": 2, "name": 3}', "\x00\xff")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_fetched_again_and_away_from_its_store_one_line(here, damage, monkeypatch):
    for words in (("lineage", "models:/m@champion"),) * 2:
        ended = illm_here(*words, cwd=here)
        assert ended.code == 0, ended.err
        assert "shards: shards of first" in ended.out
        kept = [*cache.folder().glob("names/*.json"), *cache.folder().glob("*.lineage.json")]
        assert len(kept) == 2
        for path in kept:
            path.write_bytes(damage.encode("latin-1"))
    tree = lineage.manifests(resolve.read("models:/m@champion", "codec"))  # what every promotion asks for
    assert tree == []
    names = here / "names"
    shutil.copytree(cache.folder() / "names", names)
    (names / "m@champion.json").write_bytes(damage.encode("latin-1"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shutil.copytree(names, cache.folder() / "names")
    assert_one_clear_line(illm_here("lineage", "models:/m@champion", cwd=here), "cannot be reached")


def test_without_a_cache_that_can_be_written_names_are_found_and_a_copy_is_refused_in_one_line(here, monkeypatch):
    (here / "file").touch()
    monkeypatch.setenv("ILLM_CACHE", str(here / "file"))
    assert versions.find("models:/m@champion").number == "1"
    assert [manifest.stage for manifest in versions.ancestry("models:/m@champion")] == ["shards of first"]
    with pytest.raises(ArtifactError, match=r"no copy of it can be kept in .*; set ILLM_CACHE"):
        versions.fetch("models:/m@champion")


def test_copies_in_the_cache_are_found_again_as_parents_and_pruned_when_their_version_is_gone(here):
    folder = versions.fetch("models:/m@champion")
    assert cache.codecs() == [folder]
    gone = folder.with_name("0" * 64)
    shutil.copytree(folder, gone)
    (here / "runs/registry-cache").mkdir()
    ended = illm_here("prune", "runs", "--older-than", "0", cwd=here)
    assert f"{gone}  (copy of a version that is not registered any more)" in ended.out
    assert str(folder) not in ended.out
    assert "runs/registry-cache  (copies that earlier versions of illm kept here" in ended.out


def test_names_from_a_registry_reach_the_terminal_escaped(here):
    with sqlite3.connect("runs/mlflow.db") as db:
        (text,) = db.execute("select value from params where key = 'champion.000001'").fetchone()
        change = json.loads(text) | {"why": "\x1b[31m[/red]", "who": "me\x07@host"}
        db.execute("update params set value = ? where key = 'champion.000001'", (json.dumps(change),))
    ended = illm_here("history", "m", cwd=here)
    assert ended.code == 0, ended.err
    assert "\\x1b[31m[/red]" in ended.out
    assert "me\\x07@host" in ended.out
    assert "\x1b[31m" not in ended.out
    assert printable(ended.out.replace("\n", "")) == ended.out.replace("\n", "")


def test_tags_that_two_promotions_write_at_once_are_written_by_both(here):
    version = versions.Version("m", "1", "0" * 64, "")  # this process does not open the store: they share no connection
    ready, go = os.pipe()
    children = []
    for number in range(4):
        if not (child := os.fork()):
            os.read(ready, 1)
            try:
                versions.tag(version, {f"champion.{key}": str(number) for key in range(10)})
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    os.write(go, b"x" * len(children))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_a_row_that_another_process_wrote_at_the_same_moment_is_one_line_and_another_exit_code():
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    text = "(sqlite3.IntegrityError) UNIQUE constraint failed: model_versions.name"
    with (
        pytest.raises(RegistryChanged, match="another process wrote the same at the same moment"),
        store.mlflow_errors("x"),
    ):
        raise MlflowException(text, BAD_REQUEST)
    tries = []

    def write() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise MlflowException(text, BAD_REQUEST)

    store.retried(write)
    assert len(tries) == 3
