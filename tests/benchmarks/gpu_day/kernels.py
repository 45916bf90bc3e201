"""Single kernels: channel norms by width, convolutions with odd and padded channels, copies to the GPU."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.layers import ChannelNorm
from pipeline.training.engine_config import EngineConfig, choose_kernels
from tests.benchmarks.gpu_day.measuring import milliseconds, wait
from tests.benchmarks.gpu_day.rows import LeftOut, Result, Rows
from tests.benchmarks.measure import CUDA, DEVICE, TINY

# crops, channels, side
NORMS = ((16, 64, 256), (8, 60, 256), (16, 128, 128), (8, 240, 64), (8, 960, 16))
# crops, channels in and out, side, kernel
CONVOLUTIONS = (
    (8, 19, 128, 256, 3), (8, 24, 128, 256, 3), (8, 32, 128, 256, 3), (8, 128, 128, 256, 3), (8, 960, 960, 16, 3),
    (8, 60, 3, 256, 7), (8, 64, 8, 256, 7), (8, 60, 120, 256, 3), (8, 64, 128, 256, 3), (8, 220, 960, 16, 3),
    (8, 224, 960, 16, 3), (16, 64, 64, 256, 3),
)  # fmt: skip
# What computes it, and its weights
Norm = tuple[Callable[[Tensor], Tensor], list[Tensor]]
DTYPES = (torch.float32, torch.bfloat16)
CROPS = (4 if TINY else 32, 256, 256, 3)
if TINY:
    NORMS, CONVOLUTIONS = ((2, 60, 16),), ((2, 19, 16, 16, 3),)


def rows() -> Rows:
    for shape in NORMS:
        for dtype in DTYPES:
            for name, norm in NORM_KINDS.items():
                yield f"{name} {sized(*shape)} {short(dtype)}", lambda n=norm, s=shape, d=dtype: timed_norm(n, *s, d)
    for benchmark in (False, True):
        for n, c_in, c_out, side, kernel in CONVOLUTIONS:
            for dtype in DTYPES:
                name = f"convolution {c_in} to {c_out}, {kernel}x{kernel}, {n}x{side}x{side}, {short(dtype)}"
                shape = (n, c_in, c_out, side, kernel)
                call = lambda s=shape, d=dtype, b=benchmark: convolution(*s, d, b)
                yield name + (", cudnn.benchmark" if benchmark else ""), call
    yield f"matrix product of {64 if TINY else 8192}, bfloat16", product
    for name, tensor in copied().items():
        yield f"{CROPS[0]} crops to the GPU, {name}", lambda tensor=tensor: copy(tensor)


def sized(n: int, channels: int, side: int) -> str:
    return f"{n}x{channels}x{side}x{side}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def images(*shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def ours(channels: int, dtype: torch.dtype) -> Norm:
    norm = ChannelNorm(channels).to(DEVICE, dtype)
    return norm, list(norm.parameters())


def fused(channels: int, dtype: torch.dtype) -> Norm:
    if not CUDA:
        raise LeftOut("Triton's kernels need a GPU")
    norm = ChannelNorm(channels).to(DEVICE)
    choose_kernels(norm, EngineConfig(fused_norms=True))
    return norm, list(norm.parameters())


def layer_norm(channels: int, dtype: torch.dtype) -> Norm:
    w, b = (torch.ones(channels, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    return lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (channels,), w, b, 1e-3).permute(0, 3, 1, 2), [w, b]


def compiled(channels: int, dtype: torch.dtype) -> Norm:
    if not CUDA:
        raise LeftOut("compiling takes minutes on a CPU")
    w, b = (torch.ones(channels, 1, 1, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))

    def definition(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x.float(), dim=1, keepdim=True, correction=1)
        return (w * (x - mean) * torch.rsqrt(var + 1e-3) + b).to(x.dtype)

    return torch.compile(definition, dynamic=False), [w, b]


NORM_KINDS: dict[str, Callable[[int, torch.dtype], Norm]] = {
    "channel norm": ours,
    "fused norm": fused,
    "layer norm": layer_norm,
    "compiled definition": compiled,
}


def timed_norm(make: Callable[[int, torch.dtype], Norm], n: int, c: int, side: int, dtype: torch.dtype) -> Result:
    """Milliseconds forward, and of forward and backward; GB/s if each value is read and written once."""
    (norm, weights), x = make(c, dtype), images(n, c, side, side, dtype=dtype)
    with torch.no_grad():
        forward = milliseconds(lambda: norm(x))
    both = milliseconds(lambda: torch.autograd.grad(norm(x), [x, *weights], x.detach()))
    return {"forward_ms": forward, "both_ms": both, "forward_gb_s": 2e-6 * x.nbytes / forward}


def convolution(n: int, c_in: int, c_out: int, side: int, kernel: int, dtype: torch.dtype, benchmark: bool) -> Result:
    torch.backends.cudnn.benchmark = benchmark
    x, w = images(n, c_in, side, side, dtype=dtype), images(c_out, c_in, kernel, kernel, dtype=dtype)
    run = lambda: F.conv2d(x, w, padding=kernel // 2)
    y = torch.ones_like(run())
    with torch.no_grad():
        forward = milliseconds(run)
    both = milliseconds(lambda: torch.autograd.grad(run(), [x, w], y))
    tera = 2e-12 * n * side**2 * c_in * c_out * kernel**2
    return {"forward_ms": forward, "both_ms": both, "forward_tflop_s": tera / forward * 1e3}


def product() -> Result:
    side = 64 if TINY else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ms = milliseconds(lambda: a @ b)
    return {"forward_ms": ms, "forward_tflop_s": 2e-9 * side**3 / ms}


def copied() -> dict[str, Callable[[], Tensor]]:
    pinned = lambda x: x.pin_memory() if CUDA else x
    return {
        "pageable fp32": lambda: torch.zeros(CROPS),
        "pageable uint8": lambda: torch.zeros(CROPS, dtype=torch.uint8),
        "pinned uint8": lambda: pinned(torch.zeros(CROPS, dtype=torch.uint8)),
    }


def copy(make: Callable[[], Tensor]) -> Result:
    """Milliseconds of a copy; and how long the CPU is held by one that waits behind other work of the GPU."""
    x = make()
    ms = milliseconds(lambda: x.to(DEVICE, non_blocking=True))
    big = torch.randn(64 if TINY else 8192, 64 if TINY else 8192, device=DEVICE)
    wait()
    for _ in range(5):
        big @ big
    started = time.perf_counter()
    x.to(DEVICE, non_blocking=True)
    held = time.perf_counter() - started
    wait()
    return {"ms": ms, "held_ms": 1e3 * held, "queued_ms": 1e3 * (time.perf_counter() - started)}
