"""Submission and the job script on a real SLURM of two nodes on this machine."""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.artifacts.artifact import digest_of
from pipeline.registry import resolve
from tests.conftest import ROOT, assert_one_clear_line, illm_here
from tests.support.slurm import MISSING, Slurm

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) or os.getuid() != 0, reason=f"needs root and SLURM; missing: {MISSING}"),
]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def project(smoke: Path, tmp_path: Path) -> Path:
    """A project folder as a user has it: scripts, configurations, finished runs."""
    for name in ("jobs", "configs", "pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(smoke / "runs", tmp_path / "runs")
    return tmp_path


def jobs_in(told: str) -> dict[str, str]:
    """What `illm submit slurm` said: name of the job -> its number."""
    return dict(re.findall(r"^([\w-]+): job (\d+)", told, re.MULTILINE))


def log_of(project: Path, job: str) -> str:
    return "".join(path.read_text() for path in sorted(project.glob(f"runs/**/logs/{job}-*.log")))


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_a_chain_runs_in_order_and_a_failure_cancels_the_rest(slurm, project):
    for stage in ("gan", "evaluate", "promote"):
        shutil.rmtree(project / "runs/smoke" / stage)
    chain = ["submit", "slurm", "--configs", "configs/smoke", "--runs", "runs/smoke", "--time", "10"]
    # nothing starts until it has been seen what is queued
    slurm.run("scontrol", "update", "PartitionName=train", "State=DOWN")
    told = slurm.illm(*chain, "--stages", "pretrain gan evaluate promote", "--nodes", "2", cwd=project)
    assert told.code == 0, told
    assert "pretrain: already done" in told.out
    jobs = jobs_in(told.out)
    assert list(jobs) == ["gan", "evaluate", "promote"]
    again = slurm.illm(*chain, "--stages", "gan evaluate", cwd=project)
    assert_one_clear_line(again, "queued already", f"(job {jobs['gan']})")
    slurm.run("scontrol", "update", "PartitionName=train", "State=UP")

    assert slurm.wait(jobs["promote"], *ENDED) == "COMPLETED", "".join(log_of(project, job) for job in jobs.values())
    assert "2 x cpu, DDP" in log_of(project, jobs["gan"])  # on two nodes, each with a launcher of its own
    assert slurm.about(jobs["gan"], "NodeList") == "n[1-2]"
    assert resolve.read(str(project / "runs/smoke/promote"), "promotion").json("decision.json")["version"] == "3"

    shutil.rmtree(project / "runs/smoke/gan")
    shutil.rmtree(project / "runs/smoke/vqvae")
    (project / "runs/smoke/shard/artifact/index.json").chmod(0o644)
    (project / "runs/smoke/shard/artifact/index.json").write_text("{}")  # digests are looked at by the stage
    told = slurm.illm(*chain, "--stages", "vqvae gan", cwd=project)
    jobs = jobs_in(told.out)
    assert slurm.wait(jobs["vqvae"], *ENDED) == "FAILED"
    assert slurm.about(jobs["vqvae"], "Restarts") == "0"  # what fails for good is not queued again
    assert "index.json: 2 bytes, expected" in log_of(project, jobs["vqvae"])
    assert "jobs that wait for it are canceled (DependencyNeverSatisfied)" in log_of(project, jobs["vqvae"])
    assert slurm.wait(jobs["gan"], "CANCELLED", limit=60) == "CANCELLED"


def test_what_cannot_run_is_refused_before_anything_is_queued(slurm, project):
    chain = ["submit", "slurm", "--configs", "configs/smoke", "--runs", "runs/new"]
    refused = slurm.illm(*chain, "--stages", "vqvae", "--partition", "nowhere", cwd=project)
    assert_one_clear_line(refused, "vqvae: SLURM refuses: invalid partition specified: nowhere")
    shutil.rmtree(project / "runs/smoke/shard")
    refused = slurm.illm(*chain, "--stages", "vqvae gan", "--nodes", "3", "gan.gan_wait=1", cwd=project)
    assert_one_clear_line(refused, "vqvae: data.shards: runs/smoke/shard: expected a finished artifact", "gan_wait")
    assert slurm.run("squeue", "--noheader") == ""


def test_the_doctor_looks_at_two_nodes(slurm, project):
    seen = slurm.illm("doctor", "--nodes", "2", cwd=project)
    assert seen.code == 0, seen
    for line in ("0: ok    shared folder", "1: ok    shared folder", "1: ok    network", "0: ok    packages"):
        assert line in seen.out


def test_signal_requeue_and_lost_node_change_nothing_in_the_result(slurm, project):
    """One two-node run is preempted, queued again by hand, and loses a node; it ends like one that was left alone."""
    words = ["configs/smoke/gan.yaml", "fit.steps=240", "fit.checkpoint_every=20", "fit.validate_every=400"]
    submit = ["sbatch", "--parsable", "--nodes=2", "--time=10", "--output=runs/logs/%j-gan.log"]
    (project / "runs/logs").mkdir()
    alone = slurm.run(*submit, "jobs/slurm/stage.sbatch", "gan", *words, "run=runs/alone", cwd=project).strip()
    assert slurm.wait(alone, *ENDED) == "COMPLETED", log_of(project, alone)
    job = slurm.run(*submit, "jobs/slurm/stage.sbatch", "gan", *words, "run=runs/two", cwd=project).strip()

    def saved_more(than: int) -> bool:
        found = checkpoints(project / "runs/two")
        return bool(found) and int(found[-1].removeprefix("step-")) > than

    def newest() -> int:
        return int(checkpoints(project / "runs/two")[-1].removeprefix("step-"))

    slurm.until(lambda: saved_more(0), "no checkpoint")
    slurm.run("scancel", "--signal=USR2", "--batch", job)  # what the time limit and a preemption send
    slurm.start_now(job, 1)
    assert "preempted at step" in log_of(project, job)
    before = newest()
    slurm.until(lambda: saved_more(before), "it does not go on")
    slurm.run("scontrol", "requeue", job)
    slurm.start_now(job, 2)
    before = newest()
    slurm.until(lambda: saved_more(before), "it does not go on")
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    slurm.until(lambda: slurm.about(job, "JobState") == "PENDING", "it is not queued again")
    slurm.tried("scontrol", "update", "NodeName=n2", "State=RESUME")  # unless it has come back by itself
    slurm.start_now(job, 3)
    assert slurm.wait(job, *ENDED) == "COMPLETED", log_of(project, job)
    digests = [resolve.read(str(project / f"runs/{name}"), "codec").digest for name in ("two", "alone")]
    assert digests[0] == digests[1]


def test_the_time_limit_queues_again_and_scancel_does_not(slurm, project):
    words = ["gan", "configs/smoke/gan.yaml", "run=runs/long", "fit.steps=100000"]
    (project / "runs/logs").mkdir()
    submit = ["sbatch", "--parsable", "--time=1", "--output=runs/logs/%j-gan.log", "jobs/slurm/stage.sbatch"]
    job = slurm.run(*submit, *words, cwd=project).strip()  # the warning comes at once: two minutes before the end
    slurm.start_now(job, 1)
    assert "saved and queued again" in log_of(project, job)
    slurm.wait(job, "RUNNING")
    slurm.run("scancel", job)
    assert slurm.wait(job, "CANCELLED") == "CANCELLED"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs requirements/deepspeed.txt")
def test_deepspeed_on_two_nodes_behind_a_containers_command(slurm, project):
    (project / "inside.sh").write_text('echo "inside: $#" >&2; exec "$@"')
    (project / "runs/logs").mkdir()
    launch = "--export=ALL,ILLM_LAUNCH=configs/launch/zero2.yaml,ILLM_CONTAINER=sh inside.sh"
    submit = ["sbatch", "--parsable", "--nodes=2", "--time=10", "--output=runs/logs/%j-gan.log", launch]
    words = ["gan", "configs/smoke/gan.yaml", "run=runs/zero", "fit.steps=5"]
    job = slurm.run(*submit, "jobs/slurm/stage.sbatch", *words, cwd=project).strip()
    # DeepSpeed compiles its communication first, which takes minutes on a busy machine
    assert slurm.wait(job, *ENDED, limit=420) == "COMPLETED", log_of(project, job)
    assert "2 x cpu, ZeRO-2" in log_of(project, job)
    assert log_of(project, job).count("inside: ") == 2


@pytest.mark.long
def test_arrays_share_sharding_and_a_sweep(slurm, project, images):
    given = ["configs/smoke/shard.yaml", "run=runs/parts", f"source={images}", "chunk_size=2"]
    told = slurm.illm("submit", "slurm-shard", *given, "--jobs", "2", "--sbatch=--time=10", cwd=project)
    assert told.code == 0, told
    (project / "sweep.yaml").write_text(
        "stage: sweep\nshards: runs/smoke/shard\nlabeler: runs/smoke/vqvae\n"
        + "".join(f"{stage}: configs/smoke/{stage}.yaml\n" for stage in ("pretrain", "gan", "evaluate"))
        + "search: {gan.gan_weight: {kind: grid, values: [0.0, 0.1]}}\n"
    )
    swept = slurm.illm("submit", "slurm-sweep", "sweep.yaml", "run=runs/sweep", "--sbatch=--time=10", cwd=project)
    assert swept.code == 0, swept
    assert slurm.wait(jobs_in(told.out)["shard"], *ENDED) == "COMPLETED"
    whole = illm_here("shard", *given[:1], "run=runs/whole", *given[2:], cwd=project)
    assert whole.code == 0, whole
    digests = [digest_of(project / "runs" / name / "artifact") for name in ("parts", "whole")]
    assert digests[0] == digests[1]
    assert slurm.wait(jobs_in(swept.out)["sweep"], *ENDED) == "COMPLETED", log_of(project, "*")
    assert (project / "runs/sweep/artifact/trials.csv").read_text().count("\n") == 3
    runs = MlflowClient(f"sqlite:///{project}/runs/mlflow.db").search_runs(["1"], "tags.stage = 'trial'")
    sweep = (project / "runs/sweep/mlflow-run-id").read_text()
    assert [run.data.tags["mlflow.parentRunId"] for run in runs].count(sweep) == 2
