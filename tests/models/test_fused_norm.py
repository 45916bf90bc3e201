"""ChannelNorm's Triton kernels without a GPU: computed by Triton's interpreter, and compiled for the GPUs that train."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

triton = pytest.importorskip("triton", reason="Triton is there on Linux only")


def test_the_kernels_compute_their_definition():
    # The interpreter has to be asked for before Triton is imported
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("fused_norm_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("channels", "activation", "kind"), [(60, "relu", "bf16"), (960, None, "bf16"), (64, "silu", "fp32")]
)
def test_the_kernels_compile_for_gpus(tmp_path, architecture, channels, activation, kind):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models import fused_norm

    sizes = {**fused_norm.launch(channels), "ACTIVATION": activation}
    numbers = {"x": kind, "y": kind, "dy": kind, "dx": kind}
    for kernel in (fused_norm.channel_norm_forward, fused_norm.channel_norm_backward):
        signature = {
            name: "constexpr"
            if name in sizes
            else {"rows": "i32", "eps": "fp32"}.get(name, f"*{numbers.get(name, 'fp32')}")
            for name in kernel.arg_names
        }
        made = triton.compile(ASTSource(kernel, signature, sizes), target=GPUTarget("cuda", architecture, 32))
        assert len(made.asm["cubin"]) > 1000
        assert made.metadata.shared < 48 * 1024
        # Of 65,536 that a multiprocessor has: five programs of 128 threads or more beside each other
        target = re.search(r"\.target (\w+)", made.asm["ptx"])[1]
        (tmp_path / "kernel.ptx").write_text(made.asm["ptx"])
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
        told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
        assert int(re.search(r"Used (\d+) registers", told)[1]) <= 96
