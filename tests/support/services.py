"""Real servers on 127.0.0.1 for tests: `mlflow server`, PostgreSQL, and an S3-compatible store."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.ranks import free_port, wait_until

S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """`mlflow server` on a database; its artifacts in a folder that it serves, or in a bucket that clients reach."""

    def __init__(self, folder: Path, database: str = "", bucket: str = "", env: dict[str, str] | None = None):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = database or f"sqlite:///{folder}/server.db"
        self.artifacts = ["--no-serve-artifacts", "--default-artifact-root", bucket] if bucket else []
        self.artifacts = self.artifacts or ["--artifacts-destination", str(folder / "bucket")]
        self.env = env or {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.database, *self.artifacts, "--workers", "1"]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            command, env=os.environ | quiet | self.env, stdout=log, stderr=log, start_new_session=True
        )
        wait_until(self.answers, (self.folder / "server.log").read_text()[-2000:])

    def answers(self) -> bool:
        return answers(f"{self.uri}/health")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def answers(url: str) -> bool:
    """Whether a GET of the URL is answered with 200."""
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    except OSError:
        return False


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a new database on a PostgreSQL server of our own; skips where PostgreSQL is missing."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs PostgreSQL (Debian's package postgresql)")
    pytest.importorskip("psycopg", reason="needs requirements/server.txt")
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    prefix = ["runuser", "-u", user, "--"] if os.geteuid() == 0 else []
    folder, port = Path(tempfile.mkdtemp(prefix="illm-pg-")), free_port()
    shutil.chown(folder, user)

    def control(*words: str) -> None:
        subprocess.run(
            [*prefix, programs[-1] / "pg_ctl", "-D", folder / "data", *words], check=True, capture_output=True
        )

    create = [*prefix, programs[-1] / "initdb", "-D", folder / "data", "-A", "trust", "-U", "mlflow"]
    subprocess.run(create, check=True, capture_output=True)
    options = f"-p {port} -k {folder} -c fsync=off -c listen_addresses=127.0.0.1"
    control("-l", str(folder / "log"), "-w", "-o", options, "start")
    try:
        yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    finally:
        control("-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """The s3:// address of a new bucket and the environment that clients need; skips where moto is missing."""
    pytest.importorskip("boto3", reason="needs requirements/s3.txt")
    server = pytest.importorskip("moto.server", reason="needs requirements/s3.txt")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    import boto3

    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    session = boto3.session.Session("test", "test", region_name="us-east-1")
    session.client("s3", endpoint_url=endpoint).create_bucket(Bucket="illm")
    try:
        yield "s3://illm/runs", S3_KEYS | {"MLFLOW_S3_ENDPOINT_URL": endpoint, "AWS_ENDPOINT_URL": endpoint}
    finally:
        running.stop()
