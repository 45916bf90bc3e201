"""Do equal starts give equal bits? With engine.deterministic they have to."""

import torch

from pipeline.training.engine_config import EngineConfig
from tests.benchmarks.gpu_day.measuring import PRECISIONS, SIZE, as_torch_starts, crops, made
from tests.benchmarks.gpu_day.rows import Result, Rows
from tests.benchmarks.gpu_day.variants import FUSED, GRAPHS, LABELS, PADDED, Keys, engine_and_stage
from tests.benchmarks.measure import TINY

STEPS = 2 if TINY else 5


def rows() -> Rows:
    for stage in SIZE:
        for precision in PRECISIONS:
            for deterministic in (True, False):
                engine = EngineConfig(precision=precision, deterministic=deterministic)
                how = "deterministic" if deterministic else "not deterministic"
                yield f"{stage}, {precision}, {how}, same bits twice", lambda s=stage, e=engine: twice(s, e, {})
    for keys in (FUSED | PADDED | LABELS, FUSED | PADDED | LABELS | GRAPHS):
        name = f"gan, bf16, deterministic, {', '.join(keys)}, same bits twice"
        yield name, lambda keys=keys: twice_with(keys)


def twice_with(keys: Keys) -> Result:
    engine, more = engine_and_stage(keys | {"engine.deterministic": True})
    return twice("gan", EngineConfig(**engine), more)


def twice(stage: str, engine: EngineConfig, more: Keys) -> Result:
    """How many tensors differ after the same steps from the same start, done twice."""
    seen = []
    for _ in range(2):
        as_torch_starts()
        seen.append(digests(stage, engine, more))
    return {"tensors": len(seen[0]), "differ": sum(a != b for a, b in zip(*seen, strict=True))}


def digests(stage: str, engine: EngineConfig, more: Keys) -> list[int]:
    """The sum of the bits of every tensor of the trained networks."""
    step = made(stage, crops(stage), engine, **more)
    for _ in range(STEPS):
        step()
    networks = [part.module for part in step.task.runtime._stateful.values() if hasattr(part, "module")]
    values = [value for network in networks for value in network.state_dict().values() if value.is_floating_point()]
    return [int(value.contiguous().view(torch.int32).sum(dtype=torch.int64)) for value in values]
