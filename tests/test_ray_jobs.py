"""The Ray submission script against a real one-node cluster with a dashboard."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline import artifacts
from tests.conftest import ROOT
from tests.test_slurm import free_ports

pytestmark = [pytest.mark.ray_jobs, pytest.mark.slow]


AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture
def cluster(tmp_path) -> Iterator[str]:
    pytest.importorskip("ray.dashboard.optional_deps", reason="needs requirements/jobs.txt: ray[default]")
    gcs, dashboard = free_ports(2)
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    started = subprocess.Popen(
        [ray, "start", "--head", "--block", f"--port={gcs}", "--node-ip-address=127.0.0.1",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2", "--object-store-memory=200000000",
         "--disable-usage-stats", f"--temp-dir=/tmp/ray-{dashboard}"],
        stdout=(tmp_path / "ray.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | AUTH,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not answers(dashboard):
        assert started.poll() is None, (tmp_path / "ray.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "ray.log").read_text()
        time.sleep(0.5)
    yield f"http://127.0.0.1:{dashboard}"
    os.killpg(started.pid, 9)
    started.wait()


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_a_stage_runs_as_a_ray_job(smoke, cluster):
    env = os.environ | AUTH | {
        "RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
        "ILLM_VENV": os.path.dirname(os.path.dirname(sys.executable)),
    }  # fmt: skip
    ended = subprocess.run(
        [str(ROOT / "jobs/ray/submit.sh"), "vqvae", str(ROOT / "configs/smoke/vqvae.yaml"), "runs/by-ray"],
        cwd=smoke, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "succeeded" in ended.stdout
    made = artifacts.read(
        str(smoke / "runs/by-ray"), "labeler"
    )  # Ray gives a job one thread, so its last bits may differ
    assert made.manifest.parents["shards"].digest == artifacts.read(str(smoke / "runs/smoke/shard"), "shards").digest
