"""What the machine is: driver, compilers, libraries, and what `illm doctor` finds."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

from tests.benchmarks.gpu_day.inputs import ROOT
from tests.benchmarks.gpu_day.rows import LeftOut, Result, Rows
from tests.benchmarks.measure import CUDA

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "accelerate",
    "deepspeed",
    "compressai",
    "mlflow",
    "numpy",
    "neuralcompression",
)


def rows() -> Rows:
    yield "GPU and driver", gpu
    yield "compilers and processor", compilers
    yield "versions of packages", packages
    yield "illm doctor", doctor


def gpu() -> Result:
    if not CUDA:
        raise LeftOut("no GPU")
    asked = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    found = subprocess.run(
        ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True
    )
    properties = torch.cuda.get_device_properties(0)
    return {
        "nvidia_smi": found.stdout.strip() or found.stderr.strip(),
        "memory_gb": properties.total_memory / 1e9,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda or "",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def compilers() -> Result:
    """What torch.compile and Triton need, and how many cores feed the GPU."""
    found: Result = {name: shutil.which(name) or "missing" for name in ("gcc", "g++", "nvcc")}
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return found | {"python_h": header.exists(), "cpu_cores": os.cpu_count() or 0, "system": platform.release()}


def packages() -> Result:
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def doctor() -> Result:
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return {"code": ended.returncode, "told": (ended.stdout + ended.stderr)[-4000:]}
