"""The job scripts on a real SLURM of two nodes on this machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import artifacts
from tests.conftest import ROOT

missing = [
    name
    for name in ("slurmctld", "slurmd", "munged")
    if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing) or os.getuid() != 0, reason=f"needs root and SLURM; missing: {missing}"),
]

CONF = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/pid/slurmctld.pid
SlurmdPidFile={root}/pid/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=10
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
PropagateResourceLimitsExcept=MEMLOCK
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 State=UNKNOWN
PartitionName=train Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A running cluster and the environment of its commands."""

    def __init__(self, root: Path):
        self.root = root
        self.env = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "ILLM_MASTER": "127.0.0.1",  # the node names here are no host names
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }

    def run(self, *words: str, cwd: Path | None = None) -> str:
        ended = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        return ended.stdout

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def wait(self, job: str, *states: str, limit: float = 240) -> str:
        deadline = time.monotonic() + limit
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, expected {states}"
            time.sleep(0.5)
        return state


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    root = tmp_path_factory.mktemp("slurm")
    for name in ("state", "log", "pid"):
        (root / name).mkdir()
    port, port1, port2 = free_ports(3)
    conf = CONF.format(host=socket.gethostname(), root=root, port=port, port1=port1, port2=port2)
    (root / "slurm.conf").write_text(conf)
    cluster = Slurm(root)
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True, check=False).returncode:
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True)
        subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True)
    cluster.run("slurmctld", "-i")
    for node in ("n1", "n2"):
        cluster.run("slurmd", "-N", node)
    yield cluster
    for pid in (root / "pid").iterdir():
        subprocess.run(["kill", pid.read_text().strip()], check=False)


@pytest.fixture
def project(smoke: Path, tmp_path: Path) -> Path:
    """A project folder as a user has it: scripts, configurations, finished runs; and a virtual environment by link."""
    for name in ("jobs", "configs", "pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(smoke / "runs", tmp_path / "runs")
    venv = tmp_path / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "python").chmod(0o755)
    return tmp_path


def log_of(project: Path, job: str) -> str:
    return "".join(path.read_text() for path in project.glob(f"slurm-{job}-*.log"))


def test_a_chain_runs_in_order_and_a_failure_cancels_the_rest(slurm, project):
    shutil.rmtree(project / "runs/smoke/gan")
    shutil.rmtree(project / "runs/smoke/evaluate")
    shutil.rmtree(project / "runs/smoke/promote")
    told = slurm.run(
        "jobs/slurm/pipeline.sh", "configs/smoke", "runs/smoke", "gan evaluate promote", "--time=10", cwd=project
    )
    gan, evaluate, promote = (line.split("job ")[1].split(",")[0] for line in told.splitlines()[:3])
    assert slurm.wait(promote, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log_of(project, gan) + log_of(
        project, promote
    )
    assert slurm.state(evaluate) == "COMPLETED"
    assert artifacts.read(str(project / "runs/smoke/promote"), "promotion").json("decision.json")["version"] == "3"

    shutil.rmtree(project / "runs/smoke/shard")
    told = slurm.run("jobs/slurm/pipeline.sh", "configs/smoke", "runs/other", "vqvae gan", "--time=10", cwd=project)
    vqvae, gan = (line.split("job ")[1].split(",")[0] for line in told.splitlines()[:2])
    assert slurm.wait(vqvae, "FAILED", "COMPLETED") == "FAILED"
    assert "expected a finished artifact, found none" in log_of(project, vqvae)
    assert slurm.wait(gan, "CANCELLED", limit=60) == "CANCELLED"


def test_two_nodes_train_one_stage_and_a_signal_requeues_it(slurm, project):
    submit = ["sbatch", "--parsable", "--nodes=2", "--time=10", "jobs/slurm/stage.sbatch"]
    words = ["gan", "configs/smoke/gan.yaml", "runs/two", "fit.steps=3000", "fit.checkpoint_every=50"]
    job = slurm.run(*submit, *words, cwd=project).strip()
    deadline = time.monotonic() + 120
    while not list((project / "runs/two/checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, log_of(project, job)
        time.sleep(0.5)
    slurm.run("scancel", "--signal=USR2", "--batch", job)
    deadline = time.monotonic() + 60
    while "Restarts=1" not in slurm.run("scontrol", "show", "job", job):
        assert time.monotonic() < deadline, log_of(project, job)
        time.sleep(0.5)
    assert "preempted at step" in log_of(project, job)
    assert "2 x cpu, DDP" in log_of(project, job)
    deadline = time.monotonic() + 120
    while "resumed at step" not in log_of(project, job):
        assert time.monotonic() < deadline, log_of(project, job)
        time.sleep(0.5)
    slurm.run("scancel", job)
    assert slurm.wait(job, "CANCELLED") == "CANCELLED"
