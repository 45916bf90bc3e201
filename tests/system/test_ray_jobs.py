"""Stages on a real Ray cluster of two nodes on this machine, some of which die."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.registry import resolve
from tests.conftest import ROOT, Finished, assert_one_clear_line, illm
from tests.support.ranks import free_port

pytestmark = [pytest.mark.ray_jobs, pytest.mark.slow]
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class Cluster:
    """A head with one processor, and a second node with two."""

    def __init__(self, folder: Path):
        self.gcs, self.dashboard, self.log = free_port(), free_port(), folder / "ray.log"
        self.scratch = f"/tmp/ray-{self.dashboard}"
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.env = os.environ | AUTH | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        # a lost node is noticed after 3 seconds, not after 30
        self.env |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        own = ["--head", f"--port={self.gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"]
        self._node([*own, "--num-cpus=3", f"--temp-dir={self.scratch}"])
        self.until(lambda: listens(self.dashboard), "no dashboard")
        self._node([f"--address=127.0.0.1:{self.gcs}", "--num-cpus=2"])
        self.until(lambda: len(self.raylets()) == 2, "no second node")

    def _node(self, options: list[str]) -> None:
        ray = Path(sys.executable).with_name("ray")
        common = ["--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
        with self.log.open("ab") as log:
            self.nodes.append(
                subprocess.Popen(
                    [ray, "start", *common, *options], stdout=log, stderr=log, start_new_session=True, env=self.env
                )
            )

    def raylets(self) -> list[psutil.Process]:
        """The nodes' own processes, the head's first."""
        groups = {os.getpgid(node.pid) for node in self.nodes}
        found = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "raylet" and os.getpgid(p.pid) in groups]
        return sorted(found, key=lambda p: p.create_time())

    def workers(self) -> list[psutil.Process]:
        """Processes that train, on any node."""
        below = [child for raylet in self.raylets() for child in raylet.children()]
        return [p for p in below if "RayTrainWorker" in " ".join(p.cmdline())]

    def until(self, true: Callable[[], object], told: str, limit: float = 120) -> None:
        deadline = time.monotonic() + limit
        while not true():
            assert time.monotonic() < deadline, f"{told}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.3)

    def stop(self) -> None:
        for node in self.nodes:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("ray.dashboard.optional_deps", reason="needs requirements/jobs.txt: ray[default]")
    made = Cluster(tmp_path_factory.mktemp("ray"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def submit(cluster: Cluster, smoke: Path) -> Callable[..., Finished]:
    def run(*words: str) -> Finished:
        common = ["submit", "ray", "--configs", str(ROOT / "configs/smoke"), "--address", cluster.address]
        # The option counts, and not what the environment says
        elsewhere = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
        return illm(*common, *words, cwd=smoke, env=cluster.env | elsewhere, limit=240)

    return run


def test_stages_run_as_one_job_and_outlive_a_worker_and_a_node(submit, cluster, smoke):
    run = smoke / "runs/by-ray"
    given = [
        f"vqvae.data.shards={smoke}/runs/smoke/shard",
        "vqvae.fit={steps: 160, checkpoint_every: 10, validate_every: 100}",
    ]
    given += [
        f"gan.data.shards={smoke}/runs/smoke/shard",
        f"gan.codec={smoke}/runs/smoke/pretrain",
        "evaluate.max_images=1",
    ]
    told = submit("--stages", "vqvae gan evaluate", "--runs", "runs/by-ray", "--workers", "2", *given)
    assert told.code == 0, told
    job = told.out.split()[1]

    def newest() -> int:
        return max((int(p.name.removeprefix("step-")) for p in run.glob("vqvae/checkpoints/step-*")), default=0)

    cluster.until(lambda: newest() > 0 and len(cluster.workers()) == 2, "training has not begun")
    cluster.workers()[-1].kill()
    before = newest()
    cluster.until(lambda: newest() > before + 10, "it does not go on after a worker died")
    cluster.raylets()[1].kill()
    before = newest()
    cluster.until(lambda: newest() > before + 10, "it does not go on after a node died")
    ray = str(Path(sys.executable).with_name("ray"))

    def state() -> str:
        words = [ray, "job", "status", f"--address={cluster.address}", job]
        ended = subprocess.run(words, env=cluster.env, capture_output=True, text=True, check=False)
        return (ended.stdout + ended.stderr).lower()

    cluster.until(lambda: "succeeded" in (seen := state()) or "failed" in seen, "the job does not end", limit=200)
    logs = subprocess.run(
        [ray, "job", "logs", f"--address={cluster.address}", job],
        env=cluster.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "succeeded" in state(), logs.stdout[-5000:]
    assert "2 x cpu, DDP" in logs.stdout
    labeler = resolve.read(str(run / "vqvae"), "labeler")
    assert resolve.read(str(run / "gan"), "codec").manifest.parents["labeler"].digest == labeler.digest
    assert resolve.read(str(run / "evaluate"), "evaluation").json("totals.json")["fine-tuned"]["bpp"] > 0


def test_what_a_user_can_mend_is_told_once_and_not_tried_again(submit, smoke, tmp_path):
    damaged = shutil.copytree(smoke / "runs/smoke/shard", tmp_path / "shard")
    (damaged / "artifact/index.json").chmod(0o644)
    (damaged / "artifact/index.json").write_text("{}")
    told = submit("--stages", "vqvae", "--runs", "runs/spoilt", "--wait", f"vqvae.data.shards={damaged}")
    assert told.code == 1, told
    assert len(set(re.findall(r"RayTrainWorker pid=(\d+)", told.out))) == 1, told
    assert "index.json: 2 bytes, expected" in told.out


def test_a_cluster_that_does_not_answer_is_one_line(submit, smoke):
    words = ["--stages", "vqvae", "--runs", "runs/x", f"vqvae.data.shards={smoke}/runs/smoke/shard"]
    refused = submit(*words, "--address", f"http://127.0.0.1:{free_port()}")
    assert_one_clear_line(refused, "did not accept the job")
