"""What each option gives the GAN step in bf16: without any, each alone, and together."""

from pipeline.training.engine_config import EngineConfig
from tests.benchmarks.gpu_day.measuring import arithmetic as counted
from tests.benchmarks.gpu_day.measuring import by_kind, crops, made, share_of_bound, timed
from tests.benchmarks.gpu_day.rows import LeftOut, Result, Rows
from tests.benchmarks.measure import CUDA, TINY

# Key of the stage's configuration -> value
Keys = dict[str, object]
FUSED: Keys = {"engine.fused_norms": True}
PADDED: Keys = {"engine.pad_channels": True}
CHOSEN: Keys = {"engine.cudnn_benchmark": True}
LABELS: Keys = {"labeler_precision": "bf16"}
COMPILED: Keys = {"engine.compile": True}
GRAPHS = COMPILED | {"engine.cuda_graphs": True}
EXACT: Keys = {"engine.deterministic": True}
RECOMPUTED: Keys = {"engine.activation_checkpointing": True}
TOGETHER = FUSED | PADDED | CHOSEN | LABELS
VARIANTS: dict[str, Keys] = {
    "without options": {},
    "engine.fused_norms": FUSED,
    "engine.pad_channels": PADDED,
    "engine.cudnn_benchmark": CHOSEN,
    "labeler_precision=bf16": LABELS,
    "engine.deterministic": EXACT,
    "engine.activation_checkpointing": RECOMPUTED,
    "together: fused_norms, pad_channels, cudnn_benchmark, labeler_precision=bf16": TOGETHER,
    # What compiles takes a minute or more each
    "engine.compile": COMPILED,
    "together, with cuda_graphs": TOGETHER | GRAPHS,
    "engine.cuda_graphs": GRAPHS,
    "together, with compile": TOGETHER | COMPILED,
    "together, with cuda_graphs and deterministic, without cudnn_benchmark": FUSED | PADDED | LABELS | GRAPHS | EXACT,
}


def rows() -> Rows:
    bound: Result = {}

    def arithmetic() -> Result:
        bound.update(counted(made("gan", crops("gan"), EngineConfig(deterministic=False)), crops("gan")))
        return bound

    yield "gan step's arithmetic, and its bound in bf16", arithmetic
    for name, keys in VARIANTS.items():

        def step(keys: Keys = keys) -> Result:
            engine, more = engine_and_stage(keys)
            variant = made("gan", crops("gan"), EngineConfig(**engine), **more)
            found = timed(variant, crops("gan"))
            return found | share_of_bound(found, bound) | by_kind(variant)

        yield f"gan step, bf16, {name}", step


def engine_and_stage(keys: Keys) -> tuple[Keys, Keys]:
    """Keys of the engine and of the GAN stage, in bf16 and not deterministic unless `keys` say otherwise.

    Raises: LeftOut if they need a GPU.
    """
    if "engine.cuda_graphs" in keys and not CUDA:
        raise LeftOut("engine.cuda_graphs needs a GPU")
    if "engine.compile" in keys and TINY and not CUDA:
        raise LeftOut("engine.compile takes minutes on a CPU")
    engine = {key.removeprefix("engine."): value for key, value in keys.items() if key.startswith("engine.")}
    more = {key: value for key, value in keys.items() if not key.startswith("engine.")}
    return {"precision": "bf16", "deterministic": False} | engine, more
