import json
import os
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import PositiveInt
from torch.nn import Linear

from pipeline.artifacts import run_folder
from pipeline.artifacts.artifact import Artifact, publish
from pipeline.artifacts.manifest import Manifest, Parent
from pipeline.config import Config
from pipeline.errors import ArtifactError, TakenOver
from pipeline.models import serialization
from pipeline.registry import resolve
from pipeline.storage import disk


class StageConfig(Config):
    stage: str = "pretrain"
    steps: PositiveInt = 3


def files_of_a_codec(folder: Path, text: str = "hello") -> None:
    for name in ("model.yaml", "weights.safetensors", "a.txt"):
        (folder / name).write_text(text)


def published(target: Path, text: str = "hello", **manifest: object) -> Artifact:
    return publish(target, Manifest(kind="codec", **manifest), lambda folder: files_of_a_codec(folder, text))


def test_what_was_published_is_read_back_verified(tmp_path):
    done = published(tmp_path / "run" / "artifact", metrics={"val/bpp": 0.5, "odd": float("nan")})
    for name in ("run", "run/artifact"):
        assert resolve.read(str(tmp_path / name), "codec").digest == done.digest
    assert resolve.read(str(tmp_path / "run"), "codec").manifest.metrics["val/bpp"] == 0.5


def test_the_digest_follows_content_and_parents_but_not_time_or_place(tmp_path):
    one, same = published(tmp_path / "1", run_id="x"), published(tmp_path / "2", run_id="y")
    other = published(tmp_path / "3", "changed")
    child = published(tmp_path / "4", parents={"shards": Parent(digest="d", source="s")})
    assert one.digest == same.digest
    assert len({one.digest, other.digest, child.digest}) == 3


def test_a_failed_write_leaves_nothing(tmp_path):
    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "artifact", Manifest(kind="codec"), write)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_never_overwritten(tmp_path):
    published(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="never overwritten"):
        published(tmp_path / "artifact", "new")


def test_what_a_live_process_writes_is_left_alone(tmp_path):
    """Two that publish the same: the first to end has published, the other is told, and neither harms the other."""

    def write(folder: Path) -> None:
        published(tmp_path / "artifact", "faster")
        assert folder.is_dir()
        files_of_a_codec(folder, "slower")

    with pytest.raises(ArtifactError, match="already there and is never overwritten"):
        publish(tmp_path / "artifact", Manifest(kind="codec"), write)
    assert (tmp_path / "artifact/a.txt").read_text() == "faster"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_run_that_lost_its_folder_publishes_nothing(tmp_path):
    def check() -> None:
        raise TakenOver("by somebody else")

    with pytest.raises(TakenOver):
        publish(tmp_path / "artifact", Manifest(kind="codec"), files_of_a_codec, check)
    assert list(tmp_path.iterdir()) == []


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        made = publish(
            tmp_path / "artifact",
            Manifest(kind="codec"),
            lambda folder: serialization.save(folder, Linear(1, 1), StageConfig()),
        )
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.path.iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a\nb.png", "names a file with unprintable characters"),
        ("a\\b", "outside its folder"),
        ("manifest.json", "outside its folder"),
    ],
)
def test_what_could_not_be_read_is_not_published(tmp_path, name, told):
    def write(folder: Path) -> None:
        files_of_a_codec(folder)
        (folder / name).write_text("x")

    with pytest.raises(ArtifactError, match=told):
        publish(tmp_path / "artifact", Manifest(kind="codec"), write)
    assert list(tmp_path.iterdir()) == []


def relisted(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes the files that a manifest lists."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda files: files.pop("weights.safetensors"),
            "does not list weights.safetensors, as a 'codec' artifact needs",
        ),
        (lambda files: files.clear(), "does not list model.yaml and weights.safetensors"),
        (lambda files: files.update({"n" * 300: files["a.txt"]}), "names a file of 300 letters, too long"),
        (lambda files: files.update({"n/" * 600 + "n": files["a.txt"]}), "too long"),
    ],
)
def test_a_manifest_lists_what_stages_read_and_no_impossible_names(tmp_path, change, told):
    relisted(published(tmp_path / "artifact").path, change)
    with pytest.raises(ArtifactError, match=told):
        resolve.read(str(tmp_path), "codec")


def test_only_listed_files_are_read_as_json(tmp_path):
    made = published(tmp_path / "artifact", "{}")
    (made.path / "more.json").write_text("{}")
    assert made.json("model.yaml") == {}
    with pytest.raises(ArtifactError, match=r"does not list more\.json"):
        made.json("more.json")


def test_a_file_too_large_for_the_memory_is_refused_unread(tmp_path):
    made = published(tmp_path / "artifact")
    os.truncate(made.path / "manifest.json", 50 * 10**9)  # takes no room on the disk
    with pytest.raises(ArtifactError, match="50000000000 bytes, expected"):
        resolve.read(str(tmp_path), "codec")


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_pipe_among_the_files_hangs_nobody(tmp_path, name):
    made = published(tmp_path / "artifact")
    (made.path / name).unlink()
    os.mkfifo(made.path / name)
    with pytest.raises(ArtifactError, match=f"{name}: missing|found none"):
        resolve.read(str(tmp_path), "codec")
    with pytest.raises(OSError, match="a FIFO, socket or device"):
        disk.content_of(made.path / name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="a FIFO, socket or device"):
            disk.content_of(tmp_path / "socket")


def test_errors_of_writing_name_the_file(small_disk):
    with pytest.raises(OSError, match="No space left") as caught:
        disk.write_atomic(small_disk / "file", bytes(200_000))
    assert caught.value.filename == str(small_disk / "file")
    assert list(small_disk.iterdir()) == []
    with pytest.raises(OSError, match="No space left") as caught:
        published(small_disk / "artifact", "x" * 200_000)
    assert str(small_disk / "artifact") in caught.value.filename


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".artifact.abc").mkdir()
    published(tmp_path / "artifact")
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: (p / "a.txt").unlink(), "missing"),
        (lambda p: (p / "a.txt").write_text("hell"), "4 bytes, expected 5"),
        (lambda p: (p / "a.txt").write_text("jello"), "SHA-256 differs"),
        (lambda p: (p / "manifest.json").write_text("{"), "damaged or foreign manifest"),
        (lambda p: (p / "manifest.json").unlink(), "expected a finished artifact, found none"),
    ],
)
def test_damage_is_named(tmp_path, damage, told):
    published(tmp_path / "artifact")
    damage(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=told):
        resolve.read(str(tmp_path), "codec")


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    published(tmp_path / "artifact")
    (tmp_path / "secret").write_text("x")
    path = tmp_path / "artifact" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": disk.sha256(tmp_path / "secret")}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside its folder"):
        resolve.read(str(tmp_path), "codec")


def test_an_artifact_of_the_wrong_kind_is_refused(tmp_path):
    published(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="expected a 'labeler' artifact, found 'codec'"):
        resolve.read(str(tmp_path), "labeler")
    with pytest.raises(ArtifactError, match="expected an 'evaluation' artifact, found 'codec'"):
        resolve.read(str(tmp_path), "evaluation")


def test_all_wrong_inputs_are_told_at_once(tmp_path):
    codec = str(published(tmp_path / "artifact").path)
    wrong = {"codec": (str(tmp_path / "gone"), "codec"), "labeler": (codec, "labeler")}
    with pytest.raises(ArtifactError) as caught:
        resolve.read_all({"shards": (codec, "shards"), **wrong})
    told = str(caught.value)
    for line in ("3 problem(s)", "shards: ", "expected a 'shards' artifact", "codec: ", "found none", "labeler: "):
        assert line in told


def test_durable_writing_replaces_at_once(tmp_path):
    path = tmp_path / "f"
    disk.write_atomic(path, b"one")
    disk.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["f"]


def test_a_run_folder_belongs_to_one_config_and_one_set_of_inputs(tmp_path):
    folder, cfg = tmp_path / "run", StageConfig()
    shards = published(tmp_path / "shards" / "artifact")
    given = run_folder.Inputs(resolve.read_all({"codec": (str(shards.path), "codec")}), {"lpips": "off"})
    assert run_folder.finished(folder, cfg) is None
    run_folder.claim(folder, cfg, given)
    run_folder.claim(folder, cfg, given)  # again, as after a restart
    assert run_folder.finished(folder, cfg) is None
    (folder / "checkpoints/step-000000001").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="steps: 3 there, 4 now"):
        run_folder.finished(folder, StageConfig(steps=4))
    with pytest.raises(ArtifactError, match=r"\(lpips\): off there, absent now"):
        run_folder.claim(
            folder,
            cfg,
            run_folder.Inputs(resolve.read_all({"codec": (str(shards.path), "codec")}), {"lpips": "absent"}),
        )
    other = published(tmp_path / "other" / "artifact", "other bytes")
    with pytest.raises(ArtifactError, match=r"\(input codec\)"):
        run_folder.claim(
            folder, cfg, run_folder.Inputs(resolve.read_all({"codec": (str(other.path), "codec")}), {"lpips": "off"})
        )


def test_a_run_without_progress_leaves_its_folder_to_another_config(tmp_path, capsys, cli_log):
    folder = tmp_path / "run"
    run_folder.claim(folder, StageConfig(steps=4), run_folder.NO_INPUTS)
    for name in ("mlflow-run-id", "tracking.jsonl", "tracking.delivered"):
        (folder / name).write_text("of the first config")
    cfg = StageConfig(steps=3)
    assert run_folder.finished(folder, cfg) is None
    run_folder.claim(folder, cfg, run_folder.NO_INPUTS)
    assert "has no progress yet; starts from scratch with steps: 4 there, 3 now" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]  # its tracked run was the first config's


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("checkpoints/step-000000005", "holds checkpoints"),
        ("measured/0", "holds measurements"),
        ("artifact", "holds an artifact"),
    ],
)
def test_nobody_is_advised_to_remove_what_took_weeks(tmp_path, made, told):
    run_folder.claim(tmp_path, StageConfig(steps=4), run_folder.NO_INPUTS)
    (tmp_path / made).mkdir(parents=True)
    for begin in (run_folder.finished, lambda folder, cfg: run_folder.claim(folder, cfg, run_folder.NO_INPUTS)):
        with pytest.raises(
            ArtifactError, match=f"{told}; choose another run=, or go back to the values there"
        ) as caught:
            begin(tmp_path, StageConfig(steps=3))
        assert "remove" not in str(caught.value)
        assert "steps: 4 there, 3 now" in str(caught.value)


def test_a_run_of_another_stage_is_called_that(tmp_path):
    run_folder.claim(tmp_path, StageConfig(stage="vqvae", steps=4), run_folder.NO_INPUTS)
    with pytest.raises(ArtifactError, match=r"this is a run of the stage vqvae, not of pretrain; choose another run=$"):
        run_folder.finished(tmp_path, StageConfig())


def test_a_finished_run_is_found_without_its_inputs(tmp_path):
    folder, cfg = tmp_path / "run", StageConfig()
    run_folder.claim(folder, cfg, run_folder.NO_INPUTS)
    publish(
        folder / "artifact", run_folder.manifest("codec", cfg, run_folder.NO_INPUTS, {"x": 1}, "id"), files_of_a_codec
    )
    assert run_folder.finished(folder, cfg) == folder / "artifact"


def test_many_may_write_the_same_file_at_the_same_time(tmp_path):
    contents = [bytes([number]) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: disk.write_atomic(tmp_path / "file", contents[n % 8]), range(200)))
    assert (tmp_path / "file").read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class Section(Config):
    of_today: int = 2


class LaterConfig(StageConfig):
    added: bool = False
    section: Section = Section()


def test_a_run_goes_on_with_a_version_that_knows_more_keys_if_they_are_left_at_their_defaults(tmp_path):
    run_folder.claim(tmp_path, StageConfig(), run_folder.NO_INPUTS)
    (tmp_path / "checkpoints/step-000000001").mkdir(parents=True)
    for changed, told in (({"added": True}, "added: "), ({"section": Section(of_today=3)}, r"section.of_today: ")):
        with pytest.raises(ArtifactError, match=rf"{told}\(absent\) there"):
            run_folder.finished(tmp_path, LaterConfig(**changed))
    assert run_folder.unlike(tmp_path, LaterConfig(), run_folder.NO_INPUTS) == []
    assert run_folder.finished(tmp_path, LaterConfig()) is None
    run_folder.claim(tmp_path, LaterConfig(), run_folder.NO_INPUTS)
    with pytest.raises(ArtifactError, match="added: False there, True now"):
        run_folder.finished(tmp_path, LaterConfig(added=True))


def test_a_key_that_is_gone_is_a_difference(tmp_path):
    run_folder.claim(tmp_path, LaterConfig(), run_folder.NO_INPUTS)
    (tmp_path / "checkpoints/step-000000001").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"added: False there, \(absent\) now"):
        run_folder.finished(tmp_path, StageConfig())
