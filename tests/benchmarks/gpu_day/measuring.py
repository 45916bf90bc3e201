"""How a step of training is timed, what it is bound by, and what its time on the GPU is made of."""

import gc
import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import steps
from tests.benchmarks.gpu_day.rows import Result
from tests.benchmarks.measure import CUDA, TINY, flops
from tests.benchmarks.steps import OURS, Step, Stepping

STEPS, WARM_UP = (20, 3) if CUDA and not TINY else (1, 1)
# Crops of a full-size step
SIZE = {"gan": 16, "pretrain": 8, "vqvae": 16}
PRECISIONS = ("bf16",) if TINY else ("fp32", "bf16")
# What the GPU can do at most with dense bf16, in FLOP/s: NVIDIA's data sheets
BF16_PEAK = {"H100": 989e12, "H200": 989e12}
# Kinds of kernels by their names, and of operations where there is no GPU; the first that fits
KINDS = (
    ("optimizer", r"multi_tensor|[Aa]dam|lpnorm|FusedOptimizer|foreach|linalg_vector_norm"),
    ("norm", r"layer_?norm|LayerNorm|channel_?norm|GammaBeta|Rowwise|_norm"),
    ("layout and padding", r"nhwcToNchw|nchwToNhwc|AddPadding|transpose|constant_pad"),
    ("attention", r"fmha|flash|mem_eff|attention"),
    ("compiled", r"^triton_"),
    ("convolution", r"conv|xmma|cutlass|cudnn|implicit|wgrad|dgrad|fprop|gemm|sm90|sm80|splitK|addmm|::[bm]+m$|nvjet"),
    ("casts and copies", r"copy|Memcpy|Memset|_to_copy|fill"),
    ("resampling", r"upsample|avg_pool|max_pool"),
    ("softmax and loss", r"[sS]oft[Mm]ax|nll"),
    ("reductions", r"reduce|aten::(sum|mean|norm)"),
    ("elementwise", r"elementwise|vectorized|aten::(add|sub|mul|div|relu|silu|sigmoid|where|clamp)"),
)


def crops(stage: str) -> int:
    return 2 if TINY else SIZE[stage]


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def as_torch_starts() -> None:
    """Undoes what the measurement before this one set."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def made(stage: str, batch: int, engine: object, **more: object) -> Stepping:
    """A stage's step on so many crops; `more`: other keys of the stage."""
    steps.BATCH[stage] = batch
    step: Stepping = OURS[stage](engine, **more)  # type: ignore[operator]
    return step


def timed(step: Step, batch: int) -> Result:
    """Milliseconds of a step, crops per second, milliseconds of CPU to enqueue a step, most memory in GB; seconds of the
    first steps, which compile and choose kernels."""
    started = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    wait()
    first = time.perf_counter() - started
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    seconds = (time.perf_counter() - started) / STEPS
    started = time.perf_counter()
    step()
    start_ms = 1e3 * (time.perf_counter() - started)
    wait()
    found: Result = {"ms": 1e3 * seconds, "crops_per_s": batch / seconds, "start_ms": start_ms, "first_s": first}
    return found | (memory() if CUDA else {})


def memory() -> Result:
    """Most GB in tensors, and most that was reserved: what CUDA graphs hold counts in the latter alone."""
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(STEPS):
        call()
    wait()
    return 1e3 * (time.perf_counter() - started) / STEPS


def arithmetic(step: Step, batch: int) -> Result:
    """Convolutions and matrix products of a step, and how long they take at least in bf16 on this GPU."""
    count = flops(step)
    found: Result = {"gflop_per_crop": count / batch / 1e9}
    name = torch.cuda.get_device_name() if CUDA else ""
    peaks = [peak for gpu, peak in BF16_PEAK.items() if gpu in name]
    return found | ({"bound_ms": 1e3 * count / peaks[0]} if peaks else {})


def share_of_bound(found: Result, bound: Result) -> Result:
    """Which part of a step's time the bound is, 1 at best."""
    return {"share_of_bound": bound["bound_ms"] / found["ms"]} if "bound_ms" in bound else {}  # type: ignore[operator]


def by_kind(step: Step, count: int = 1 if TINY else 3) -> Result:
    """Milliseconds of a step that the GPU is busy, by kind of kernel, and the longest kernels; on a CPU, of operations."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as seen:
        for _ in range(count):
            step()
        wait()
    kinds: Counter[str] = Counter()
    longest: Counter[str] = Counter()
    number = 0
    for event in seen.events() or ():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        # a range with a name of ours is no kernel
        if on_gpu != CUDA or getattr(event, "is_user_annotation", False) or event.name.startswith("ProfilerStep"):
            continue
        ms = (event.time_range.elapsed_us() if CUDA else event.self_cpu_time_total) / 1e3 / count
        kinds[kind_of(event.name)] += ms  # type: ignore[assignment]
        longest[event.name[:80]] += ms  # type: ignore[assignment]
        number += 1
    return {
        "gpu_ms": float(sum(kinds.values())),
        "kernels": number // count,
        "gpu_ms_by_kind": dict(kinds.most_common()),
        "longest_kernels": dict(longest.most_common(12)),
    }


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")
