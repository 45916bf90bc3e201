"""Bad input gets one clear line and exit code 2, and nothing is damaged."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline.cli import app
from pipeline.registry import resolve
from tests.conftest import CONFIGS, ROOT, Finished, assert_one_clear_line, illm, illm_here, picture
from tests.system.test_pipeline import RUNS


def test_mistakes_in_a_config_are_listed_with_the_nearest_names(tmp_path):
    ended = illm(
        "gan", CONFIGS / "gan.yaml", "run=r", "gan_wieght=1", "fit.steps=-3", "engine.precision=no", cwd=tmp_path
    )
    assert_one_clear_line(ended, "3 problem(s)", "did you mean 'gan_weight'?", "fit.steps", "quote it")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gan", CONFIGS / "gan.yaml"], "expected exactly one run=FOLDER"),
        (["gan", CONFIGS / "gan.yaml", "run=a", "run=b"], "and resumes from; found 2"),
        (["gan", "run=r", CONFIGS / "gan.yaml"], "run=r: expected the configuration first: illm gan CONFIG.yaml run="),
        (["describe", "seed=1", CONFIGS / "gan.yaml"], "seed=1: expected the configuration first: illm describe CONFIG"),
        (["gan", "no.yaml", "run=r"], "no such config file"),
        (["gan", CONFIGS / "vqvae.yaml", "run=r"], "stage: input should be 'gan', got 'vqvae'"),
        (["vqvae", CONFIGS / "vqvae.yaml", "run=r"], "runs/smoke/shard: expected a finished artifact, found none; run that"),
        (["shard", CONFIGS / "shard.yaml", "run=r", "source=nowhere"], "nowhere: no such folder"),
        (["compress", "no.png", "--codec", "r"], "no such file"),
        (["decompress", "no.illm", "--codec", "r"], "no such file"),
        (["inspect", "no.illm"], "no such file"),
        (["inspect", "shipped:lo"], "there are: shipped:low"),
        (["describe", "no.yaml"], "no such config file"),
        (["compress", ROOT / "README.md", "--codec", "r"], "not a readable image"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_missing_or_of_another_kind_is_told_in_one_line(tmp_path, words, told):
    assert_one_clear_line(illm_here(*words, cwd=tmp_path), told)


def test_an_empty_folder_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_clear_line(
        illm_here("shard", CONFIGS / "shard.yaml", "run=r", "source=empty", cwd=tmp_path), "holds no files"
    )


def test_bad_files_among_good_ones_are_reported_and_do_not_stop_sharding(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(photos / f"{i}.png")
    (photos / "corrupt.jpg").write_bytes(os.urandom(300))
    (photos / "zero.png").write_bytes(b"")
    ended = illm("shard", CONFIGS / "shard.yaml", "run=r", "source=photos", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "2 files refused" in ended.out
    refused = resolve.read(str(tmp_path / "r"), "shards").json("index.json")["refused"]
    assert {(entry["path"].rsplit("/")[-1], entry["reason"].split(":")[0]) for entry in refused} == {
        ("corrupt.jpg", "unreadable"), ("zero.png", "unreadable"),
    }  # fmt: skip


@pytest.mark.slow
def test_only_bad_files_stop_sharding_with_their_reasons(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "zero.png").write_bytes(b"")
    ended = illm_here("shard", CONFIGS / "shard.yaml", "run=r", "source=photos", cwd=tmp_path)
    assert_one_clear_line(ended, "none of 1 files is a usable image", "zero bytes")


def test_an_artifact_of_the_wrong_kind_is_told(smoke):
    ended = illm_here("gan", CONFIGS / "gan.yaml", "run=runs/wrong", f"codec={RUNS}/vqvae", cwd=smoke)
    assert_one_clear_line(ended, "expected a 'codec' artifact, found 'labeler'")
    assert not (smoke / "runs/wrong").exists()


def test_another_config_in_the_same_folder_is_refused_with_the_differing_keys(smoke):
    ended = illm_here("gan", CONFIGS / "gan.yaml", f"run={RUNS}/gan", "gan_weight=0.5", cwd=smoke)
    assert_one_clear_line(ended, "belongs to another config", "gan_weight: 0.008 there, 0.5 now")


def test_a_truncated_shard_is_named_before_training(smoke_copy):
    folder = smoke_copy("shard")
    tar = next((folder / RUNS / "shard/artifact").glob("train-*.tar"))
    tar.chmod(0o644)
    tar.write_bytes(tar.read_bytes()[:-1000])
    ended = illm_here("vqvae", CONFIGS / "vqvae.yaml", "run=r", cwd=folder)
    assert_one_clear_line(ended, tar.name, "truncated or changed")


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(smoke_copy):
    folder = smoke_copy("shard", "pretrain")
    run = folder / RUNS / "pretrain"
    expected = resolve.read(str(run), "codec").manifest.files["weights.safetensors"].sha256
    (run / "artifact").rename(folder / "before")
    newest = run / "checkpoints" / "step-000000020" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-50])
    ended = illm("pretrain", CONFIGS / "pretrain.yaml", f"run={RUNS}/pretrain", cwd=folder)
    assert ended.code == 0, ended.err
    assert "step-000000020 is damaged" in ended.err
    assert "resumed at step 15" in ended.err
    assert resolve.read(str(run), "codec").manifest.files["weights.safetensors"].sha256 == expected


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign"])
def test_a_damaged_or_foreign_bitstream_is_told(smoke, tmp_path, damage):
    file = next((smoke / RUNS / "evaluate/artifact/files/fine-tuned").iterdir())
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    bad = tmp_path / "bad.illm"
    bad.write_bytes(
        b"\x89PNG" + bytes(content) if damage == "foreign" else content[:-3] if damage == "cut" else content
    )
    told = "not a compressed image" if damage == "foreign" else "damaged"
    assert_one_clear_line(illm_here("decompress", bad, "--codec", f"{RUNS}/gan", cwd=smoke), told)
    assert not (tmp_path / "bad.png").exists()


def test_a_bitstream_of_another_model_is_told(smoke, tmp_path, monkeypatch):
    from pipeline.bitstream.codec import ImageCodec
    from tests.models.test_networks import small_codec

    (tmp_path / "other.illm").write_bytes(ImageCodec(small_codec(5)).compress(picture(1)))
    ended = illm_here("decompress", tmp_path / "other.illm", "--codec", f"{RUNS}/gan", cwd=smoke)
    assert_one_clear_line(ended, "made by another model")


def test_an_unknown_registered_model_is_told(smoke):
    file = next((smoke / RUNS / "evaluate/artifact/files/fine-tuned").iterdir())
    ended = illm("decompress", file, "x.png", "--codec", "models:/nobody@champion", cwd=smoke)
    assert_one_clear_line(ended, "models:/nobody@champion: nothing is registered")


def test_a_place_that_cannot_be_written_is_told(smoke, tmp_path):
    (tmp_path / "file").write_text("in the way")
    ended = illm_here("vqvae", CONFIGS / "vqvae.yaml", f"run={tmp_path}/file/run", cwd=smoke)
    assert_one_clear_line(ended, "cannot write", str(tmp_path / "file"))


def open_fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    os.open(folder / "fifo", os.O_WRONLY | os.O_NONBLOCK)


def open_loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    (folder / "loop").read_bytes()


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (lambda folder: (folder / "nothing").read_bytes(), "nothing: No such file or directory; check its name"),
        (lambda folder: (folder / ("x" * 300)).touch(), "x: File name too long; check its name"),
        (open_loop, "loop: Too many levels of symbolic links"),
        (open_fifo, "fifo: No such device or address"),
        (lambda folder: os.rename(folder, folder / "in"), "Invalid argument"),
        (lambda _: np.empty(2**60, np.uint8), "out of memory; take less at once"),
        (lambda _: torch.empty(2**60, dtype=torch.uint8), "out of memory; take less at once"),
    ],
)  # fmt: skip
def test_trouble_with_files_and_memory_is_told_in_one_line(tmp_path, capsys, fail, told):
    assert app.exit_code(lambda: fail(tmp_path)) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("mistake", [OSError("encoder error -2"), RuntimeError("shape"), OSError(9, "Bad descriptor")])
def test_our_own_mistakes_keep_their_traceback(capsys, mistake):
    def fail() -> None:
        raise mistake

    assert app.exit_code(fail) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("full", "code", "told"), [
    (False, 141, ""), (True, 2, "illm: cannot write the output: No space left on device; free some space"),
])  # fmt: skip
def test_output_that_nobody_takes_is_no_traceback(full, code, told):
    if full:
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "pipeline", "--version"]
    ended = subprocess.run(command, env=env, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    os.close(output)
    assert ended.returncode == code, ended
    assert ended.stderr.startswith(told)
    assert len(ended.stderr.splitlines()) == bool(told)


def test_help_is_short_for_people_and_has_examples(tmp_path):
    shown = illm_here("-h", cwd=tmp_path).out
    commands = {line.split()[0] for line in shown[shown.index("Commands:") :].splitlines()[1:]}
    assert {"compress", "gan", "submit", "sweep-results"} <= commands
    assert not {"shard-part", "on-ray"} & commands
    assert "What a job of" in illm_here("on-ray", "-h", cwd=tmp_path).out
    assert illm_here("--version", cwd=tmp_path).out == f"illm {pipeline.__version__}\n"
    for command in ("compress", "decompress", "gan"):
        assert f"\n    illm {command} " in illm_here(command, "-h", cwd=tmp_path).out


def test_a_full_disk_is_told_and_goes_on_when_there_is_space(smoke, small_disk, tmp_path):
    words = ("pretrain", CONFIGS / "pretrain.yaml")
    ended = illm(*words, f"run={small_disk}/run", cwd=smoke)
    assert_one_clear_line(ended, "cannot write", "No space left on device; free some space")
    assert not (small_disk / "run" / "artifact").exists()
    assert not list(small_disk.glob("run/checkpoints/.step*"))
    shutil.copytree(small_disk / "run", tmp_path / "run")
    ended = illm(*words, f"run={tmp_path}/run", cwd=smoke)
    assert ended.code == 0, ended.err
    ours, theirs = (resolve.read(str(f), "codec").digest for f in (tmp_path / "run", smoke / RUNS / "pretrain"))
    assert ours == theirs


def test_a_store_of_runs_that_cannot_be_written_is_told(smoke, tmp_path):
    """A limit on file size fails the database's writes as a full disk would, without privileges."""
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", "pretrain", str(CONFIGS / "pretrain.yaml"), f"run={tmp_path / 'run'}"],
        cwd=smoke,
        # coverage would write its own large file, and fail
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert_one_clear_line(Finished(ended.returncode, ended.stdout, ended.stderr), "cannot record in sqlite:///")


@pytest.mark.slow
def test_a_run_that_diverges_ends_in_one_line_however_often_and_leaves_no_spoilt_checkpoint(smoke_copy):
    folder = smoke_copy("shard")
    run = ("pretrain", CONFIGS / "pretrain.yaml", "run=runs/new", "optimizer.lr=1e30")
    for _ in range(2):
        assert_one_clear_line(illm_here(*run, cwd=folder), "validation at step 10: val/bpp, val/psnr_db not finite")
        assert not list(folder.glob("runs/new/checkpoints/step-*"))
        assert not (folder / "runs/new/artifact").exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "data.batch_size=100000000",
            "data.batch_size is 100000000: the 100000000 crops of 64x64 of each process need",
        ),
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("seed=99999999999999999999999", "seed: input should be less than 9223372036854775808"),
        ("seed=true", "seed: input should be a valid integer, got True"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number, got inf"),
    ],
)
def test_numbers_that_nothing_can_be_done_with_are_refused_before_anything_starts(smoke_copy, word, told):
    folder = smoke_copy("shard")
    ended = illm_here("pretrain", CONFIGS / "pretrain.yaml", "run=runs/new", word, cwd=folder)
    assert_one_clear_line(ended, told)
    assert not (folder / "runs/new").exists()
