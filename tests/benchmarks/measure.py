"""How benchmarks measure: alternating pairs, medians, peak memory, and the machine's own peak."""

import gc
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.support.memory import peak_resident_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
TINY = bool(os.environ.get("TINY"))
if CUDA:
    # tests.conftest, of which some benchmarks use a part, would hide it
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against a peer, or alone. `ratio` is ours / peer, above 1 where more is better."""

    name: str
    ours: float
    unit: str
    peer: float | None = None
    peer_name: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None


def hardware() -> str:
    if CUDA:
        return f"{torch.cuda.get_device_name()}, driver {driver()}, {os.cpu_count()} CPU cores"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def pairs(ours: Callable[[], object], peer: Callable[[], object], count: int) -> tuple[float, float]:
    """Median seconds of each, over alternating calls after one call of each."""
    # A step of before holds gigabytes, and may hang in a circle
    gc.collect()
    seconds(ours), seconds(peer)
    times = [(seconds(ours), seconds(peer)) for _ in range(count)]
    mine, theirs = zip(*times, strict=True)
    return statistics.median(mine), statistics.median(theirs)


def faster(
    name: str, ours: Callable[[], object], peer: Callable[[], object], items: int, unit: str, peer_name: str, count: int
) -> Row:
    """How many items a second each handles."""
    mine, theirs = pairs(ours, peer, count)
    return Row(name, items / mine, unit, items / theirs, peer_name)


def peak_memory_gb(make: Callable[[], Callable[[], object]]) -> float:
    """Most memory that what `make` builds holds while it is called twice: of the GPU, or of a process of its own.

    `make` is a function of a module, or a partial of one.
    """
    if DEVICE.type == "cuda":
        # what still hangs in a cycle would be freed during the measurement
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call = make()
        for _ in range(2):
            call()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    context = multiprocessing.get_context("spawn")  # a fork of a process whose threads have worked would hang
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(make, sender))
    process.start()
    process.join()
    return receiver.recv() / 1e9 if receiver.poll() else float("nan")


def _report_peak(make: Callable[[], Callable[[], object]], sender: Connection) -> None:
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    call = make()
    for _ in range(2):
        call()
    sender.send(peak_resident_bytes() - before)


class _Flops(TorchDispatchMode):
    """Adds up what torch's own table says of every operation. (FlopCounterMode's module hooks refuse autograd.grad.)"""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if counted := flop_registry.get(func._overloadpacket):
            self.total += counted(*args, **(kwargs or {}), out_val=out)
        return out


def flops(call: Callable[[], object]) -> int:
    """Multiplications and additions of convolutions and matrix products in one call, backward passes included."""
    with _Flops() as counter:
        call()
    return counter.total


def peak_flops() -> dict[str, float]:
    """What this machine reaches in fp32, on a GPU both in TF32, in FLOP/s: a large matrix product, and the codec's most
    common convolution."""
    n = 2048 if DEVICE.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=DEVICE), torch.randn(n, n, device=DEVICE)
    x = torch.randn(8, 960, 16, 16, device=DEVICE).to(memory_format=torch.channels_last)
    w = torch.randn(960, 960, 3, 3, device=DEVICE).to(memory_format=torch.channels_last)
    products = {
        "matrix product": (lambda: a @ b, 2 * n**3),
        "convolution 960 to 960, 3x3": (lambda: F.conv2d(x, w, padding=1), 2 * 8 * 256 * 960 * 960 * 9),
    }
    best = {}
    # Runtime keeps the training's matrix products out of TF32; here both have to be in it to be compared
    kept, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for name, (call, count) in products.items():
        seconds(call)
        best[name] = count / min(seconds(call) for _ in range(7))
    torch.backends.cuda.matmul.allow_tf32 = kept
    return best


def driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version(), "platform": sys.platform}
    if CUDA:
        major, rest = divmod(torch.backends.cudnn.version() or 0, 10000)
        found["cudnn"] = f"{major}.{rest // 100}.{rest % 100}"
    return found
