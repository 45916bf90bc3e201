"""Our steps and the published implementation's, in alternation."""

from collections.abc import Callable
from functools import partial

from pipeline.training.engine_config import EngineConfig
from tests.benchmarks import steps
from tests.benchmarks.gpu_day.measuring import PRECISIONS, SIZE, STEPS, as_torch_starts, crops, made
from tests.benchmarks.gpu_day.rows import LeftOut, Result, Rows
from tests.benchmarks.gpu_day.variants import FUSED, LABELS, PADDED, Keys, engine_and_stage
from tests.benchmarks.measure import CUDA, TINY, pairs, peak_memory_gb
from tests.benchmarks.steps import THEIRS, Step


def rows() -> Rows:
    for stage in SIZE:
        for precision in PRECISIONS:
            compare = partial(against, stage, precision, {})
            yield f"{stage} step, {precision}, published implementation", compare
    name = "gan step, bf16, published implementation; ours with fused_norms, pad_channels and labels in bf16"
    yield name, lambda: against("gan", "bf16", FUSED | PADDED | LABELS)


def against(stage: str, precision: str, keys: Keys) -> Result:
    """Medians of alternating steps, and the most memory of each alone.

    Ours is not deterministic and lets cuDNN search nothing, since these settings hold for the whole process and would bind
    the published one too.
    """
    if not (TINY or steps.reference()):
        raise LeftOut("the published implementation is not installed, and REFERENCE names no folder with it")
    engine, more = engine_and_stage(keys) if keys else ({"deterministic": False}, {})
    engine = engine | {"precision": precision}
    ours: Callable[[], Step] = partial(made, stage, crops(stage), EngineConfig(**engine), **more)
    # its networks have no tiny size, so there ours stands in
    theirs: Callable[[], Step] = ours if TINY else partial(THEIRS[stage], precision == "bf16")
    steps.BATCH[stage] = crops(stage)
    memory: Result = {}
    if CUDA:
        for name, peer in {"ours_peak_gb": ours, "peak_gb": theirs}.items():
            memory[name] = peak_memory_gb(peer)
            as_torch_starts()
    mine, other = pairs(ours(), theirs(), STEPS)
    times = {"ours_ms": 1e3 * mine, "ms": 1e3 * other, "ratio": other / mine, "crops_per_s": crops(stage) / other}
    return times | memory
