"""What each option gives the GAN step in bf16: without any, each alone, and together."""

from pydantic import ValidationError

from pipeline.stages.gan import StageConfig
from pipeline.training.engine_config import EngineConfig
from tests.benchmarks.gpu_day.measuring import arithmetic as counted
from tests.benchmarks.gpu_day.measuring import by_kind, crops, made, share_of_bound, timed
from tests.benchmarks.gpu_day.rows import LeftOut, Result, Rows
from tests.benchmarks.measure import CUDA, TINY

# Key of the stage's configuration -> value
Keys = dict[str, object]
# Without any option: every variant is this, and what it names
PLAIN: Keys = {"engine.fused_norms": False}
FUSED: Keys = {"engine.fused_norms": True}
PADDED: Keys = {"engine.pad_channels": True}
CHOSEN: Keys = {"engine.cudnn_benchmark": True}
LABELS: Keys = {"labeler_precision": "bf16"}
GRAPHS: Keys = {"engine.cuda_graphs": True}
COMPILED: Keys = {"engine.compile": True}
EXACT: Keys = {"engine.deterministic": True}
RECOMPUTED: Keys = {"engine.activation_checkpointing": True}
TOGETHER = FUSED | PADDED | CHOSEN | LABELS
VARIANTS: dict[str, Keys] = {
    "without options": {},
    "engine.fused_norms": FUSED,
    "engine.pad_channels": PADDED,
    "engine.cudnn_benchmark": CHOSEN,
    "labeler_precision=bf16": LABELS,
    "engine.cuda_graphs": GRAPHS,
    "engine.compile": COMPILED,
    "engine.deterministic": EXACT,
    "engine.activation_checkpointing": RECOMPUTED,
    "together: fused_norms, pad_channels, cudnn_benchmark, labeler_precision=bf16": TOGETHER,
    "together, with cuda_graphs": TOGETHER | GRAPHS,
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
            plain = {key: value for key, value in PLAIN.items() if known(key)}
            engine, more = engine_and_stage(plain | keys)
            variant = made("gan", crops("gan"), configured(engine), **more)
            found = timed(variant, crops("gan"))
            return found | share_of_bound(found, bound) | by_kind(variant)

        yield f"gan step, bf16, {name}", step


def engine_and_stage(keys: Keys) -> tuple[Keys, Keys]:
    """Keys of the engine and of the GAN stage, in bf16 and not deterministic unless `keys` say otherwise.

    Raises: LeftOut if this version has no such key, or it needs a GPU.
    """
    if missing := [key for key in keys if not known(key)]:
        raise LeftOut(f"no such key: {', '.join(missing)}")
    if "engine.cuda_graphs" in keys and not CUDA:
        raise LeftOut("engine.cuda_graphs needs a GPU")
    if "engine.compile" in keys and TINY and not CUDA:
        raise LeftOut("engine.compile takes minutes on a CPU")
    engine = {key.removeprefix("engine."): value for key, value in keys.items() if key.startswith("engine.")}
    more = {key: value for key, value in keys.items() if not key.startswith("engine.")}
    return {"precision": "bf16", "deterministic": False} | engine, more


def known(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in (EngineConfig if section else StageConfig).model_fields


def configured(engine: Keys) -> EngineConfig:
    """Raises: LeftOut if these do not go together."""
    try:
        return EngineConfig(**engine)
    except ValidationError as error:
        raise LeftOut(f"refused: {error.errors()[0]['msg']}") from None
