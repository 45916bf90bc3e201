"""Starts `illm` on one or more processes, quickly, through the zygote."""

import contextlib
import functools
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import ILLM, PLAIN, ROOT, Finished

ENGINES = {"alone": (1, 0), "ddp": (2, 0), "zero1": (2, 1), "zero2": (2, 2)}  # name -> processes, ZeRO stage
FOUR = "ddp of four"


def free_port() -> int:
    """A port that nobody listens on. Each worker of pytest-xdist hands out ports of a range of its own, each once, and none
    that the system gives to those who ask for any."""
    while True:
        port = next(_ports)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _own_ports() -> Iterator[int]:
    """Above those of Ray's workers, which end at 19999, and below the system's own, which begin at 32768.

    Where in the range they begin differs between runs that go on at the same time.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    first, count = 20500 + 1500 * worker, 1500
    for number in itertools.count(os.getpid() * 61):
        yield first + number % count


_ports = _own_ports()


@dataclass
class Job:
    """Running ranks."""

    zygote: "Zygote"
    pids: list[int]
    logs: list[Path]
    ended: bool = False

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            os.kill(self.pids[rank], number)

    def wait(self, limit: float = 300) -> list[int]:
        """Exit codes of all ranks."""
        deadline = time.monotonic() + limit
        for pid in self.pids:
            if not ends(pid, deadline - time.monotonic()):
                self.kill(signal.SIGABRT)  # each says where its threads are
                raise AssertionError(f"not all ranks have ended within {limit} s\n{self.told()[-8000:]}")
        self.ended = True
        return [self.zygote.ask({"wait": pid}) for pid in self.pids]

    def running(self) -> bool:
        return any(Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z" for pid in self.pids)

    def told(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


def ends(pid: int, limit: float) -> bool:
    """Whether a process ends within so many seconds; its parent still has to wait for it."""
    process = os.pidfd_open(pid)
    try:
        return bool(select.select([process], [], [], max(0.0, limit))[0])
    finally:
        os.close(process)


class Zygote:
    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.jobs: list[Job] = []
        self.turn = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests/support/zygote.py"],
            cwd=folder, env=PLAIN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, question: dict) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.turn:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())

    def start(self, cwd: Path, *words: object, engine: str = "alone", dump: Path | None = None, **env: str) -> Job:
        """Starts every rank of `illm words` in `cwd`; `dump` is a folder that gets `rank0.pt` and so on."""
        processes, zero = (4, 0) if engine == FOUR else ENGINES[engine]
        port, pids, logs = free_port(), [], []
        self.count += 1
        for rank in range(processes):
            environment = os.environ | ILLM | {"OMP_NUM_THREADS": "1"} | env
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            if zero:
                environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero)}
            logs.append(self.folder / f"{self.count}-{rank}.log")
            command = {"argv": [str(w) for w in words], "cwd": str(cwd), "env": environment}
            command |= {"out": str(logs[-1]), "err": str(logs[-1])}
            if dump is not None:
                command["dump"] = str(dump / f"rank{rank}.pt")
            pids.append(self.ask(command))
        self.jobs.append(Job(self, pids, logs))
        return self.jobs[-1]

    def end_jobs(self) -> None:
        """Kills what still runs."""
        for job in self.jobs:
            if not job.ended:
                job.kill()
                job.wait()
        self.jobs.clear()

    def run(self, cwd: Path, *words: object, engine: str = "alone", dump: Path | None = None, **env: str) -> str:
        """Runs to the end; returns what all ranks printed."""
        job = self.start(cwd, *words, engine=engine, dump=dump, **env)
        codes = job.wait()
        assert not any(codes), (codes, job.told()[-4000:])
        return job.told()

    def finish(self, words: tuple[object, ...], cwd: Path, env: dict[str, str], limit: float) -> Finished:
        """Runs `illm words` to its end, in a session of its own; fails the test if that takes longer than the limit."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            command = {"argv": list(map(str, words)), "cwd": str(cwd), "env": env, "session": True}
            command["template"] = str(self.folder / "empty.db")
            pid = self.ask(command | {"out": str(out), "err": str(err)})
            in_time = ends(pid, limit)
            if not in_time:
                os.killpg(pid, signal.SIGABRT)  # each process says where its threads are
            code = self.ask({"wait": pid})
            ended = Finished(code, out.read_text(), err.read_text())
        assert in_time, f"{words} took more than {limit} s\n{ended.out}\n{ended.err}"
        return ended

    def close(self) -> None:
        self.end_jobs()
        self.process.kill()
        self.process.wait()


@functools.cache
def shared_zygote() -> Zygote:
    """The one of this worker; ends with the session."""
    return Zygote(Path(tempfile.mkdtemp(prefix="illm-zygote-")))


def close_shared_zygote() -> None:
    if shared_zygote.cache_info().currsize:
        shared_zygote().close()
        shutil.rmtree(shared_zygote().folder, ignore_errors=True)
        shared_zygote.cache_clear()


def wait_until(true, what: str, limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def flat(state: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts and lists, by its path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}.{key}").items()}
