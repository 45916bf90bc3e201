"""The measurements of a GPU, tried with tiny networks on this CPU, so that no minute of a GPU is spent on a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.stages.gan import StageConfig
from pipeline.training.engine_config import EngineConfig
from tests.benchmarks.gpu_day import numerics, variants
from tests.benchmarks.gpu_day.__main__ import ALONE, LIMIT, STEPS
from tests.conftest import ROOT

# Those that run whole commands, and one that repeats what the others do
LONG = ("5", "6", "9", "10", "11")
QUICK = tuple(step for step in STEPS if step not in LONG)


def gpu_day(out: Path, *steps: str, **env: str) -> list[dict[str, object]]:
    """The rows that these steps write."""
    environment = os.environ | {"TINY": "1", "OUT": str(out), "PYTHONPATH": str(ROOT), "KINETO_LOG_LEVEL": "5"} | env
    environment.pop("SHARDS", None)
    command = [sys.executable, "-m", "tests.benchmarks.gpu_day", *steps]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    (file,) = out.glob("*.json")
    rows = json.loads(file.read_text())
    assert [row for row in rows if "failed" in row] == [], ended.stderr[-4000:]
    return rows


def groups(rows: list[dict[str, object]]) -> set[object]:
    return {row["group"] for row in rows if "left_out" not in row}


def test_all_options_that_a_gpu_is_asked_for_go_together(monkeypatch):
    """On a CPU the rows that compile or record are left out, so nothing else would see that they are refused."""
    monkeypatch.setattr(variants, "CUDA", True)
    asked = [*variants.VARIANTS.values(), *numerics.VARIANTS.values(), variants.GRAPHS]
    together = variants.FUSED | variants.PADDED | variants.LABELS
    asked += [together, together | variants.GRAPHS | variants.EXACT]
    for keys in asked:
        engine, more = variants.engine_and_stage(keys)
        assert EngineConfig(**engine).cuda_graphs == ("engine.cuda_graphs" in keys)
        StageConfig(**more, data={"shards": "s", "batch_size": 2}, fit={"steps": 1}, codec="c", labeler="l")


@pytest.mark.slow
def test_short_steps_write_rows(tmp_path):
    # in one process, since importing takes most of the time
    rows = gpu_day(tmp_path, *QUICK, **{ALONE: "1"})
    assert groups(rows) == {STEPS[step] for step in QUICK}
    assert all(
        row["hardware"] and row["versions"] and row["date"] and "make gpu-day" in str(row["command"]) for row in rows
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("step", LONG)
def test_long_steps_write_rows(tmp_path, step):
    rows = gpu_day(tmp_path, step, **{ALONE: "1"})
    assert groups(rows) == {STEPS[step]}
    if step in ("5", "6", "9"):
        # twice, resumed, killed: the same weights
        assert {row["differ"] for row in rows if "differ" in row} == {0}


@pytest.mark.slow
@pytest.mark.long
def test_a_step_replaces_its_rows_alone_and_one_that_breaks_off_says_so(tmp_path):
    kept = {"group": "steps", "name": "kept"}
    (tmp_path / "no-gpu.json").write_text(json.dumps([kept, {"group": "machine", "name": "gone"}]))
    rows = gpu_day(tmp_path, "0")
    assert rows[0] == kept
    assert "gone" not in {row["name"] for row in rows}


@pytest.mark.slow
def test_a_step_that_takes_too_long_or_dies_is_a_row(tmp_path, monkeypatch):
    from tests.benchmarks.gpu_day import __main__ as day

    monkeypatch.setenv("OUT", str(tmp_path))
    for code, limit, told in (
        ("import time; time.sleep(60)", 0.1, "not done within 0.1 s"),
        ("exit(3)", LIMIT, "code 3"),
    ):
        monkeypatch.setattr(day, "LIMIT", limit)
        monkeypatch.setattr(day, "command_of", lambda step, code=code: [sys.executable, "-c", code])
        day.run("1")
        assert told in json.loads((tmp_path / "no-gpu.json").read_text())[-1]["failed"]


def test_every_step_is_known_to_the_page():
    listed = (ROOT / "docs/performance.md").read_text()
    assert all(f"\n| {step} |" in listed for step in STEPS)
