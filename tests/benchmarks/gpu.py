"""What one GPU does with the full-size steps: `python -m tests.benchmarks.gpu OUT.json [GROUP ...]`, about six minutes.

Every measurement runs after the one before, on its own: the mean of 20 steps after 3. `make bench` compares with the
published implementation; this asks what our own steps are made of. Groups: steps (with and without engine.deterministic),
variants, batches, same (do equal starts give equal bits?), norms, convs, numerics (CPU against GPU). Without a GPU it does
one step of each on the CPU, which only shows that the script runs.
"""

import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.models.layers import ChannelNorm
from pipeline.training.engine_config import EngineConfig
from tests.benchmarks import steps
from tests.benchmarks.measure import DEVICE, hardware, versions
from tests.benchmarks.steps import CROP, OURS, Step

CUDA = DEVICE.type == "cuda"
STEPS, WARM_UP = (20, 3) if CUDA else (1, 1)
SIZE = {"gan": 16, "pretrain": 8, "vqvae": 16}
Result = dict[str, object]


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def as_torch_starts() -> None:
    """Undoes what the measurement before this one set."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def timed(step: Step, crops: int) -> Result:
    """Milliseconds per step, crops per second, milliseconds of CPU to start a step, GB at most held."""
    for _ in range(WARM_UP):
        step()
    wait()
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
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")
    return {"ms": 1e3 * seconds, "crops_per_s": crops / seconds, "start_ms": start_ms, "peak_gb": peak}


def ours(stage: str, crops: int, engine: EngineConfig, prepare: Callable[[], None] = lambda: None) -> Result:
    steps.BATCH[stage] = crops if CUDA else 2
    step = OURS[stage](engine)
    prepare()
    return timed(step, steps.BATCH[stage])


def stage_steps() -> Iterator[tuple[str, Callable[[], Result]]]:
    for stage, crops in SIZE.items():
        for precision in ("fp32", "bf16"):
            for deterministic in (False, True):
                engine = EngineConfig(precision=precision, deterministic=deterministic)
                how = "deterministic" if deterministic else "not deterministic"
                yield f"{stage} step, {precision}, {how}", lambda s=stage, c=crops, e=engine: ours(s, c, e)


def variants() -> Iterator[tuple[str, Callable[[], Result]]]:
    def let_cudnn_choose() -> None:
        torch.backends.cudnn.benchmark = True

    def all_tf32() -> None:
        torch.backends.cuda.matmul.allow_tf32 = True

    fast = {"precision": "bf16", "deterministic": False}
    for name, engine, prepare in (
        ("cudnn.benchmark", EngineConfig(**fast), let_cudnn_choose),
        ("matrix products in TF32 too", EngineConfig(**fast), all_tf32),
        ("engine.compile", EngineConfig(**fast, compile=True), lambda: None),
    ):
        yield f"gan step, bf16, {name}", lambda e=engine, p=prepare: ours("gan", SIZE["gan"], e, p)


def batches() -> Iterator[tuple[str, Callable[[], Result]]]:
    for crops in (4, 8, 32, 64):
        engine = EngineConfig(precision="bf16", deterministic=False)
        yield f"gan step, bf16, {crops} crops", lambda c=crops, e=engine: ours("gan", c, e)


def same() -> Iterator[tuple[str, Callable[[], Result]]]:
    """How many tensors differ after five steps from the same start, done twice."""
    for stage, crops in SIZE.items():
        for deterministic in (True, False):

            def twice(stage: str = stage, crops: int = crops, deterministic: bool = deterministic) -> Result:
                steps.BATCH[stage] = crops if CUDA else 2
                seen = [digests(stage, deterministic) for _ in range(2)]
                return {"tensors": len(seen[0]), "differ": sum(a != b for a, b in zip(*seen, strict=True))}

            yield f"{stage}, {'deterministic' if deterministic else 'not deterministic'}, same bits twice", twice


def digests(stage: str, deterministic: bool) -> list[int]:
    """The sum of the bits of every tensor of the trained networks, after five steps."""
    step = OURS[stage](EngineConfig(deterministic=deterministic))
    for _ in range(5 if CUDA else 1):
        step()
    networks = [part.module for part in step.task.runtime._stateful.values() if hasattr(part, "module")]
    values = [value for network in networks for value in network.state_dict().values() if value.is_floating_point()]
    return [int(value.contiguous().view(torch.int32).sum(dtype=torch.int64)) for value in values]


def norms() -> Iterator[tuple[str, Callable[[], Result]]]:
    shapes = ((16, 64, 256), (8, 60, 256), (16, 128, 128), (8, 240, 64), (8, 960, 16))
    for n, channels, side in shapes:
        for dtype in (torch.float32, torch.bfloat16):

            def norm(n: int = n, c: int = channels, side: int = side, dtype: torch.dtype = dtype) -> Result:
                layer = ChannelNorm(c).to(DEVICE, dtype)
                x = torch.randn(n, c, side if CUDA else 16, side if CUDA else 16, device=DEVICE, dtype=dtype)
                x = x.to(memory_format=torch.channels_last).requires_grad_()
                forward = milliseconds(lambda: layer(x.detach()))
                both = milliseconds(lambda: torch.autograd.backward(layer(x), x.detach(), inputs=[x]))
                return {"forward_ms": forward, "both_ms": both, "forward_gb_s": 2e-6 * x.nbytes / forward}

            yield f"channel norm {n}x{channels}x{side}x{side} {str(dtype).removeprefix('torch.')}", norm


def convs() -> Iterator[tuple[str, Callable[[], Result]]]:
    shapes = ((8, 19, 128, 256, 3), (8, 24, 128, 256, 3), (8, 128, 128, 256, 3), (8, 960, 960, 16, 3))
    shapes += ((8, 60, 3, 256, 7), (8, 64, 8, 256, 7), (8, 60, 120, 256, 3), (8, 64, 128, 256, 3))
    shapes += ((8, 220, 960, 16, 3), (8, 224, 960, 16, 3), (16, 64, 64, 256, 3))
    for n, c_in, c_out, side, kernel in shapes:
        for dtype in (torch.bfloat16, torch.float32):

            def conv(n=n, c_in=c_in, c_out=c_out, side=side, k=kernel, dtype=dtype) -> Result:  # type: ignore[no-untyped-def]
                side = side if CUDA else 16
                x = torch.randn(n, c_in, side, side, device=DEVICE, dtype=dtype)
                w = torch.randn(c_out, c_in, k, k, device=DEVICE, dtype=dtype)
                x, w = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (x, w))
                y = torch.ones_like(F.conv2d(x, w, padding=k // 2))
                forward = milliseconds(lambda: F.conv2d(x.detach(), w.detach(), padding=k // 2))
                both = milliseconds(lambda: torch.autograd.backward(F.conv2d(x, w, padding=k // 2), y, inputs=[x, w]))
                tera = 2e-12 * n * side**2 * c_in * c_out * k**2
                return {"forward_ms": forward, "both_ms": both, "forward_tflop_s": tera / forward * 1e3}

            yield f"convolution {c_in} to {c_out}, {kernel}x{kernel}, {n}x{side}x{side}, {str(dtype)[6:]}", conv


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(STEPS):
        call()
    wait()
    return 1e3 * (time.perf_counter() - started) / STEPS


def numerics() -> Iterator[tuple[str, Callable[[], Result]]]:
    """Random full-size networks: how far latents, code lengths, images and labels are from those of the CPU in fp32."""
    torch.manual_seed(0)
    codec, labeler = Codec(CodecConfig()).eval(), Labeler(LabelerConfig()).eval()
    x = F.avg_pool2d(F.pad(torch.rand(2, 3, CROP, CROP), (4, 4, 4, 4), mode="reflect"), 9, 1)

    def made(device: str, tf32: bool, bf16: bool) -> list[Tensor]:
        torch.backends.cudnn.allow_tf32 = tf32
        for network in (codec, labeler):
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            y_hat, bits = codec.encode(x.to(device))
            return [v.float().cpu() for v in (y_hat, bits, codec.synthesis(y_hat.float()), labeler.label(x.to(device)))]

    expected = made("cpu", False, False)

    def compared(device: str, tf32: bool, bf16: bool) -> Result:
        y_hat, bits, image, labels = zip(made(device, tf32, bf16), expected, strict=True)
        return {
            "latents_that_differ": float(((y_hat[0] - y_hat[1]).abs() > 0.5).float().mean()),
            "bits_relative_error": float((bits[0] - bits[1]).norm() / bits[1].norm()),
            "image_relative_error": float((image[0] - image[1]).norm() / image[1].norm()),
            "labels_equal": float((labels[0] == labels[1]).float().mean()),
        }

    yield "CPU in bf16", lambda: compared("cpu", False, True)
    if CUDA:
        yield "GPU, fp32_exact", lambda: compared("cuda", False, False)
        yield "GPU, fp32", lambda: compared("cuda", True, False)
        yield "GPU, bf16", lambda: compared("cuda", True, True)


GROUPS = {f.__name__.removeprefix("stage_"): f for f in (stage_steps, variants, batches, same, norms, convs, numerics)}


def main(target: Path, wanted: list[str]) -> None:
    warnings.filterwarnings("ignore")
    if unknown := set(wanted) - set(GROUPS):
        sys.exit(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    rows: list[Result] = []
    for group in wanted or GROUPS:
        for name, measure in GROUPS[group]():
            as_torch_starts()
            try:
                result = measure()
            except Exception:
                result = {"failed": traceback.format_exc().splitlines()[-1]}
            rows.append({"group": group, "name": name, **result, "hardware": hardware(), "versions": versions()})
            print(f"{name}: {result}", flush=True)
            target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
