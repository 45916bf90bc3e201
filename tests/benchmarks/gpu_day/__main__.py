"""Runs the steps: `python -m tests.benchmarks.gpu_day [STEP ...]`, by default all of them, the most valuable first."""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
import warnings

from tests.benchmarks.gpu_day.measuring import as_torch_starts
from tests.benchmarks.gpu_day.rows import Group, LeftOut, Rows, target
from tests.benchmarks.measure import CUDA, TINY

# Number -> module, which names the rows' group; in order of value
STEPS = {
    "0": "machine",
    "1": "steps",
    "2": "variants",
    "3": "reference",
    "5": "same",
    "6": "training",
    "4": "batches",
    "9": "ranks",
    "8": "numerics",
    "7": "kernels",
    "10": "zero",
    "11": "photos",
}
# Seconds for one step
LIMIT = 570
# Set in the process that runs a step, or several
ALONE = "GPU_DAY_ALONE"
# cuBLAS reads it once, before deterministic rows can ask for it
WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
PASSED_ON = ("REFERENCE", "SHARDS", "TINY")


def group_of(step: str) -> Group:
    given = [f"{name}={'1' if name == 'TINY' else 'folder'}" for name in PASSED_ON if os.environ.get(name)]
    return Group(STEPS[step], " ".join([*given, f'make gpu-day STEP="{step}"']))


def measure(step: str) -> None:
    """Runs one step in this process."""
    warnings.filterwarnings("ignore")
    group, rows = group_of(step), importlib.import_module(f"tests.benchmarks.gpu_day.{STEPS[step]}").rows
    group.begin()
    made: Rows = rows()
    for name, call in made:
        as_torch_starts()
        try:
            group.add(name, call())
        except LeftOut as reason:
            group.add(name, {"left_out": str(reason)})
        except Exception as error:
            traceback.print_exc()
            group.add(name, {"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]})


def run(step: str) -> None:
    """Runs one step in a process of its own, and says in a row how it broke off, if it did."""
    # the profiler's own messages are of no use
    process = subprocess.Popen(
        command_of(step), env=os.environ | {ALONE: "1", "KINETO_LOG_LEVEL": "5"} | WORKSPACE, start_new_session=True
    )
    try:
        code = process.wait(LIMIT)
        told = f"the process ended with code {code}" if code else ""
    except subprocess.TimeoutExpired:
        told = f"not done within {LIMIT} s"
    finally:
        # also what it started itself
        end_session(process)
    if told:
        group_of(step).add("the whole step", {"failed": told})


def command_of(step: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.gpu_day", step]


def end_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main(wanted: list[str]) -> int:
    if unknown := set(wanted) - set(STEPS):
        sys.exit(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if not (CUDA or (TINY and os.environ.get("OUT"))):
        sys.exit("no GPU; TINY=1 OUT=folder tries the steps on a CPU")
    if os.environ.get(ALONE):
        for step in wanted:
            measure(step)
        return 0
    for step in wanted or STEPS:
        print(f"step {step}: {STEPS[step]}", flush=True)
        run(step)
    rows = json.loads(target().read_text(encoding="utf-8"))
    print("failed:", ", ".join(f"{row['group']}: {row['name']}" for row in rows if "failed" in row) or "none")
    print(f"written: {target()}; make tables puts them into docs/performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
