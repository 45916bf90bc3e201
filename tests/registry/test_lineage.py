"""From a codec back to the shards, here and where only manifests are."""

import json
import shutil

import pytest

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest, Parent
from pipeline.registry import lineage
from tests.conftest import assert_one_clear_line, illm_here

RUNS = "runs/smoke"


@pytest.fixture
def there(smoke_copy, monkeypatch):
    folder = smoke_copy("shard", "vqvae", "pretrain", "gan")
    monkeypatch.chdir(folder)
    return folder


def states(tree: lineage.Node) -> dict[str, str]:
    return {node.manifest.stage if node.manifest else node.role: node.state for node in tree.walk()}


def test_the_tree_goes_back_to_the_shards_with_all_files_verified(there):
    tree = lineage.trace(f"{RUNS}/gan", tars=True)
    assert states(tree) == dict.fromkeys(("gan", "pretrain", "vqvae", "shard"), "files verified")
    assert [node.role for node in tree.walk()] == ["", "codec", "shards", "labeler", "shards", "shards"]
    text = lineage.as_text(tree)
    assert text.splitlines()[0].startswith("gan ")
    assert text.count("files verified") == 4
    assert text.count("see above") == 2
    assert (there / RUNS / "gan/mlflow-run-id").read_text() in text
    plain = json.loads(lineage.as_json(tree))
    assert plain["config"]["gan_weight"] == 0.008
    assert [parent["role"] for parent in plain["parents"]] == ["codec", "labeler", "shards"]
    assert len(lineage.figure(tree).axes[0].texts) == 4 + 5  # boxes and arrows


def test_the_command_prints_and_draws(there):
    ended = illm_here("lineage", f"{RUNS}/gan", "--figure", "tree.svg", "--verify-shards", cwd=there)
    assert ended.code == 0, ended.err
    assert "labeler: vqvae" in ended.out
    assert (there / "tree.svg").read_text().count("files verified") >= 4 or (there / "tree.svg").stat().st_size > 5000
    (there / "tree.svg").write_text("mine")
    ended = illm_here("lineage", "runs/nothing", "--figure", "tree.svg", cwd=there)
    assert_one_clear_line(ended, "tree.svg: exists already; --force")
    assert (there / "tree.svg").read_text() == "mine"
    ended = illm_here("lineage", "runs/nothing", "--figure", "tree.jpg", cwd=there)
    assert_one_clear_line(ended, "tree.jpg: a figure's name ends with one of .png, .svg, .pdf")
    assert illm_here("lineage", f"{RUNS}/gan", "--figure", "tree.svg", "--force", cwd=there).code == 0
    assert "svg" in (there / "tree.svg").read_text()
    assert_one_clear_line(illm_here("lineage", "runs/nothing", cwd=there), "expected a finished artifact, found none")


def test_parents_that_moved_are_found_by_their_digest(there):
    (there / RUNS / "pretrain").rename(there / "runs/elsewhere")
    assert set(states(lineage.trace(f"{RUNS}/gan")).values()) == {"files verified"}


def test_what_is_not_here_is_told_and_what_replaced_it_is_not_taken_for_it(there):
    shutil.rmtree(there / RUNS / "vqvae")
    shutil.rmtree(there / RUNS / "pretrain/artifact")
    manifest = Manifest(kind="codec", stage="other")
    files = ("model.yaml", "weights.safetensors")
    write = lambda folder: [(folder / name).write_text("x") for name in files]
    publish(there / RUNS / "pretrain/artifact", manifest, write)
    tree = lineage.trace(f"{RUNS}/gan")
    assert states(tree) == {
        "gan": "files verified",
        "codec": "not here",
        "labeler": "not here",
        "shard": "files verified",
    }
    (problem,) = lineage.broken(tree)
    assert f"{RUNS}/pretrain: holds another artifact now" in problem


def test_a_parent_from_a_registry_is_not_asked_for(there):
    """No store here knows that model."""
    codec = Manifest(
        kind="codec", stage="gan", parents={"codec": Parent(digest="0" * 64, source="models:/illm@champion")}
    )
    files = ("model.yaml", "weights.safetensors")
    publish(there / "runs/tuned/artifact", codec, lambda folder: [(folder / name).write_text("x") for name in files])
    tree = lineage.trace("runs/tuned")
    assert states(tree) == {"gan": "files verified", "codec": "not here"}
    assert lineage.broken(tree) == []


@pytest.mark.parametrize("damaged", ["pretrain/artifact/weights.safetensors", "shard/artifact/index.json"])
def test_damage_on_the_way_is_named(there, damaged):
    path = there / RUNS / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ended = illm_here("lineage", f"{RUNS}/gan", cwd=there)
    assert "damaged" in ended.out
    assert_one_clear_line(ended, damaged, "SHA-256 differs")


def test_a_damaged_tar_is_found_when_asked_for(there):
    path = next((there / RUNS / "shard/artifact").glob("train-*.tar"))
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    assert illm_here("lineage", f"{RUNS}/gan", cwd=there).code == 0
    assert_one_clear_line(illm_here("lineage", f"{RUNS}/gan", "--verify-shards", cwd=there), path.name)


def test_a_changed_manifest_breaks_the_chain(there):
    path = there / RUNS / "pretrain/artifact/manifest.json"
    manifest = Manifest.model_validate_json(path.read_bytes())
    manifest.parents["shards"] = Parent(digest="0" * 64, source="elsewhere")
    path.write_text(manifest.model_dump_json())
    ended = illm_here("lineage", f"{RUNS}/gan", cwd=there)
    assert_one_clear_line(ended, "pretrain: holds another artifact now")
