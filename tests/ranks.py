"""Starts `illm` on one or more processes, quickly, through the zygote."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import ROOT

ENGINES = {"alone": (1, 0), "ddp": (2, 0), "zero1": (2, 1), "zero2": (2, 2)}  # name -> processes, ZeRO stage
FOUR = "ddp of four"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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

    def wait(self) -> list[int]:
        """Exit codes of all ranks."""
        self.ended = True
        return [self.zygote.ask({"wait": pid}) for pid in self.pids]

    def running(self) -> bool:
        return any(Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z" for pid in self.pids)

    def told(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


class Zygote:
    def __init__(self, folder: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        self.folder, self.count = folder, 0
        self.jobs: list[Job] = []
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests/zygote.py"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, question: dict) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, cwd: Path, *words: object, engine: str = "alone", dump: Path | None = None, **env: str) -> Job:
        """Starts every rank of `illm words` in `cwd`; `dump` is a folder that gets `rank0.pt` and so on."""
        processes, zero = (4, 0) if engine == FOUR else ENGINES[engine]
        port, pids, logs = free_port(), [], []
        self.count += 1
        for rank in range(processes):
            environment = dict(env)
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            if zero:
                environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero)}
            logs.append(self.folder / f"{self.count}-{rank}.log")
            command = {"argv": [str(w) for w in words], "cwd": str(cwd), "env": environment, "log": str(logs[-1])}
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

    def close(self) -> None:
        self.end_jobs()
        self.process.kill()
        self.process.wait()


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
