"""Sharding as a whole: sources together, killed and continued, on Ray, refused, over a network."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.artifacts import ownership
from pipeline.artifacts.artifact import Artifact
from pipeline.data.reader import ShardReader
from pipeline.data.shards import Shard
from pipeline.errors import ArtifactError, DataError
from pipeline.registry import resolve
from pipeline.sharding import filters, listing, passes, plan, writer
from pipeline.stages import shard
from pipeline.stages.shard import StageConfig
from pipeline.storage import disk, fetch
from tests.conftest import ROOT, assert_one_clear_line, illm_here, picture, write_images
from tests.sharding.test_sources import write_tar, write_zip
from tests.support.servers import serving


def config(source: Path | list, **changes: object) -> StageConfig:
    source = source if isinstance(source, list) else str(source)
    return StageConfig(**{"source": source, "min_side": 64, "validation_fraction": 0.3, "num_workers": 1} | changes)


def run(cfg: StageConfig, folder: Path) -> Artifact:
    return resolve.read(str(shard.run(cfg, folder)), "shards")


def tars(folder: Path) -> dict[str, str]:
    files = sorted((folder / "artifact").glob("*"))
    return {p.name: disk.sha256(p) for p in files if p.name != "manifest.json"}


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/mlflow.db is written there


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", 24)


@pytest.mark.parametrize("backend", ["processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_threads_and_other_backends_give_the_same_bytes(photos, tmp_path, backend):
    options = {"shard_mb": 0.2, "chunk_size": 4}
    run(config(photos, num_workers=1, **options), tmp_path / "threads")
    run(config(photos, num_workers=2, backend=backend, **options), tmp_path / backend)
    assert tars(tmp_path / "threads") == tars(tmp_path / backend)
    assert len(tars(tmp_path / backend)) > 8


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(photos, tmp_path):
    options = {
        "source": str(photos),
        "stage": "shard",
        "min_side": 64,
        "shard_mb": 0.1,
        "chunk_size": 2,
        "num_workers": 1,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    run(StageConfig(**options), tmp_path / "whole")
    folder, chance = tmp_path / "killed", random.Random(0)
    moments = [str(round(chance.uniform(1, 6))) for _ in range(8)]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(folder), *moments, "0"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    codes = [int(line.removeprefix("ended: ")) for line in ended.stdout.splitlines() if line.startswith("ended: ")]
    assert codes.count(-signal.SIGKILL) >= 3, ended.stderr
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], ended.stderr
    assert tars(folder) == tars(tmp_path / "whole")
    assert not (folder / "work").exists()


def test_killed_while_planning_it_goes_on_and_leaves_nothing(photos, tmp_path):
    options = {"source": str(photos), "stage": "shard", "min_side": 64, "num_workers": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    folder = tmp_path / "killed"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_PLANNING, str(tmp_path / "config.yaml"), str(folder)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (left,) = (folder / "work").glob(".plan.*")
    assert (left / "photos.jsonl").stat().st_size > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard.run(StageConfig(**options), folder)
    assert not left.exists()
    plan = folder / "work/plan/train.jsonl"
    made = plan.stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard.run(StageConfig(**options), folder)
    # The plan is not made twice
    assert plan.stat().st_ino == made
    shard.run(StageConfig(**options), folder)
    run(StageConfig(**options), tmp_path / "whole")
    assert tars(folder) == tars(tmp_path / "whole")
    assert not (folder / "work").exists()


KILLED_PLANNING = """
import os, sys, signal
from pathlib import Path
from pipeline import config
from pipeline.sharding import splits
from pipeline.stages import shard
splits.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
shard.run(config.load(shard.StageConfig, sys.argv[1]), Path(sys.argv[2]))
"""
# Runs the stage in one process after another, until one ends by itself, and prints what each ended with. Each kills itself after
# some calls of what makes progress durable (0: never).
KILLED = """
import os, sys, signal
from pathlib import Path
from pipeline import config
from pipeline.sharding import writer
from pipeline.stages import shard
from pipeline.storage import disk
# Once, and not in every process
import mlflow.store.tracking.sqlalchemy_store
def dying(function):
    def call(*words, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*words, **options)
    return call
disk.write_atomic = dying(disk.write_atomic)
writer.write = dying(writer.write)
for moment in map(int, sys.argv[3:]):
    left = moment
    if not (child := os.fork()):
        shard.run(config.load(shard.StageConfig, sys.argv[1]), Path(sys.argv[2]))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended:", code, flush=True)
    if not code:
        break
"""


def test_two_jobs_on_the_same_folder_refuse_each_other(photos, tmp_path, monkeypatch):
    cfg = config(photos)
    monkeypatch.setenv(ownership.WAIT_ENV, "0")
    with ownership.held(tmp_path / "run"), pytest.raises(ArtifactError, match=r"in use by process \d+ on "):
        shard.run(cfg, tmp_path / "run")
    shard.run(cfg, tmp_path / "run")


def test_several_sources_with_weights(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for number, folder in enumerate((first, second, third)):
        folder.mkdir()
        for i in range(20):
            Image.fromarray(picture(100 * number + i)).save(folder / f"{i}.png")
    names = [{"name": p.name, "path": str(p), "weight": w} for p, w in ((first, 2.0), (second, 1.0), (third, 0.5))]
    made = run(config(names, validation_fraction=0, duplicate_distance=None), tmp_path / "run")
    reader = ShardReader(made, "train")
    drawn = [reader.sample(number)[1].dataset for number in range(len(reader))]
    assert drawn.count("first") == 40
    assert drawn.count("second") == 20
    left_out = [r for r in made.json("index.json")["refused"] if "weight 0.5" in r["reason"]]
    assert drawn.count("third") == 20 - len(left_out)
    assert 4 <= len(left_out) <= 16
    assert made.json("index.json")["sources"] == {"first": 20, "second": 20, "third": 20 - len(left_out)}


def test_sources_of_one_name_are_refused():
    names = [{"name": "photos", "path": path, "split": side} for path, side in (("a", "train"), ("b", "valid"))]
    with pytest.raises(ValueError, match="several sources are named photos"):
        config(names)


def test_splits_stay_when_data_is_added_and_look_alikes_stay_together(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(30):
        photo = Image.fromarray(picture(i, 180, 240))
        photo.save(folder / f"{i}.png")
        photo.resize((200, 150)).save(folder / f"{i}-small.png")
    options = {"validation_fraction": 0.2, "test_fraction": 0.2}
    before = sides(run(config(folder, **options), tmp_path / "before"))
    for i in range(30, 60):
        Image.fromarray(picture(i, 180, 240)).save(folder / f"{i}.png")
    after = sides(run(config(folder, **options), tmp_path / "after"))
    assert {name: after[name] for name in before} == before
    assert set(before.values()) == {"train", "valid", "test"}
    assert all(after[f"{i}.png"] == after[f"{i}-small.png"] for i in range(30))


def sides(made: Artifact) -> dict[str, str]:
    return {s.source: split for split in ("train", "valid", "test") for s, _ in ShardReader(made, split).first(1000)}


@pytest.mark.parametrize(("store", "extension"), [("webp", "webp"), ("jpeg", "jpg"), ("pixels", "ppm")])
def test_images_can_be_stored_in_another_form(tmp_path, store, extension):
    import numpy as np

    source = write_images(tmp_path / "photos", 4)
    original = {s.source: i for i, s in pixels(run(config(source), tmp_path / "original"))}
    for stored, sample in pixels(run(config(source, format=store), tmp_path / store)):
        assert sample.extension == extension
        error = np.abs(stored.astype(int) - original[sample.source]).max()
        assert error <= (12 if store == "jpeg" else 0)


def test_an_image_too_long_for_webp_is_stored_as_it_is(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture(1, 64, 16384)).save(tmp_path / "photos/long.png")
    Image.fromarray(picture(2, 64, 300)).save(tmp_path / "photos/short.png")
    found = pixels(run(config(tmp_path / "photos", format="webp", validation_fraction=0), tmp_path / "run"))
    assert {(sample.extension, stored.shape[1]) for stored, sample in found} == {("png", 16384), ("webp", 300)}


def pixels(made: Artifact) -> list:
    reader = ShardReader(made, "train")
    return [(reader.pixels(number), reader.sample(number)[1]) for number in range(len(reader))]


def test_urls_are_fetched_once_and_failures_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_RETRY_S", 0.01)
    served = write_images(tmp_path / "served", 20)
    names = [p.relative_to(served).as_posix() for p in sorted(served.rglob("*.png"))]
    with serving(served) as server:
        server.break_after = 30_000
        server.errors[f"/{names[3]}"] = 2
        urls = [f"{server.url}/{name}" for name in [*names, "missing.png"]]
        (tmp_path / "urls.txt").write_text("\n".join(urls))
        cfg = config(tmp_path / "urls.txt", shard_mb=0.05)
        made = run(cfg, tmp_path / "run")
        assert server.most_at_once <= filters.FETCHED_AT_ONCE
        whole = sum(p.stat().st_size for p in served.rglob("*.png"))
        assert server.bytes == whole  # each byte once, for both passes
    (refusal,) = made.json("index.json")["refused"]
    assert refusal["path"].endswith("missing.png")
    assert "the server answers 404" in refusal["reason"]


def test_a_network_that_is_down_is_no_empty_data_set_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_RETRY_S", 0.001)
    served = write_images(tmp_path / "served", 4)
    with serving(served) as server:
        urls = [f"{server.url}/{p.relative_to(served).as_posix()}" for p in sorted(served.rglob("*.png"))]
        (tmp_path / "urls.txt").write_text("\n".join(urls))
        server.errors = {url.removeprefix(server.url): 5 for url in urls[1:]}
        cfg = config(tmp_path / "urls.txt")
        with pytest.raises(DataError, match="3 of 4 URLs cannot be fetched"):
            shard.run(cfg, tmp_path / "run")
        shard.run(cfg, tmp_path / "run")
        assert server.requests[urls[0].removeprefix(server.url)] == 2


def test_a_mixed_folder_with_broken_files(tmp_path):
    folder = write_images(tmp_path / "photos", 4)
    good = (folder / "image0.png").read_bytes()
    (folder / "copy.png").write_bytes(good)
    (folder / "truncated.png").write_bytes(good[:-200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.md").write_text("hello")
    (folder / ".hidden.png").write_bytes(good)
    Image.new("L", (20_000, 10_000)).save(folder / "bomb.png")
    write_tar(folder / "more.tar", {"a.png": good, "../b.png": good, "c.json": b"{}"})
    write_zip(folder / "more.zip", {"d/e.png": (folder / "more/image1.png").read_bytes()[:100]})
    (folder / "broken.tar").write_bytes(b"no tar at all" * 100)
    reasons = {
        r["path"].rsplit("photos/")[1]: r["reason"]
        for r in run(config(folder), tmp_path / "run").json("index.json")["refused"]
    }
    expected = {
        "image0.png": "same bytes as",
        "more.tar/a.png": "same bytes as",
        "truncated.png": "unreadable: not a readable image",
        "empty.jpg": "unreadable: zero bytes",
        "notes.md": "not an image (.md)",
        "bomb.png": "unreadable: more than 134217728 pixels",
        "more.tar/../b.png": "its name leads out of the archive",
        "more.zip/d/e.png": "unreadable: not a readable image",
        "broken.tar": "not a readable archive",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name], name


def test_refusals_leave_the_digest_reproducible(photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (photos / "text.jpg").write_text("no photo")
    first, second = (run(config(photos), tmp_path / name) for name in ("first", "second"))
    assert first.manifest.metrics["refused_files"] == 2
    assert first.digest == second.digest


def test_files_that_change_meanwhile_are_examined_again_by_the_same_command(photos, tmp_path, monkeypatch):
    cfg = config(photos, chunk_size=5, shard_mb=0.1)
    examined = passes.examined

    def then_changed(*words: object):
        found = examined(*words)
        Image.fromarray(picture(999, 120, 130)).save(photos / "image0.png")
        (photos / "image2.png").unlink()
        return found

    monkeypatch.setattr(shard, "examined", then_changed)
    with pytest.raises(DataError, match=r"2 file\(s\) changed") as told:
        shard.run(cfg, tmp_path / "run")
    monkeypatch.setattr(shard, "examined", examined)
    assert "image0.png" in str(told.value)
    assert "image2.png" in str(told.value)
    made = run(cfg, tmp_path / "run")
    run(cfg, tmp_path / "fresh")
    (refusal,) = made.json("index.json")["refused"]
    assert refusal["path"].endswith("image2.png")
    again, fresh = (tars(tmp_path / name) for name in ("run", "fresh"))
    assert fresh.keys() == again.keys()
    assert all(again[name] == fresh[name] for name in fresh if name.endswith((".tar", ".jsonl")))


def test_list_and_plan_are_readable_by_their_owner_alone(photos, tmp_path, monkeypatch):
    (tmp_path / "urls.txt").write_text("".join(f"{photo}\n" for photo in photos.rglob("*.png")))
    modes = []
    rename = Path.rename

    def looked_at(self: Path, target: Path) -> Path:
        if Path(target).name in ("items.jsonl", "plan"):
            modes.append(self.stat().st_mode & 0o777)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", looked_at)
    monkeypatch.setattr(shard, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shard.run(config(tmp_path / "urls.txt"), tmp_path / "run")
    assert modes == [0o600, 0o700]
    assert (tmp_path / "run" / "work" / listing.FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("count", "share", "told"), [(1, 0.3, "0 validation"), (8, 0.3, "1|2|3|4"), (8, 0, None)])
def test_few_validation_images_are_told_unless_none_are_wanted(tmp_path, capsys, cli_log, count, share, told):
    run(config(write_images(tmp_path / "photos", count), validation_fraction=share), tmp_path / "run")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (told is not None)
    if told:
        assert re.search(rf"({told}).* image\(s\), too few .* validation_fraction \(0\.3\)", warnings[0])


def test_a_list_of_another_version_is_told(photos, tmp_path):
    work = tmp_path / "run" / "work"
    work.mkdir(parents=True)
    (work / listing.FILE).write_text('{"name": "a.png", "location": "/there/a.png"}\n')
    with pytest.raises(DataError, match=r"written by another version; remove .*work and run the same command"):
        shard.run(config(photos), tmp_path / "run")


def test_a_chunk_that_another_job_examines_again_is_told(photos, tmp_path):
    cfg, folder = config(photos, chunk_size=4), tmp_path / "run"
    shard.run_part(cfg, folder, "list")
    shard.run_part(cfg, folder, "examine")
    listed = listing.Listing(folder / "work", cfg.chunk_size)
    results = passes.examined(cfg, listed, folder / "work")
    next(results)
    passes.examined_file(folder / "work", 3).unlink()
    with pytest.raises(
        DataError, match=r"chunk 3 is to be examined again; run the same command, or the part `examine`"
    ):
        list(results)


def test_two_jobs_may_write_the_same_shard(photos, tmp_path):
    """Of one plan, as a task of an array that was taken for dead, and of two plans, when files were examined again meanwhile."""
    cfg, work = config(photos, chunk_size=8), tmp_path / "run" / "work"
    for what in ("list", "examine"):
        shard.run_part(cfg, tmp_path / "run", what)
    listed = listing.Listing(work, cfg.chunk_size)
    plans, _ = plan.plan_shards(cfg, passes.examined(cfg, listed, work), work)
    for number in range(5):
        folder = tmp_path / f"shards{number}"
        folder.mkdir()
        together = threading.Barrier(4)

        def write(_: int, folder: Path = folder, together: threading.Barrier = together) -> Shard:
            together.wait(60)
            made = writer.write(plans[0], folder)
            assert isinstance(made, Shard)
            return made

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(write, range(4))
        assert others == [first] * 3
        assert disk.sha256(folder / first.file) == first.sha256
        assert {path.name for path in folder.iterdir()} == {first.file, first.table, f"{first.file}.done"}
        assert plans[0].done(folder) == first
        assert replace(plans[0], digest="another plan's").done(folder) is None
        with (folder / first.table).open("a") as table:
            table.write("{}\n")
        assert plans[0].done(folder) is None


def test_another_config_in_the_folder_is_refused(photos, tmp_path):
    (tmp_path / "shard.yaml").write_text("stage: shard\nmin_side: 64\n")
    words = ["shard", tmp_path / "shard.yaml", f"source={photos}", "run=r"]
    assert illm_here(*words, cwd=tmp_path).code == 0
    assert illm_here(*words, "num_workers=3", cwd=tmp_path).code == 0
    assert_one_clear_line(illm_here(*words, "min_side=65", cwd=tmp_path), "min_side: 64 there, 65 now")


def test_what_a_killed_job_left_is_small_and_json(photos, tmp_path):
    """Each examined piece is one file of lines, so that a piece can be done again by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "plan_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard.run(config(photos, chunk_size=5), tmp_path / "run")
    files = sorted((tmp_path / "run" / "work" / "examined").glob("*"))
    assert [len(f.read_text().splitlines()) for f in files] == [5, 5, 5, 5, 4]
    assert json.loads(files[0].read_text().splitlines()[0])[0] == "AcceptedImage"
    shard.run(config(photos, chunk_size=5), tmp_path / "run")
    assert not (tmp_path / "run/work").exists()


def test_a_source_can_have_a_side_and_a_known_dataset(tmp_path):
    for name in ("mine", "reference"):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.fromarray(picture(i + (100 if name == "mine" else 0))).save(tmp_path / name / f"{i}.png")
    Image.fromarray(picture(3)).resize((100, 75)).save(tmp_path / "mine/leak.png")  # looks like one of the reference
    both = [
        {"name": "mine", "path": str(tmp_path / "mine")},
        {"name": "reference", "path": str(tmp_path / "reference"), "split": "valid"},
    ]
    made = run(config(both, validation_fraction=0.0), tmp_path / "run")
    reader = ShardReader(made, "train")
    assert len(reader) == 12
    assert {reader.sample(n)[1].dataset for n in range(12)} == {"mine"}
    assert sides(made)["leak.png"] == "valid"
    with pytest.raises(DataError, match="known_dataset 'koda' is not known; expected one of kodak, div2k/train"):
        run(config([{**both[0], "known_dataset": "koda"}]), tmp_path / "other")
    with pytest.raises(DataError, match="24 of 24 are missing: kodim01"):
        run(config([{**both[0], "known_dataset": "kodak"}]), tmp_path / "other")


def test_the_card_tells_what_is_in_the_shards(tmp_path):
    folder = write_images(tmp_path / "photos", 12)
    (folder / "<b>bad.png").write_bytes(b"")
    made = run(config(folder, shard_mb=0.1), tmp_path / "run")
    page = (made.path / "card.html").read_text()
    assert page.count("data:image/webp;base64,") == 12
    assert page.count("data:image/png;base64,") == 1
    assert "&lt;b&gt;bad.png" in page
    assert "<b>bad" not in page
    for word in ("train", "valid", "png", "unreadable", "min_side"):
        assert word in page
    assert "card.html" in made.manifest.files


def test_shards_are_the_data_set_of_their_run_in_mlflow(tmp_path, monkeypatch):
    from pipeline.tracking import store

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    made = run(config(write_images(tmp_path / "photos")), tmp_path / "run")
    (given,) = store.client().get_run(made.manifest.run_id).inputs.dataset_inputs
    assert given.dataset.digest == made.digest[:36]
    assert given.tags[0].value == "sharded"
    assert json.loads(given.dataset.profile)["train_images"] == made.manifest.metrics["train_images"]
