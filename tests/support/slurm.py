"""A real SLURM of two nodes on this machine, for tests."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, Finished
from tests.support.ranks import free_port

MISSING = [
    name
    for name in ("slurmctld", "slurmd", "munged")
    if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
KillWait=10
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
PropagateResourceLimitsExcept=MEMLOCK
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 State=UNKNOWN
PartitionName=train Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """The cluster, and the environment of a user's commands."""

    def __init__(self, root: Path):
        self.root = root
        self.env = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "ILLM_PYTHON": sys.executable,
            "ILLM_MASTER_ADDR": "127.0.0.1",  # the node names here are no host names
            "ILLM_FILE_WAIT_S": "2",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }

    def start(self) -> None:
        for name in ("state", "log", "pid"):
            (self.root / name).mkdir()
        ports = {"port": free_port(), "port1": free_port(), "port2": free_port()}
        (self.root / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), root=self.root, **ports))
        if subprocess.run(["pgrep", "-x", "munged"], capture_output=True, check=False).returncode:
            subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True)
            subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True)
        self.run("slurmctld", "-i")
        for node in ("n1", "n2"):
            self.run("slurmd", "-N", node)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", "root"], env=self.env, check=False)
        for pid in (self.root / "pid").iterdir():
            subprocess.run(["kill", pid.read_text().strip()], check=False)

    def run(self, *words: str, cwd: Path | None = None) -> str:
        ended = self.tried(*words, cwd=cwd)
        assert ended.code == 0, (words, ended)
        return ended.out

    def tried(self, *words: str, cwd: Path | None = None) -> Finished:
        ended = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
        return Finished(ended.returncode, ended.stdout, ended.stderr)

    def illm(self, *words: str, cwd: Path) -> Finished:
        return self.tried(sys.executable, "-m", "pipeline", *words, cwd=cwd)

    def about(self, job: str, key: str) -> str:
        """A field of `scontrol show job`."""
        return re.findall(rf"(?<!\w){key}=(\S*)", self.run("scontrol", "show", "job", job))[0]

    def wait(self, job: str, *states: str, limit: float = 240) -> str:
        self.until(lambda: self.about(job, "JobState") in states, f"job {job} is not {states}", limit)
        return self.about(job, "JobState")

    def until(self, true: Callable[[], object], told: str, limit: float = 120) -> None:
        deadline = time.monotonic() + limit
        while not true():
            assert time.monotonic() < deadline, f"{told}\n{self.run('squeue')}"
            time.sleep(0.3)

    def start_now(self, job: str, restarts: int) -> None:
        """Waits until a job was queued again so often, and spares it the two minutes SLURM lets it wait."""
        self.until(lambda: int(self.about(job, "Restarts")) >= restarts, f"job {job} is not queued again")
        self.until(lambda: self.about(job, "JobState") in ("PENDING", "RUNNING"), f"job {job} has ended")
        if self.about(job, "JobState") == "PENDING":
            time.sleep(6)  # a credential of the earlier start would be taken for this one's: cred_expire
            self.tried("scontrol", "update", f"JobId={job}", "StartTime=now")
