"""The GAN step by its number of crops: where the GPU begins to wait for the CPU."""

from pipeline.training.engine_config import EngineConfig
from tests.benchmarks.gpu_day.measuring import made, timed
from tests.benchmarks.gpu_day.rows import Result, Rows
from tests.benchmarks.gpu_day.variants import GRAPHS, Keys, engine_and_stage
from tests.benchmarks.measure import TINY

BATCHES = (2,) if TINY else (2, 4, 8, 16, 32, 64)
# Each is compiled for itself
GRAPHED = (2,) if TINY else (4, 16)


def rows() -> Rows:
    for keys, batches in (({}, BATCHES), (GRAPHS, GRAPHED)):
        for batch in batches:
            name = ", ".join(["gan step, bf16", f"{batch} crops", *keys])
            yield name, lambda batch=batch, keys=keys: step(batch, keys)


def step(batch: int, keys: Keys) -> Result:
    engine, more = engine_and_stage(keys)
    return timed(made("gan", batch, EngineConfig(**engine), **more), batch)
