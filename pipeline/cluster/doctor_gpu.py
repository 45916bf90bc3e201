"""The checks of `illm doctor` on GPUs, and on the compiler that torch.compile needs."""

import importlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """FAIL: jobs will not run. note: they will, without something. The remedy says what to do."""

    level: Level
    subject: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.subject:14} {self.found}" + (f"\n{'':22}-> {self.remedy}" if self.remedy else "")


def gpus(_folder: Path) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        )
        has_driver = Path("/proc/driver/nvidia/version").exists()
        if has_driver:
            yield Finding(
                "FAIL", "GPU", f"a driver but no usable GPU; {built}", "check nvidia-smi and the driver's version"
            )
        else:
            yield Finding("note", "GPU", "none: trains on the CPU", "ask the scheduler for one: --gpus 1")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        summed = float(torch.ones(1024, device=f"cuda:{number}").sum())
        good = summed == 1024 and free > total / 2
        found = f"{number}: {about.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        yield Finding("ok" if good else "FAIL", "GPU", found, "" if good else "another process uses it: nvidia-smi")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    yield Finding("ok" if nccl else "FAIL", "NCCL", nccl or "torch has none", "" if nccl else "install torch for CUDA")
    yield _readings()


def _readings() -> Finding:
    """Whether MLflow can read the load of NVIDIA GPUs: it does so through the package nvidia-ml-py and the driver's NVML."""
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
        return Finding("ok", "GPU readings", f"of {library.nvmlDeviceGetCount()} GPU(s), recorded with every run")
    except ImportError:
        return Finding("note", "GPU readings", "none: nvidia-ml-py is missing", "make setup")
    except Exception as error:
        # NVML's own kinds
        return Finding("note", "GPU readings", f"none: {error}", "runs work without them; check the driver")


def compiler(_folder: Path) -> Iterator[Finding]:
    """What torch.compile needs: a C++ compiler, and for a GPU's kernels a C compiler and Python's headers."""
    import torch

    headers = Path(sysconfig.get_path("include")) / "Python.h"
    has_gcc = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
    missing = [] if shutil.which(os.environ.get("CXX", "g++")) else ["g++"]
    if torch.cuda.is_available():
        missing += ([] if has_gcc else ["gcc"]) + ([] if headers.is_file() else [str(headers)])
    remedy = "install them (Debian: g++ python3-dev); only engine.compile=true needs them" if missing else ""
    found = f"{', '.join(missing)} missing" if missing else "all that engine.compile needs"
    yield Finding("note" if missing else "ok", "compiler", found, remedy)
