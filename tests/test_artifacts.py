import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import PositiveInt

from pipeline import artifacts, runs
from pipeline.artifacts import Manifest, Parent
from pipeline.config import Config
from pipeline.errors import ArtifactError


class StageConfig(Config):
    stage: str = "pretrain"
    steps: PositiveInt = 3


def files_of_a_codec(folder: Path, text: str = "hello") -> None:
    for name in ("model.yaml", "weights.safetensors", "a.txt"):
        (folder / name).write_text(text)


def published(target: Path, text: str = "hello", **manifest: object) -> artifacts.Artifact:
    return artifacts.publish(target, Manifest(kind="codec", **manifest), lambda folder: files_of_a_codec(folder, text))


def test_what_was_published_is_read_back_verified(tmp_path):
    done = published(tmp_path / "run" / "artifact", metrics={"val/bpp": 0.5, "odd": float("nan")})
    for name in ("run", "run/artifact"):
        assert artifacts.read(str(tmp_path / name), "codec").digest == done.digest
    assert artifacts.read(str(tmp_path / "run"), "codec").manifest.metrics["val/bpp"] == 0.5


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
        artifacts.publish(tmp_path / "artifact", Manifest(kind="codec"), write)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_never_overwritten(tmp_path):
    published(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="never overwritten"):
        published(tmp_path / "artifact", "new")


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
        artifacts.read(str(tmp_path), "codec")


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    published(tmp_path / "artifact")
    (tmp_path / "secret").write_text("x")
    path = tmp_path / "artifact" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": artifacts.sha256(tmp_path / "secret")}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside its folder"):
        artifacts.read(str(tmp_path), "codec")


def test_an_artifact_of_the_wrong_kind_is_refused(tmp_path):
    published(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="expected a 'labeler' artifact, found 'codec'"):
        artifacts.read(str(tmp_path), "labeler")


def test_durable_writing_replaces_at_once(tmp_path):
    path = tmp_path / "f"
    artifacts.write_durably(path, b"one")
    artifacts.write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["f"]


def test_a_run_folder_belongs_to_one_config_and_one_set_of_inputs(tmp_path):
    folder, cfg = tmp_path / "run", StageConfig()
    shards = published(tmp_path / "shards" / "artifact")
    given = runs.inputs({"lpips": "off"}, codec=(str(shards.path), "codec"))
    assert runs.finished(folder, cfg) is None
    runs.claim(folder, cfg, given)
    runs.claim(folder, cfg, given)  # again, as after a restart
    assert runs.finished(folder, cfg) is None
    (folder / "checkpoints/step-000000001").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="steps: 3 there, 4 now"):
        runs.finished(folder, StageConfig(steps=4))
    with pytest.raises(ArtifactError, match=r"\(lpips\): off there, absent now"):
        runs.claim(folder, cfg, runs.inputs({"lpips": "absent"}, codec=(str(shards.path), "codec")))
    other = published(tmp_path / "other" / "artifact", "other bytes")
    with pytest.raises(ArtifactError, match=r"\(input codec\)"):
        runs.claim(folder, cfg, runs.inputs({"lpips": "off"}, codec=(str(other.path), "codec")))


def test_a_finished_run_is_found_without_its_inputs(tmp_path):
    folder, cfg = tmp_path / "run", StageConfig()
    runs.claim(folder, cfg, runs.inputs())
    artifacts.publish(folder / "artifact", runs.manifest("codec", cfg, runs.inputs(), {"x": 1}, "id"), files_of_a_codec)
    assert runs.finished(folder, cfg) == folder / "artifact"


def test_many_may_write_the_same_file_at_the_same_time(tmp_path):
    contents = [bytes([number]) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: artifacts.write_durably(tmp_path / "file", contents[n % 8]), range(200)))
    assert (tmp_path / "file").read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
