"""What a run was made by: code, packages, machine, command. No secrets: addresses lose their passwords."""

import getpass
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from pipeline import __version__, config, redaction

SHOWN_PACKAGES = (
    "torch",
    "compressai",
    "accelerate",
    "deepspeed",
    "webdataset",
    "mlflow",
    "ray",
    "lpips",
    "torch-fidelity",
)
# Root of the source tree, if there is one
HOME = Path(__file__).resolve().parent.parent.parent
# What `tags` said
ABOUT = "about.json"
# Bytes
MAX_DIFF = 2**20


def who() -> str:
    """user@host, or $ILLM_USER, for instance in a job that runs under a service's account."""
    return os.environ.get("ILLM_USER") or f"{_user()}@{socket.gethostname()}"


def command() -> str:
    """The command line of this process, as it can be typed again."""
    program, *words = sys.argv
    return redaction.masked(shlex.join([Path(program).name.replace("__main__.py", "illm"), *words]))


def tags() -> dict[str, str]:
    """Short facts, under MLflow's own names where it has one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    shown = [f"{name} {version}" for name, version in packages().items() if name in SHOWN_PACKAGES]
    found = {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "command": command(),
        "code": f"illm-pipeline {__version__}",
        "machine": f"{socket.gethostname()}: {_cpu()}, {len(os.sched_getaffinity(0))} core(s), {memory:.0f} GiB, {_gpus()}",
        "packages": ", ".join([f"python {platform.python_version()}", *shown]),
    }
    places = {"processes": "WORLD_SIZE", "SLURM job": "SLURM_JOB_ID", "Ray job": "RAY_JOB_ID"}
    launched = [f"{word} {os.environ[name]}" for word, name in places.items() if os.environ.get(name)]
    found["launched"] = ", ".join(launched)
    if commit := _git("rev-parse", "HEAD"):
        found["mlflow.source.git.commit"] = commit
        if diff():
            found["code"] += ", with changes: provenance/.../changes.diff"
    return {name: value for name, value in found.items() if value}


@cache
def packages() -> dict[str, str]:
    """Name -> version of every installed package."""
    names = ((d.metadata["Name"], d.version) for d in metadata.distributions())
    return dict(sorted((str(name).lower(), version) for name, version in names if name))


@cache
def diff() -> str:
    """What differs from the commit in tracked files; "" if nothing does or the code is not in a git repository."""
    found = _git("diff", "HEAD", "--no-ext-diff", "--no-color")
    return found if len(found) <= MAX_DIFF else f"{found[:MAX_DIFF]}\n(cut: {len(found)} characters)\n"


def write(folder: Path, cfg: config.Config) -> None:
    """Writes `config.yaml`, `about.json`, `packages.txt`, `command.txt` and, if the code has changes, `changes.diff`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).write_text(json.dumps(tags(), indent=1), encoding="utf-8")
    (folder / "config.yaml").write_text(config.dump(cfg), encoding="utf-8")
    (folder / "packages.txt").write_text("".join(f"{n}=={v}\n" for n, v in packages().items()), encoding="utf-8")
    (folder / "command.txt").write_text(command() + "\n", encoding="utf-8")
    changes = diff()
    if changes:
        (folder / "changes.diff").write_text(redaction.masked(changes), encoding="utf-8")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user without a name
        return str(os.getuid())


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> str:
    # A stage that does not use it needs no GPU either
    torch = sys.modules.get("torch")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return f"{len(names)} x {names[0]}" if names else "no GPU"


def _git(*words: str) -> str:
    if not (HOME / ".git").exists():
        return ""
    try:
        ended = subprocess.run(
            ["git", "-C", str(HOME), *words], capture_output=True, text=True, check=False, timeout=10, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""
