"""All stages on the smoke configurations, as a user runs them."""

import csv
import html
import json
import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.reader import ShardReader
from pipeline.models import serialization
from pipeline.registry import resolve
from tests.conftest import CONFIGS, illm, picture

RUNS = "runs/smoke"


def run_id(folder: Path, stage: str) -> str:
    """The tracked run of a finished stage."""
    return (folder / RUNS / stage / "mlflow-run-id").read_text()


def test_the_demo_ends_with_table_report_version_and_how_to_look(smoke):
    output = (smoke / "output.txt").read_text()
    for row in ("pretrained", "fine-tuned", "jpeg", "webp"):
        assert re.search(rf"{row}[ │|]+\d+\.\d{{4}}[ │|]+\d+\.\d\d[ │|]+\d\.\d{{4}}", output), output
    assert f"{RUNS}/evaluate/artifact/report.html" in output
    assert re.search(rf"pictures +{RUNS}/try/side-by-side.png", output)
    assert "registered illm-smoke version 2 as models:/illm-smoke@champion, previous is version 1" in output
    assert "illm-smoke@champion is version 1 again, and was 2" in output
    assert "illm-smoke@champion is version 2 again, and was 1" in output
    assert re.search(r"rollback +│ 2 +│ 1 +│ to show how", output)
    assert re.search(r"rollback +│ 1 +│ 2 +│ the fine-tuned codec again", output)
    assert "mlflow ui --backend-store-uri sqlite:///" in output
    assert "/runs?workflowType=machine_learning&compareRunsMode=CHART" in output


def test_the_demo_shows_all_codecs_beside_the_original(smoke):
    made = smoke / RUNS / "evaluate/artifact"
    models = ["original", *json.loads((made / "totals.json").read_text())]
    with Image.open(smoke / RUNS / "try/side-by-side.png") as page:
        assert page.size == (5 * 260 - 4, 256 + 18)
        shown = np.array(page)
    assert models == ["original", "pretrained", "fine-tuned", "jpeg", "webp"]
    for number, model in enumerate(models):
        (path,) = (made / "reconstructions" / model).iterdir()
        with Image.open(path) as whole:
            assert np.array_equal(shown[: whole.height, 260 * number :][:, : whole.width], np.array(whole)), model


def test_the_run_above_the_stages_has_what_they_ended_with(smoke):
    with sqlite3.connect(smoke / "runs/mlflow.db") as store:
        found = dict(
            store.execute("select key, value from latest_metrics where run_uuid = ?", (run_id(smoke, "."),)).fetchall()
        )
    totals = json.loads((smoke / RUNS / "evaluate/artifact/totals.json").read_text())
    assert found["evaluate/fine-tuned psnr_db"] == pytest.approx(totals["fine-tuned"]["psnr_db"])
    assert {"vqvae/val psnr_db", "pretrain/val bpp", "gan/val fooling_rate"} <= set(found)


def test_run_again_everything_is_already_done(smoke, images):
    again = illm("demo", CONFIGS, "--run", RUNS, "--data", images, cwd=smoke)
    assert again.code == 0, again.err
    assert again.out.count("already done") == 7
    assert "$ illm rollback" not in again.out


def test_every_artifact_names_its_parents_by_digest(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    made = {
        stage: resolve.read(f"{RUNS}/{stage}", kind)
        for stage, kind in {"shard": "shards", "vqvae": "labeler", "pretrain": "codec", "gan": "codec"}.items()
    }
    parents = {role: parent.digest for role, parent in made["gan"].manifest.parents.items()}
    assert parents == {
        "shards": made["shard"].digest, "codec": made["pretrain"].digest, "labeler": made["vqvae"].digest,
    }  # fmt: skip


def test_fine_tuning_moves_the_synthesis_and_not_one_bit_of_anything_else(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    before, after = (
        serialization.load_codec(resolve.read(f"{RUNS}/{s}", "codec")).state_dict() for s in ("pretrain", "gan")
    )
    assert before.keys() == after.keys()
    for name in before:
        if name.startswith("synthesis."):
            continue
        assert torch.equal(before[name], after[name]), name
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 10


def test_bitstreams_keep_every_byte_through_fine_tuning(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    pretrained, tuned = (ImageCodec.load(f"{RUNS}/{stage}") for stage in ("pretrain", "gan"))
    content = pretrained.compress(picture(9, 150, 170))
    assert tuned.compress(picture(9, 150, 170)) == content
    assert not np.array_equal(tuned.decompress(content), pretrained.decompress(content))
    files = [sorted((smoke / RUNS / "evaluate/artifact/files" / m).iterdir()) for m in ("pretrained", "fine-tuned")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_the_rates_in_the_report_are_the_sizes_of_the_files(smoke):
    folder = smoke / RUNS / "evaluate" / "artifact"
    rows = list(csv.DictReader((folder / "per_image.csv").open()))
    assert {row["model"] for row in rows} == {"pretrained", "fine-tuned", "jpeg", "webp"}
    for row in rows:
        (path,) = (folder / "files" / row["model"]).glob(f"{row['image']}.*")
        with Image.open(folder / "reconstructions" / "original" / f"{row['image']}.png") as original:
            assert original.size == (int(row["width"]), int(row["height"]))
        assert float(row["bpp"]) == pytest.approx(8 * path.stat().st_size / (int(row["width"]) * int(row["height"])))
    totals = json.loads((folder / "totals.json").read_text())
    assert totals["jpeg"]["bpp"] == pytest.approx(np.mean([float(r["bpp"]) for r in rows if r["model"] == "jpeg"]))


def test_the_report_is_one_file_that_needs_no_other(smoke):
    page = (smoke / RUNS / "evaluate/artifact/report.html").read_text()
    assert len(re.findall(r"data:image/(webp|avif);base64,", page)) == 5  # original and four models, one image
    totals = json.loads((smoke / RUNS / "evaluate/artifact/totals.json").read_text())
    measured = {name for row in totals.values() for name, value in row.items() if value is not None}
    # VMAF where there is its program
    assert measured - {"vmaf"} == {"bpp", "psnr_db", "ms_ssim"}
    assert "default-src 'none'" in page  # the browser's own guard that nothing is fetched
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", own)
    command = json.loads((smoke / RUNS / "evaluate/artifact/facts.json").read_text())["made"]["command"]
    assert command.startswith("illm evaluate")
    assert command in html.unescape(page)


def test_validation_images_were_not_trained_on(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    shards = resolve.read(f"{RUNS}/shard", "shards")
    train, valid = ({s.sha256 for s, _ in ShardReader(shards, split).first(100)} for split in ("train", "valid"))
    assert train
    assert valid
    assert not train & valid


def test_the_tracker_holds_configs_metrics_artifacts_and_parents(smoke):
    with sqlite3.connect(smoke / "runs" / "mlflow.db") as db:
        one = lambda sql: [row[0] for row in db.execute(sql, (run_id(smoke, "gan"),))]
        assert one("select status from runs where run_uuid = ?") == ["FINISHED"]
        assert one("select value from params where key = 'gan_weight' and run_uuid = ?") == ["0.008"]
        steps = one("select step from metrics where key = 'train/discriminator' and run_uuid = ? order by step")
        assert steps == [5, 10, 15, 20]
        digest = resolve.read(str(smoke / RUNS / "pretrain"), "codec").digest
        assert one("select value from tags where key = 'parent.codec.digest' and run_uuid = ?") == [digest]
        assert one("select value from tags where key = 'parent.codec.run_id' and run_uuid = ?") == [
            run_id(smoke, "pretrain")
        ]


@pytest.mark.parametrize("stage", ["vqvae", "pretrain", "gan"])
def test_the_tracker_has_a_picture_of_every_validation(smoke, stage, monkeypatch):
    monkeypatch.chdir(smoke)
    client = MlflowClient(f"sqlite:///{smoke}/runs/mlflow.db")
    logged = [file.path for file in client.list_artifacts(run_id(smoke, stage), "images")]
    whole = [path for path in logged if path.endswith(".png")]
    assert [re.search(r"reconstructions\+step\+(\d+)\+", path)[1] for path in sorted(whole)] == ["10", "20"]
    for path, step in zip(sorted(whole), (10, 20), strict=True):
        here = smoke / RUNS / stage / "images" / "reconstructions" / f"step-{step:08d}.png"
        with (
            Image.open(client.download_artifacts(run_id(smoke, stage), path)) as logged_image,
            Image.open(here) as image,
        ):
            assert np.array_equal(np.asarray(logged_image), np.asarray(image))
            # four crops of 64x64, three columns
            assert image.size == (3 * 64, 4 * 64)


def test_the_registered_model_compresses_and_decompresses(smoke, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(picture(4, 100, 90)).save(photo)
    model = "models:/illm-smoke/2"
    packed = illm("compress", photo, "--codec", model, cwd=smoke)
    assert packed.code == 0, packed.err
    file = tmp_path / "photo.illm"
    assert f"90x100, {file.stat().st_size} bytes" in packed.out
    assert illm("decompress", file, tmp_path / "back.png", "--codec", model, cwd=smoke).code == 0
    expected = ImageCodec.load(str(smoke / RUNS / "gan")).decompress(file.read_bytes())
    with Image.open(tmp_path / "back.png") as back:
        assert np.array_equal(np.asarray(back), expected)
    told = illm("inspect", file, cwd=smoke).out
    assert "90x100" in told
    assert "checksum        matches" in told


def test_version_numbers_resolve_too_and_artifacts_can_be_inspected(smoke):
    assert illm("inspect", f"{RUNS}/gan", cwd=smoke).out.startswith("kind      codec")
    photo = next((smoke / RUNS / "evaluate/artifact/reconstructions/original").iterdir())
    ended = illm("compress", photo, smoke / "again.illm", "--codec", "models:/illm-smoke/1", cwd=smoke)
    assert ended.code == 0, ended.err


def test_gates_that_do_not_hold_refuse_by_name_and_register_nothing(smoke):
    ended = illm(
        "promote", CONFIGS / "promote.yaml", "run=runs/strict", f"evaluation={RUNS}/evaluate", "name=strict",
        "gates={psnr_db: {at_least: 90}, bpp: {at_most: 0.0001}, ms_ssim: {at_least: 0}}", cwd=smoke,
    )  # fmt: skip
    assert ended.code == 3
    assert "2 of 8 gates do not hold" in ended.err
    assert "psnr_db is" in ended.err
    assert "expected >= 90" in ended.err
    assert "ms_ssim is" not in ended.err
    with sqlite3.connect(smoke / "runs" / "mlflow.db") as db:
        assert db.execute("select count(*) from registered_models where name = 'strict'").fetchone() == (0,)


def test_a_promoted_codec_must_be_the_evaluated_one(smoke_copy):
    folder = smoke_copy("shard", "vqvae", "pretrain", "gan", "evaluate")
    (folder / RUNS / "gan").rename(folder / RUNS / "moved")
    (folder / RUNS / "pretrain").rename(folder / RUNS / "gan")
    ended = illm("promote", CONFIGS / "promote.yaml", f"run={RUNS}/promote", cwd=folder)
    assert ended.code == 2
    assert "is not the codec that" in ended.err


def test_training_losses_fall_and_the_labeler_uses_its_codes(smoke):
    with sqlite3.connect(smoke / "runs" / "mlflow.db") as db:
        query = "select value from metrics where run_uuid = ? and key = ? order by step"
        losses = [row[0] for row in db.execute(query, (run_id(smoke, "pretrain"), "train/loss"))]
        assert losses[-1] < 0.9 * losses[0]
        used = [row[0] for row in db.execute(query, (run_id(smoke, "vqvae"), "val/codes_used_share"))]
        assert used[-1] > 0.5


def test_evaluate_takes_a_folder_of_images_too(smoke, images):
    ended = illm(
        "evaluate", CONFIGS / "evaluate.yaml", "run=runs/folder", f"images={images}", "max_images=2", "anchors=[webp]",
        f"codecs={{fine-tuned: {RUNS}/gan, pretrained: {RUNS}/pretrain}}", cwd=smoke,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = list(csv.DictReader((smoke / "runs/folder/artifact/per_image.csv").open()))
    assert len(rows) == 2 * 3


def test_files_of_the_pretrained_codec_open_with_the_registered_one(smoke, tmp_path):
    Image.fromarray(picture(5, 70, 80)).save(tmp_path / "p.webp", lossless=True)
    assert illm("compress", tmp_path / "p.webp", "--codec", f"{RUNS}/pretrain", cwd=smoke).code == 0
    ended = illm("decompress", tmp_path / "p.illm", "--codec", "models:/illm-smoke@champion", cwd=smoke)
    assert ended.code == 0, ended.err
    assert (tmp_path / "p.restored.png").is_file()
