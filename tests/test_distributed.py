"""Two processes train as one."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.training import checkpoint
from tests.conftest import CONFIGS, ROOT
from tests.test_pipeline import RUNS

pytestmark = [pytest.mark.dist, pytest.mark.slow]

# Every rank writes what it holds after training; only then do they meet.
DUMP = """
import sys, torch
from pathlib import Path
from pipeline.training import checkpoint, loop
from pipeline.training.runtime import Runtime
close, target = Runtime.close, Path(sys.argv[1])
def dump_and_close(self):
    torch.save(self.state_dict(), target / f"rank{self.rank}.pt")
    close(self)
Runtime.close = dump_and_close
sys.argv = ["illm", *sys.argv[2:]]
from pipeline.cli import main
main()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(folder: Path, *words: str, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def flat(state: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}.{key}").items()}


@pytest.mark.parametrize("stage", ["gan", "pretrain", "vqvae"])
def test_two_ranks_hold_the_same_bits_and_close_to_what_one_process_holds(smoke, smoke_copy, stage):
    folder = smoke_copy("shard", "vqvae", "pretrain")
    (folder / "dump.py").write_text(DUMP)
    words = (str(folder / "dump.py"), str(folder), stage, str(CONFIGS / f"{stage}.yaml"), "run=two", "fit.steps=8",
             "fit.checkpoint_every=2", "fit.keep_checkpoints=9")  # fmt: skip
    accelerate = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/launch/cpu.yaml"),
        "--main_process_port", str(free_port()),
    ]  # fmt: skip
    ended = launch(folder, *words, launcher=accelerate)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "on 2 x cpu" in ended.stderr
    first, second = (flat(torch.load(folder / f"rank{r}.pt", weights_only=True)) for r in (0, 1))
    assert len(first) > 20
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

    # One process with the same global batch. Rounding alone differs, and training magnifies it: look at the second step.
    alone = launch(folder, *(word.replace("run=two", "run=one") for word in words), launcher=[sys.executable])
    assert alone.returncode == 0, alone.stderr[-3000:]
    for later in (
        path for run in ("one", "two") for step in (4, 6, 8) for path in folder.glob(f"{run}/checkpoints/*{step}")
    ):
        shutil.rmtree(later)
    (progress, state), (also, expected) = (checkpoint.restore(folder / run) for run in ("two", "one"))
    assert progress == also
    two, one = flat(state), flat(expected)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value.is_floating_point() and value.numel():
            assert (value - two[name]).abs().max() <= 1e-3 * value.abs().max() + 1e-9, name


def test_an_odd_share_of_the_batch_is_refused_on_all_ranks(smoke):
    words = ("-m", "pipeline", "gan", str(CONFIGS / "gan.yaml"), "run=runs/odd", "data.batch_size=6")
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    ]  # fmt: skip
    ended = launch(smoke, *words, launcher=torchrun)
    assert ended.returncode != 0
    assert "data.batch_size is 6, expected a multiple of 4" in ended.stderr
    assert f"{RUNS}" not in ended.stdout
