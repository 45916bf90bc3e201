"""`illm` as one of several ranks on one GPU: python -m tests.benchmarks.gpu_day.rank WORDS.

NCCL refuses two ranks on one GPU; gloo carries CUDA tensors through the CPU. The stage itself would take NCCL.
"""

import sys
from typing import Any

from accelerate.utils import InitProcessGroupKwargs

from pipeline.cli.app import main
from pipeline.training import runtime


def over_gloo() -> None:
    init = runtime.init_process_group
    runtime.init_process_group = lambda _backend: init("gloo")  # type: ignore[assignment]

    def kwargs(backend: str, timeout: Any) -> InitProcessGroupKwargs:
        return InitProcessGroupKwargs(backend="gloo", timeout=timeout)

    runtime.InitProcessGroupKwargs = kwargs  # type: ignore[assignment,misc]


if __name__ == "__main__":
    over_gloo()
    sys.argv[0] = "illm"
    main()
