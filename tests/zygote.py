"""A process that has imported everything and forks the `illm` commands it is told to run: a start costs milliseconds, not
seconds, so tests can afford to start, kill and start again many times.

Reads one JSON object per line: {"argv", "cwd", "env", "log"} to start, answered by the pid; {"wait": pid}, answered by the
exit status as in os.waitpid, -9 for SIGKILL.
"""

import contextlib
import importlib
import json
import os
import signal
import sys

ANSWERS = os.fdopen(os.dup(1), "w")  # libraries print while they are imported
os.dup2(2, 1)

import torch  # noqa: E402

from pipeline.cli import app  # noqa: E402
from pipeline.tracking import store  # noqa: E402

WANTED = (
    "deepspeed",
    "transformers",
    "mlflow",
    "pipeline.stages.vqvae",
    "pipeline.stages.pretrain",
    "pipeline.stages.gan",
)


def run(command: dict) -> None:
    os.chdir(command["cwd"])
    os.environ.update(command["env"])
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["illm", *command["argv"]]
    if dump := command.get("dump"):  # where to leave what this rank holds after training
        dump_when_done(dump)
    app.main()


def dump_when_done(path: str) -> None:
    from pipeline.training.runtime import Runtime

    close = Runtime.close

    def dump_and_close(self: Runtime) -> None:
        torch.save(self.state_dict(), path)
        close(self)

    Runtime.close = dump_and_close  # type: ignore[method-assign]


def serve() -> None:
    for name in WANTED:
        with contextlib.suppress(ImportError):  # DeepSpeed is not everywhere
            importlib.import_module(name)
    before = os.environ.get("MLFLOW_TRACKING_URI")
    store.client()  # imports what it imports, and leaves the address of its store
    if before is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
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
