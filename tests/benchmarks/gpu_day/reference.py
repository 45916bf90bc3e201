"""Our steps and the published implementation's, in alternation."""

from collections.abc import Callable
from functools import partial

from tests.benchmarks import steps
from tests.benchmarks.gpu_day.measuring import PRECISIONS, SIZE, STEPS, as_torch_starts, crops, made
from tests.benchmarks.gpu_day.rows import LeftOut, Result, Rows
from tests.benchmarks.gpu_day.variants import TOGETHER, Keys, configured, engine_and_stage, known
from tests.benchmarks.measure import CUDA, TINY, pairs, peak_memory_gb
from tests.benchmarks.steps import THEIRS, Step


def rows() -> Rows:
    for stage in SIZE:
        for precision in PRECISIONS:
            compare = partial(against, stage, precision, {})
            yield f"{stage} step, {precision}, published implementation", compare
    fastest = {key: value for key, value in TOGETHER.items() if known(key)}
    name = "gan step, bf16, published implementation; ours with all options that do not compile"
    yield name, lambda: against("gan", "bf16", fastest)


def against(stage: str, precision: str, keys: Keys) -> Result:
    """Medians of alternating steps, and the most memory of each alone.

    Ours is not deterministic, since that setting holds for the whole process and would bind the published one too.
    """
    if not (TINY or steps.reference()):
        raise LeftOut("the published implementation is not installed, and REFERENCE names no folder with it")
    engine, more = engine_and_stage(keys) if keys else ({"deterministic": False}, {})
    engine = engine | {"precision": precision}
    ours: Callable[[], Step] = partial(made, stage, crops(stage), configured(engine), **more)
    # its networks have no tiny size, so there ours stands in
    theirs: Callable[[], Step] = ours if TINY else partial(THEIRS[stage], precision == "bf16")
    steps.BATCH[stage] = crops(stage)
    memory: Result = {}
    if CUDA:
        memory = {"ours_peak_gb": peak_memory_gb(ours), "peak_gb": peak_memory_gb(theirs)}
        as_torch_starts()
    mine, peer = pairs(ours(), theirs(), STEPS)
    times = {"ours_ms": 1e3 * mine, "ms": 1e3 * peer, "ratio": peer / mine, "crops_per_s": crops(stage) / peer}
    return times | memory
