"""A process that has imported everything and forks the `illm` commands it is told to run: a start costs milliseconds, not
seconds, so tests can afford to start, kill and start again many times. Only imports are shared: a command has the arguments,
the environment, the folder, the standard streams and the exit code that it would have as a process of its own.

Reads one JSON object per line: {"argv", "cwd", "env", "out", "err"} to start, answered by the pid; {"wait": pid}, answered by
the exit status as in os.waitpid, -9 for SIGKILL. With "template", new stores get its tables: see tests/support/empty_store.py.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

ANSWERS = os.fdopen(os.dup(1), "w")  # libraries print while they are imported
os.dup2(2, 1)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from pipeline.tracking import store  # noqa: E402
from tests.support import empty_store  # noqa: E402

WANTED = (
    "deepspeed",
    "transformers",
    "mlflow.pyfunc",
    "pipeline.stages.shard",
    "pipeline.stages.vqvae",
    "pipeline.stages.pretrain",
    "pipeline.stages.gan",
    "pipeline.stages.evaluate",
    "pipeline.stages.promote",
)


def run(command: dict) -> None:
    """Becomes the process that `python -m pipeline` would be."""
    if command.get("session"):
        os.setsid()
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    for number, name in ((0, os.devnull), (1, command["out"]), (2, command["err"])):
        stream = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()
    sys.path[0] = command["cwd"]
    sys.argv = ["-m", *command["argv"]]
    if template := command.get("template"):
        empty_store.copied(Path(template))
    if dump := command.get("dump"):  # where to leave what this rank holds after training
        dump_when_done(dump)
    runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
    sys.exit()


def dump_when_done(path: str) -> None:
    from pipeline.training.runtime import Runtime

    close = Runtime.close

    def dump_and_close(self: Runtime) -> None:
        torch.save(self.state_dict(), path)
        close(self)

    Runtime.close = dump_and_close  # type: ignore[method-assign]


def open_a_store() -> None:
    """Imports what the first use of a store imports, and leaves no trace of that store."""
    import mlflow

    before = os.environ.copy()
    store.client()
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
    os.environ.clear()
    os.environ.update(before)


def serve() -> None:
    for name in WANTED:
        with contextlib.suppress(ImportError):  # DeepSpeed is not everywhere
            importlib.import_module(name)
    open_a_store()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            print(os.waitstatus_to_exitcode(status), file=ANSWERS, flush=True)
            continue
        pid = os.fork()
        if not pid:
            run(command)
        print(pid, file=ANSWERS, flush=True)


if __name__ == "__main__":
    serve()
