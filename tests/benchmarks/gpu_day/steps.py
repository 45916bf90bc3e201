"""Every full-size step: how long, how much memory, how far from the bound, and what the GPU's time is made of."""

from pipeline.training.engine_config import EngineConfig
from tests.benchmarks.gpu_day.measuring import PRECISIONS, SIZE, arithmetic, by_kind, crops, made, share_of_bound, timed
from tests.benchmarks.gpu_day.rows import Result, Rows


def rows() -> Rows:
    bounds: dict[str, Result] = {}
    for stage in SIZE:

        def bound(stage: str = stage) -> Result:
            # once more, since a step has its own count of what it did before
            bounds[stage] = arithmetic(made(stage, crops(stage), EngineConfig(deterministic=False)), crops(stage))
            return bounds[stage]

        yield f"{stage} step's arithmetic, and its bound in bf16", bound
        for precision in PRECISIONS:
            for deterministic in (False, True):
                engine = EngineConfig(precision=precision, deterministic=deterministic)

                def step(stage: str = stage, engine: EngineConfig = engine) -> Result:
                    made_step = made(stage, crops(stage), engine)
                    found = timed(made_step, crops(stage))
                    return found | share_of_bound(found, bounds.get(stage, {})) | by_kind(made_step)

                how = "deterministic" if deterministic else "not deterministic"
                yield f"{stage} step, {precision}, {how}", step
