"""Which device a process trains on, and with what arithmetic."""

import os
from pathlib import Path
from typing import Literal

import torch

from pipeline.errors import TrainingError

# fp32: convolutions on a GPU multiply in TF32, as in the published implementation; fp32_exact: they do not;
# bf16: autocast over weights in fp32
Precision = Literal["fp32", "fp32_exact", "bf16"]
# NVIDIA's Ampere, the first that multiplies bf16
BF16_GPU = (8, 0)
# As CUDA_VISIBLE_DEVICES: hidden by hand, or by SLURM
NO_DEVICES = ("", "-1", "NoDevFiles")
DRIVER = Path("/proc/driver/nvidia/version")


def on_cpu_by_choice() -> bool:
    """Whether the environment says that a GPU is not to be used."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
    return asked or os.environ.get("CUDA_VISIBLE_DEVICES") in NO_DEVICES


def usable_gpu() -> bool:
    """Whether this process trains on a GPU.

    Raises: TrainingError if there is one, or one was requested, that torch cannot use; or fewer than local processes.
    """
    if on_cpu_by_choice():
        return False
    on_purpose = "to train on the CPU on purpose, set ACCELERATE_USE_CPU=true"
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            raise TrainingError(
                f"{processes} processes were started on {os.uname().nodename}, which shows {gpus} GPU(s), expected at most one "
                f"process per GPU: lower num_processes in the launch file, or --num_processes; {on_purpose}"
            )
        return True
    if found := signs_of_a_gpu():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise TrainingError(
            f"{found} on {os.uname().nodename}, but torch cannot use a GPU: torch {torch.__version__} {built}; look at nvidia-smi "
            f"and whether its driver is new enough; {on_purpose}"
        )
    return False


def signs_of_a_gpu() -> str:
    """What says that this process was meant to have a GPU, empty if nothing does."""
    visible, slurm = (os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"))
    if visible:
        return f"CUDA_VISIBLE_DEVICES={visible}"
    if slurm not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE={slurm}"
    return f"{DRIVER} is there" if DRIVER.exists() else ""


def best_precision() -> Precision:
    """bf16 where this process's device has instructions for it, else fp32."""
    if usable_gpu():
        return "bf16" if torch.cuda.get_device_capability() >= BF16_GPU else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def settle_arithmetic(precision: Precision, deterministic: bool, benchmark: bool = False) -> None:
    """How this process's GPU multiplies fp32 numbers, and whether it may choose kernels that round differently each time.

    benchmark: whether cuDNN tries several kernels for each new shape, and may settle on others in another process.

    Matrix products stay in full fp32 in every precision: they decide labels, and the length of a code.
    """
    # These switches and not the newer fp32_precision: torch.compile still reads them, and raises where only those are set.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision != "fp32_exact"
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # read when cuBLAS starts, so before the first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # it would write into every new tensor
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
