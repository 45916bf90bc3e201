"""Sweeps on a real Ray: shared pretrained codecs, early stopping, Optuna, populations, and kills."""

import csv
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from pipeline.artifacts.artifact import digest_of
from tests.conftest import ROOT, assert_one_clear_line, illm
from tests.sweep.test_space import BASE

pytestmark = [pytest.mark.slow, pytest.mark.ray]
QUIET = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def sweep_file(folder, search: dict, **values):
    path = folder / "sweep.yaml"
    given = {"stage": "sweep", "max_concurrent": 2, **BASE, "search": search, **values}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def rows(folder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "artifact/trials.csv").open()))


def fit(**values) -> dict:
    """One value for gan.fit."""
    return {"kind": "choice", "values": [{"log_every": 5, "checkpoint_every": 20, **values}]}


def test_a_killed_sweep_keeps_what_it_finished_and_shares_pretrained_codecs(smoke, tmp_path):
    search = {
        "gan.gan_weight": {"kind": "grid", "values": [0.0, 0.1]},
        "gan.data.batch_size": {"kind": "grid", "values": [4, 3]},  # 3 does not split in two halves: those trials fail
    }
    path = sweep_file(tmp_path, search, promote=f"{ROOT}/configs/smoke/promote.yaml")
    place = smoke / "runs/killed"
    words = [sys.executable, "-m", "pipeline", "sweep", str(path), "run=runs/killed"]
    started = subprocess.Popen(words, cwd=smoke, env=QUIET, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 400
    while not list(place.glob("trials/*/result.json")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    (finished,) = place.glob("trials/*/result.json")
    before = finished.stat().st_mtime_ns
    codec = digest_of(next(place.glob("pretrained/*/artifact")))

    ended = illm("sweep", path, "run=runs/killed", cwd=smoke, limit=400)
    assert ended.code == 0, ended
    assert finished.stat().st_mtime_ns == before
    assert [digest_of(p) for p in place.glob("pretrained/*/artifact")] == [codec]
    assert "pretrained 1 codec(s) for 2 trials" in ended.out
    good, bad = [[r for r in rows(place) if bool(r["failed"]) is failed] for failed in (False, True)]
    assert {r["gan.gan_weight"] for r in good} == {"0.0", "0.1"}
    assert all("data.batch_size is 3, expected a multiple of 2" in r["failed"] for r in bad)
    assert (place / "artifact/gan_weights.png").stat().st_size > 5000
    best = next((place / "artifact/best").iterdir())
    ended = illm("promote", best / "promote.yaml", "run=runs/best", "name=swept", cwd=smoke)
    assert "models:/swept@champion" in ended.out, ended


@pytest.mark.long
def test_hopeless_trials_are_stopped(smoke, tmp_path):
    search = {
        "pretrain.init": {"kind": "grid", "values": ["pytorch"]},  # from which there is something left to learn
        # the second one's images have nothing of the original
        "gan.gan_weight": {"kind": "grid", "values": [0.0, 100.0]},
        "gan.fit": fit(steps=60, validate_every=20),
    }
    scheduler = {"kind": "asha", "metric": "val/psnr_db", "grace_period": 20, "reduction_factor": 2}
    path = sweep_file(tmp_path, search, scheduler=scheduler, max_concurrent=1)
    ended = illm("sweep", path, "run=runs/asha", cwd=smoke, limit=300)
    assert ended.code == 0, ended
    by_weight = {float(r["gan.gan_weight"]): r for r in rows(smoke / "runs/asha")}
    assert by_weight[0.0]["front"] == "True"
    assert by_weight[100.0]["stopped"].startswith("at step ")
    assert int(by_weight[100.0]["stopped"].split()[-1]) < 60


@pytest.mark.long
def test_optuna_proposes_trials_and_a_killed_worker_costs_little(smoke, tmp_path):
    search = {
        "gan.gan_weight": {"kind": "log_uniform", "low": 0.001, "high": 0.1},
        "gan.fit": fit(steps=100, validate_every=50),
    }
    algorithm = {"kind": "optuna", "metric": "psnr_db", "num_startup_trials": 1}
    path = sweep_file(tmp_path, search, algorithm=algorithm, num_samples=2, max_concurrent=1)
    place = smoke / "runs/optuna"
    words = [sys.executable, "-m", "pipeline", "sweep", str(path), "run=runs/optuna"]
    with (tmp_path / "output.txt").open("w") as output:
        sweep = subprocess.Popen(words, cwd=smoke, env=QUIET, stdout=output, stderr=output)
    deadline = time.monotonic() + 400
    while not list(place.glob("trials/*/gan/checkpoints/step-*")):
        assert time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.2)
    workers = [p for p in psutil.Process(sweep.pid).children(recursive=True) if "Trainable" in " ".join(p.cmdline())]
    workers[0].kill()
    assert sweep.wait(300) == 0, (tmp_path / "output.txt").read_text()
    weights = [float(r["gan.gan_weight"]) for r in rows(place)]
    assert len(set(weights)) == 2
    assert all(0.001 <= weight <= 0.1 for weight in weights)
    assert "resumed at step" in "".join(log.read_text() for log in place.glob("trials/*/log.txt"))


@pytest.mark.long
def test_a_population_goes_on_from_its_better_half(smoke, tmp_path):
    search = {
        "gan.gan_weight": {"kind": "log_uniform", "low": 0.0001, "high": 100.0},
        "gan.fit": fit(steps=400, validate_every=20),
    }
    scheduler = {"kind": "pbt", "metric": "val/psnr_db", "perturbation_interval": 60, "quantile": 0.5}
    path = sweep_file(tmp_path, search, scheduler=scheduler, num_samples=2)
    ended = illm("sweep", path, "run=runs/population", cwd=smoke, limit=400)
    assert ended.code == 0, ended
    members = rows(smoke / "runs/population")
    assert [m["name"] for m in members] == ["member-00", "member-01"]
    assert all(m["bpp"] for m in members), ended
    changed = list((smoke / "runs/population/trials").glob("member-*/generation.json"))
    assert changed  # at least one went on from the other


@pytest.mark.long
def test_a_sweep_whose_trials_all_fail_says_why(smoke, tmp_path):
    path = sweep_file(tmp_path, {"pretrain.data.batch_size": {"kind": "grid", "values": [3]}}, processes=2)
    ended = illm("sweep", path, "run=runs/hopeless", cwd=smoke, limit=200)
    assert_one_clear_line(ended, "none of 1 trials finished", "data.batch_size is 3, expected a multiple of 2")
