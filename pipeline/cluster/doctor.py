"""`illm doctor`: does this machine, or do these nodes, have what jobs need? Seconds, and nothing is queued or downloaded."""

import importlib
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from packaging.requirements import Requirement

from pipeline.cluster import doctor_gpu
from pipeline.cluster.doctor_gpu import Finding
from pipeline.errors import UserError
from pipeline.models import pretrained
from pipeline.processes.command import illm_command
from pipeline.storage import disk
from pipeline.tracking import store

DISTRIBUTION = "illm-pipeline"
# Below: too little for full-size runs
FREE_GB, SHM_GB, OPEN_FILES = 20.0, 1.0, 4096
# Seconds between two clocks, above which times in logs and caches mislead
SKEW = 5.0
# Below, loading may hold up training
CPUS_PER_GPU = 4
# Seconds that nodes wait for each other
RENDEZVOUS_TIMEOUT_S = 60.0


class DoctorFailed(UserError):
    """Something that jobs need is missing."""


def run(folder: Path) -> Iterator[Finding]:
    """All findings on this machine; as one task of several under SLURM, on what the nodes have in common too."""
    for check in (
        _packages,
        doctor_gpu.gpus,
        doctor_gpu.compiler,
        _processors,
        _folder,
        _disk,
        _shm,
        _limits,
        _tracking,
        _weights,
        _port,
        _slurm,
    ):
        try:
            yield from check(folder)
        except Exception as error:
            # A check that breaks is a finding, too
            yield Finding("FAIL", check.__name__.strip("_"), f"{type(error).__name__}: {error}", "report this")
    if int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        yield from _together(folder)


def on_nodes(nodes: int, folder: Path, options: list[str]) -> int:
    """Runs the doctor on this many nodes through srun, now; returns the exit code."""
    if shutil.which("srun") is None:
        raise DoctorFailed("srun is not on the PATH: this is not a SLURM login node")
    command = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--time=5", "--immediate=120", "--label", *options]
    words = illm_command(["doctor", "--folder", str(folder)])
    return subprocess.run([*command, *words], check=False).returncode


def _packages(_folder: Path) -> Iterator[Finding]:
    wrong = []
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        yield Finding("note", "packages", f"{DISTRIBUTION} is not installed in {sys.prefix}", "fine in a container")
        return
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version}, expected {wanted.specifier}")
    python = f"Python {sys.version.split()[0]} in {sys.prefix}"
    if wrong:
        yield Finding("FAIL", "packages", f"{python}: {'; '.join(wrong)}", "make setup")
    else:
        yield Finding("ok", "packages", f"{python}: all there, in tested ranges")


def _folder(folder: Path) -> Iterator[Finding]:
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = time.time()
        disk.write_atomic(probe, b"x")
        skew = probe.stat().st_mtime - before
    except OSError as error:
        yield Finding("FAIL", "run folder", f"{folder.resolve()}: {error.strerror}", "choose a folder you may write to")
        return
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    yield Finding("ok", "run folder", f"{folder.resolve()}: can be written")
    if abs(skew) > SKEW:
        yield Finding("FAIL", "clock", f"{skew:+.0f} s between this machine and its file server", "set the clock (NTP)")
    else:
        yield Finding("ok", "clock", "agrees with the file system's")


def _disk(folder: Path) -> Iterator[Finding]:
    for name, place in (("run folder", folder), ("temporary", Path(os.environ.get("TMPDIR", "/tmp")))):
        free = shutil.disk_usage(place).free / 1e9
        enough = free >= FREE_GB
        remedy = "" if enough else f"a full-size run keeps {FREE_GB:.0f} GB: two checkpoints of 2 GB, artifacts, shards"
        yield Finding("ok" if enough else "note", "disk", f"{name}: {free:.0f} GB free", remedy)


def _shm(_folder: Path) -> Iterator[Finding]:
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total / 1e9
        enough = size >= SHM_GB
        yield Finding(
            "ok" if enough else "FAIL", "shared memory", f"/dev/shm has {size:.2f} GB",
            "" if enough else "NCCL needs it: in a container, --shm-size=8g or --ipc=host",
        )  # fmt: skip


def _limits(_folder: Path) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    remedy = "" if enough else f"ulimit -n {OPEN_FILES} in jobs/slurm/site.sh"
    yield Finding("ok" if enough else "note", "open files", f"at most {soft}", remedy)


def _processors(_folder: Path) -> Iterator[Finding]:
    import torch

    usable, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    enough = usable >= CPUS_PER_GPU * gpus
    remedy = (
        ""
        if enough
        else f"ask for {CPUS_PER_GPU} per GPU (illm submit slurm --cpus {CPUS_PER_GPU}): they load the data"
    )
    yield Finding(
        "ok" if enough else "note",
        "processors",
        f"{usable} may be used" + (f", for {gpus} GPUs" if gpus else ""),
        remedy,
    )


def _tracking(_folder: Path) -> Iterator[Finding]:
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "0", "10"
    try:
        store.reader().search_experiments(max_results=1)
    except store.NoStore:
        hint = "fine for one job at a time; for several nodes a server, see docs/tracking.md"
        yield Finding("note", "tracking", f"{store.masked_uri()}: the first run makes this file", hint)
        return
    except Exception as error:
        remedy = "start it, or correct MLFLOW_TRACKING_URI; runs would keep their records and deliver them later"
        yield Finding("FAIL", "tracking", f"{store.masked_uri()}: {store.first_line(error)}", remedy)
        return
    shared = not store.uri().startswith("sqlite:")
    hint = "" if shared else "a file: fine for one job at a time; for several nodes a server, see docs/tracking.md"
    yield Finding("ok" if shared else "note", "tracking", f"{store.masked_uri()} answers", hint)


def _weights(_folder: Path) -> Iterator[Finding]:
    for name, file in pretrained.FILES.items():
        try:
            found = pretrained.find(name)
        except UserError as error:
            yield Finding("FAIL", "weights", str(error), "remove the file and run: make fetch-weights")
            continue
        remedy = f"without it no {file.use}; where there is internet: make fetch-weights, with the same TORCH_HOME"
        place = found or f"{pretrained.folder() / file.file} is not there"
        yield Finding("ok" if found else "note", "weights", f"{name}: {place}", "" if found else remedy)


def _port(_folder: Path) -> Iterator[Finding]:
    port = int(os.environ.get("ILLM_MASTER_PORT") or 29500)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            yield Finding(
                "note",
                "port",
                f"{port}, where processes of `illm launch` would meet: {error.strerror}",
                "set ILLM_MASTER_PORT there; jobs of SLURM choose a port by their number",
            )
            return
    yield Finding("ok", "port", f"{port}, where processes of `illm launch` would meet, is free")


def _slurm(_folder: Path) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        return
    answered = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False, timeout=20)
    up = "is UP" in answered.stdout
    remedy = "" if up else "ask the admin; `scontrol ping` has to say UP"
    told = (answered.stdout or answered.stderr or "no answer").strip().splitlines()[0]
    yield Finding("ok" if up else "FAIL", "SLURM", told, remedy)
    if not Path("jobs/slurm/stage.sbatch").is_file():
        yield Finding("FAIL", "job scripts", "jobs/slurm/stage.sbatch is not here", "submit from the project's folder")


def _together(folder: Path) -> Iterator[Finding]:
    """What only several nodes can check: whether they see the same files, each other, and the same time."""
    number, count = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    place = folder / f".doctor-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    place.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("", 0)) as server:
        card = {"host": os.uname().nodename, "port": server.getsockname()[1], "time": time.time()}
        disk.write_atomic(place / f"{number}.json", json.dumps(card).encode())
        missing = _until(lambda: [n for n in range(count) if not (place / f"{n}.json").is_file()])
        if missing:
            remedy = f"{folder.resolve()} has to be on a file system that all nodes mount"
            yield Finding("FAIL", "shared folder", f"node {number} does not see what nodes {missing} wrote", remedy)
            return
        yield Finding("ok", "shared folder", f"node {number} of {count} sees the files of all")
        first = json.loads((place / "0.json").read_text())
        address = os.environ.get("ILLM_MASTER_ADDR") or (first["host"] if number else "127.0.0.1")
        try:
            socket.create_connection((address, first["port"]), timeout=10).close()
            yield Finding("ok", "network", f"node {number} reaches the first node at {address}")
        except OSError as error:
            remedy = "open the nodes' ports to each other, or set ILLM_MASTER_ADDR to an address that the others reach"
            yield Finding("FAIL", "network", f"node {number} cannot reach {address}: {error}", remedy)
        skew = (place / f"{number}.json").stat().st_mtime - card["time"]
        if abs(skew) > SKEW:
            yield Finding("FAIL", "clock", f"node {number} is {skew:+.0f} s off its file server", "set the clock (NTP)")
        (place / f"{number}.done").touch()
        # The others reach this one, and it clears up after them
        if not number:
            _until(lambda: [n for n in range(count) if not (place / f"{n}.done").is_file()])
            shutil.rmtree(place, ignore_errors=True)


def _until(waiting_for: Callable[[], list[int]]) -> list[int]:
    """What is still missing when everything is there, or after the timeout."""
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while (left := waiting_for()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
