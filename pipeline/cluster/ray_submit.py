"""Hands stages to a running Ray cluster as one job, with `ray job submit`."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.processes.command import illm_command


def submit(words: Sequence[str], address: str, wait: bool, dry_run: bool) -> int:
    """Submits `illm on-ray WORDS` in this folder and with this Python; returns the job's exit code, if it is waited for.

    Raises: UserError if the cluster cannot be reached or does not accept it.
    """
    name = time.strftime("illm-%Y%m%d-%H%M%S")
    stages = shlex.join(illm_command(["on-ray", *words]))
    inside = f"cd {shlex.quote(str(Path.cwd()))} && RAY_ADDRESS=auto exec {stages}"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", f"--address={address}", f"--submission-id={name}"]
    command += [] if wait else ["--no-wait"]
    command += ["--", "bash", "-c", inside]
    if dry_run:
        print(shlex.join(command))
        return 0
    # the token of a cluster that requires one is in ~/.ray/auth_token or $RAY_AUTH_TOKEN
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    # Ray prefers an address in the environment to the option
    environment = os.environ | {"RAY_AUTH_MODE": mode, "RAY_API_SERVER_ADDRESS": address}
    ended = subprocess.run(command, env=environment, check=False, capture_output=not wait, text=True)
    if ended.returncode and not wait:
        raise UserError(_why(ended.stdout + ended.stderr, address))
    if not wait:
        on = f"--address={address} {name}"
        print(
            f"job {name} on {address}\nwatch: ray job logs --follow {on}\nstate: ray job status {on}\ncancel: ray job stop {on}"
        )
    return ended.returncode


def _why(output: str, address: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = next(
        (line for line in reversed(lines) if "Error" in line or "No such" in line), lines[-1] if lines else "no answer"
    )
    return (
        f"{address} did not accept the job: {told[:300]}; is the cluster up, is requirements/jobs.txt installed, and does "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token hold the cluster's token?"
    )
