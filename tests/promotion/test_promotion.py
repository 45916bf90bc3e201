"""Promotions, challengers, refusals and prunings on the smoke runs and a real registry in a SQLite file."""

import base64
import io
import json
import os
import pickletools
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts.manifest import MANIFEST, Manifest
from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import decode
from pipeline.registry import aliases, cache, resolve
from pipeline.storage import disk
from pipeline.tracking import store
from tests.conftest import CONFIGS, ROOT, Finished, assert_one_clear_line, illm_here
from tests.support.ranks import free_port, wait_until
from tests.support.services import answers

RUNS = "runs/smoke"
pytestmark = pytest.mark.slow


@pytest.fixture
def there(smoke_copy, monkeypatch) -> Path:
    """A working folder with finished stages and nothing registered."""
    folder = smoke_copy("shard", "vqvae", "pretrain", "gan", "evaluate")
    monkeypatch.chdir(folder)
    return folder


def promote(folder: Path, run: str, *words: str) -> Finished:
    given = ("promote", CONFIGS / "promote.yaml", f"run=runs/{run}", f"evaluation={RUNS}/evaluate", "name=m")
    return illm_here(*given, *words, cwd=folder)


def ask(folder: Path, query: str) -> list[tuple]:
    with sqlite3.connect(folder / "runs/mlflow.db") as db:
        return db.execute(query).fetchall()


def version_tags(folder: Path, version: int) -> dict[str, str]:
    return dict(ask(folder, f"select key, value from model_version_tags where version = {version}"))


def test_a_dry_run_judges_and_changes_nothing(there):
    ended = promote(there, "p", "--dry-run")
    assert ended.code == 0, ended.err
    assert "dry run: all gates hold; nothing was registered" in ended.out
    assert "psnr_db against champion" in ended.out
    refused = promote(there, "p", "gates.psnr_db.at_least=90", "--dry-run")
    assert refused.code == 3
    assert "psnr_db is" in refused.err
    assert not (there / "runs/p").exists()
    assert not (there / "runs/mlflow.db").exists()


def test_a_refusal_names_its_gates_leaves_the_champion_and_is_recorded(there):
    assert promote(there, "p1", "codec=pretrained").code == 0
    ended = promote(
        there, "p2", "against_champion.psnr_db.max_regression=-5", "against_champion.lpips.max_regression=1"
    )
    assert ended.code == 3
    assert "2 of 9 gates do not hold" in ended.err
    assert "psnr_db against champion is" in ended.err
    assert "expected worse by <= -5" in ended.err
    assert "lpips against champion is not measured" in ended.err
    assert ask(there, "select alias, version from registered_model_aliases") == [("champion", 1)]
    assert ask(there, "select count(*) from model_versions") == [(1,)]
    tags = ask(there, "select value from tags where key = 'decision' order by value")
    assert ("refused: psnr_db against champion, lpips against champion",) in tags
    again = promote(there, "p2")  # the folder is free for another try
    assert again.code == 0, again.err
    assert "registered m version 2 as models:/m@champion, previous is version 1" in again.out


def test_force_needs_a_reason_and_records_it(there):
    assert promote(there, "p1", "--force").code == 2
    ended = promote(there, "p1", "gates.psnr_db.at_least=90", "--force", "the demo must go on")
    assert ended.code == 0, ended.err
    (change,) = aliases.history("m", "champion")
    assert (change.action, change.why) == ("force", "the demo must go on")
    tags = version_tags(there, 1)
    assert tags["champion.gates"] == "forced; failing: psnr_db"
    assert tags["champion.why"] == "the demo must go on"
    decision = json.loads((there / "runs/p1/artifact/decision.json").read_text())
    assert decision["forced"]
    assert [gate["gate"] for gate in decision["gates"] if gate["holds"] is False] == ["psnr_db"]


def test_the_version_tells_who_when_why_gates_values_and_report(there):
    assert promote(there, "p1", "--reason", "first").code == 0
    tags = version_tags(there, 1)
    assert "@" in tags["champion.who"]
    assert re.match(r"20\d\d-", tags["champion.when"])
    assert tags["champion.why"] == "first"
    assert "none fails" in tags["champion.gates"]
    assert "(expected <= 8)" in tags["champion.gate.bpp"]
    assert "report.html" in tags["champion.report"]
    assert tags["bitstream_id"] == ImageCodec.load("models:/m@champion").bitstream_id.hex()
    totals = json.loads((there / RUNS / "evaluate/artifact/totals.json").read_text())["fine-tuned"]
    assert float(tags["metric.bpp"]) == pytest.approx(totals["bpp"], rel=1e-4)


def test_a_promotion_that_was_cut_short_is_finished_by_the_same_command_with_the_same_version(there, monkeypatch):
    def cut(*words: object, **named: object) -> None:
        raise KeyboardInterrupt

    from pipeline.stages import promote as stage

    with monkeypatch.context() as patch:
        patch.setattr(aliases, "move", cut)
        assert promote(there, "p1").code == 130
    assert ask(there, "select * from registered_model_aliases") == []
    with monkeypatch.context() as patch:
        patch.setattr(stage, "publish", cut)
        assert promote(there, "p1").code == 130
    assert ask(there, "select alias, version from registered_model_aliases") == [("champion", 1)]
    ended = promote(there, "p1")
    assert ended.code == 0, ended.err
    assert "m version 1 is models:/m@champion already" in ended.out
    assert (there / "runs/p1/artifact/decision.json").is_file()
    assert len(aliases.history("m", "champion")) == 1
    assert promote(there, "p1").code == 0
    assert ask(there, "select count(*) from model_versions") == [(1,)]


def test_a_challenger_is_compared_and_becomes_champion_as_the_same_version(there):
    assert promote(there, "p1", "codec=pretrained").code == 0
    assert promote(there, "p2", "alias=challenger").code == 0
    assert ask(there, "select alias, version from registered_model_aliases order by 1") == [
        ("challenger", 2),
        ("champion", 1),
    ]
    photos = there / RUNS / "evaluate/artifact/reconstructions/original"
    words = ("compare", "champion", "challenger", "--model", "m", "--images", photos)
    ended = illm_here(*words, cwd=there)
    assert ended.code == 0, ended.err
    assert "the same files fit both" in ended.out
    told = json.loads(illm_here(*words, "--json", cwd=there).out)
    by_name = {metric["metric"]: metric for metric in told["metrics"]}
    assert by_name["bpp"]["worse_by"]["value"] == 0
    gap = by_name["psnr_db"]["theirs"] - by_name["psnr_db"]["ours"]
    assert by_name["psnr_db"]["worse_by"]["value"] == pytest.approx(gap)
    before = sorted(p for p in (there / RUNS / "gan").rglob("*"))
    paths = ("compare", there / RUNS / "gan", there / RUNS / "gan", "--images", photos, "--json")
    same = json.loads(illm_here(*paths, cwd=there).out)  # absolute paths, and the same codec twice
    assert all(m["worse_by"]["value"] == 0 for m in same["metrics"] if "seconds" not in m["metric"])
    assert sorted(p for p in (there / RUNS / "gan").rglob("*")) == before  # nothing is written into what is compared
    assert promote(there, "p3").code == 0
    assert ask(there, "select alias, version from registered_model_aliases where alias = 'champion'") == [
        ("champion", 2)
    ]


def test_another_bitstream_is_refused_unless_it_is_declared(there):
    assert promote(there, "p1").code == 0
    other = ("pretrain", CONFIGS / "pretrain.yaml", "run=runs/other", "seed=5", "fit.steps=5", "fit.validate_every=5")
    assert illm_here(*other, cwd=there).code == 0
    measured = ("evaluate", CONFIGS / "evaluate.yaml", "run=runs/measured", f"images={RUNS}/shard", "anchors=[]")
    ended = illm_here(*measured, "codecs={other: runs/other}", cwd=there)
    assert ended.code == 0, ended.err
    words = ("evaluation=runs/measured", "codec=other", "against_champion={}", "gates={bpp: {at_most: 99}}")
    ended = promote(there, "p2", *words)
    assert ended.code == 3
    assert "bitstream id is" in ended.err
    assert "or allow_new_bitstream: true" in ended.err
    declared = promote(there, "p2", *words, "allow_new_bitstream=true")
    assert declared.code == 0, declared.err


def test_a_champion_that_is_lost_is_replaced_by_force_only(there):
    assert promote(there, "p1", "codec=pretrained").code == 0
    ((source,),) = ask(there, "select storage_location from model_versions")
    shutil.rmtree(source)
    shutil.rmtree(cache.folder(), ignore_errors=True)
    ended = promote(there, "p2")
    assert ended.code == 3
    assert "champion is models:/m/1: codec/manifest.json cannot be downloaded" in ended.err
    forced = promote(there, "p2", "--force", "the old one is lost")
    assert forced.code == 0, forced.err
    assert ask(there, "select alias, version from registered_model_aliases where alias = 'champion'") == [
        ("champion", 2)
    ]


def test_files_that_do_not_decode_to_what_was_measured_are_counted(there):
    folder = there / RUNS / "evaluate/artifact"
    (file,) = (folder / "files/fine-tuned").iterdir()
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    name = file.relative_to(folder).as_posix()
    manifest.files[name].sha256 = disk.sha256(file)
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    ended = promote(there, "p1")
    assert ended.code == 3
    assert f"undecodable is 1 of 1 files ({file.stem}), expected 0 files" in ended.err


def test_files_that_decode_to_another_latent_than_the_encoders_are_counted(there):
    """The decoder agrees with what was measured: both are garbage. Only the encoder knows better."""
    folder = there / RUNS / "evaluate/artifact"
    (file,) = (folder / "files/fine-tuned").iterdir()
    codec = ImageCodec.load(str(there / RUNS / "gan"))
    original = decode(folder / f"reconstructions/original/{file.stem}.png").pixels
    file.write_bytes(codec.compress(np.ascontiguousarray(original[::-1])))
    kept = folder / f"reconstructions/fine-tuned/{file.stem}.png"
    Image.fromarray(codec.decompress(file.read_bytes())).save(kept)
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    for path in (file, kept):
        entry = manifest.files[path.relative_to(folder).as_posix()]
        entry.sha256, entry.size = disk.sha256(path), path.stat().st_size
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    ended = promote(there, "p1")
    assert ended.code == 3
    assert f"undecodable is 1 of 1 files ({file.stem}), expected 0 files" in ended.err


def test_gates_on_what_was_not_measured_are_mistakes(there):
    assert_one_clear_line(promote(there, "p", "gates.fid.at_most=9"), "fid was not measured; expected one of bpp")
    assert_one_clear_line(
        promote(there, "p", "against_champion.weights_mb.max_regression=9"), "weights_mb: expected one of"
    )
    assert_one_clear_line(promote(there, "p", "gates.bpp.target=0.1"), "target and within_percent belong together")
    assert_one_clear_line(
        promote(there, "p", "bd_rate={ours: [fine-tuned, x], theirs: [jpeg, webp]}"), "bd_rate: x was not evaluated"
    )
    assert not (there / "runs/p").exists()


def test_what_is_registered_is_all_one_needs_and_holds_no_pickle(there):
    assert promote(there, "p1", "license=CC0", "limits=[only for tests]").code == 0
    (source,) = ask(there, "select storage_location from model_versions")[0] or ("",)
    folder = Path(source)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "README.md", "lineage.json", "input_example.json"} <= names
    assert {"codec/weights.safetensors", "codec/model.yaml", "codec/manifest.json"} <= names
    for name in names:
        assert not name.endswith((".pkl", ".pickle", ".pt", ".pth", ".py")), name
        with pytest.raises(Exception):  # noqa: B017, PT011
            list(pickletools.genops(io.BytesIO((folder / name).read_bytes())))
    card = (folder / "README.md").read_text()
    for word in (
        "license: CC0",
        "only for tests",
        "95 % interval",
        "| psnr_db |",
        "seed 0",
        "7 train_images",
        "bitstream id",
    ):
        assert word in card, card
    assert ask(there, "select description from model_versions") == [(card,)]


def test_mlflow_loads_it_images_in_bytes_out_and_back(there):
    assert promote(there, "p1").code == 0
    import mlflow
    import pandas

    store.client()
    photo = next((there / RUNS / "evaluate/artifact/reconstructions/original").iterdir()).read_bytes()
    loaded = mlflow.pyfunc.load_model("models:/m@champion")
    assert loaded.unwrap_python_model is not None
    packed = loaded.predict(pandas.DataFrame({"content": [photo]}))
    ours = ImageCodec.load("models:/m@champion")
    assert packed["content"][0] == ours.compress(decode(photo).pixels)
    restored = loaded.predict(packed)["content"][0]
    with Image.open(io.BytesIO(restored)) as image:
        assert (ours.decompress(packed["content"][0]) == image).all()


def test_mlflow_serves_it_over_http(there):
    assert promote(there, "p1").code == 0
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/m@champion", "--env-manager", "local"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{there}/runs/mlflow.db", "PYTHONPATH": str(ROOT)}
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts uvicorn by its name
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore", "PATH": programs}
    with (there / "served.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "-p", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True, cwd=there
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{url}/ping"), "the model's server")
        photo = next((there / RUNS / "evaluate/artifact/reconstructions/original").iterdir()).read_bytes()
        packed = invoked(url, photo)
        assert packed == ImageCodec.load("models:/m@champion").compress(decode(photo).pixels)
        with Image.open(io.BytesIO(invoked(url, packed))) as restored:
            assert (ImageCodec.load("models:/m@champion").decompress(packed) == restored).all()
        with pytest.raises(urllib.error.HTTPError) as refused:
            invoked(url, packed[:-5])
        assert refused.value.code == 400
        assert "row 0: damaged: the checksum does not match" in json.loads(refused.value.read())["message"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def invoked(url: str, content: bytes) -> bytes:
    rows = {"dataframe_split": {"columns": ["content"], "data": [[base64.b64encode(content).decode()]]}}
    question = urllib.request.Request(
        f"{url}/invocations", json.dumps(rows).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(question, timeout=60) as answer:
        return base64.b64decode(json.load(answer)["predictions"][0]["content"])


def test_prune_lists_and_removes_what_nothing_needs(there):
    assert promote(there, "p1").code == 0
    spare = ("pretrain", CONFIGS / "pretrain.yaml", "run=runs/spare", "seed=7", "fit.steps=5", "fit.validate_every=5")
    assert illm_here(*spare, cwd=there).code == 0
    shutil.copytree(there / "runs/spare", there / "runs/unfinished")
    shutil.rmtree(there / "runs/unfinished/artifact")
    listed = illm_here("prune", "--older-than", "0", cwd=there)
    assert listed.code == 0, listed.err
    assert "runs/spare/artifact" in listed.out
    assert f"{RUNS}/gan/checkpoints" in listed.out
    for kept in (f"{RUNS}/gan/artifact", f"{RUNS}/shard", f"{RUNS}/evaluate", "runs/p1", "runs/unfinished"):
        assert kept not in listed.out
    assert (there / "runs/spare/artifact").is_dir()
    assert "0.0 MB  in all" in illm_here("prune", cwd=there).out  # nothing is a month old
    old = time.time() - 40 * 86400
    for path in [*(there / "runs/spare").rglob("*"), there / "runs/spare"]:
        os.utime(path, (old, old))
    ended = illm_here("prune", "--remove", cwd=there)
    assert "removed 2 folder(s)" in ended.out
    assert not (there / "runs/spare/artifact").exists()
    assert resolve.read(f"{RUNS}/gan", "codec")
    assert_one_clear_line(illm_here("prune", "nowhere", cwd=there), "no such folder")
