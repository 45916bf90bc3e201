import json

import pytest
import torch

from pipeline.training import checkpoint
from pipeline.training.checkpoint import TrainProgress


def state(value: float) -> dict[str, object]:
    return {"part": {"model": {"w": torch.full((3,), value)}, "optimizer": {"param_groups": [{"betas": (0.9, 0.99)}]}}}


def saved(folder, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoint.save(folder, TrainProgress(step, 4 * step), state(step), keep)


def test_the_newest_checkpoint_comes_back_whole(tmp_path):
    saved(tmp_path, 5, 10)
    progress, found = checkpoint.restore(tmp_path)
    assert progress == TrainProgress(10, 40)
    assert torch.equal(found["part"]["model"]["w"], torch.full((3,), 10.0))
    assert found["part"]["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)


def test_without_checkpoints_there_is_none(tmp_path):
    assert checkpoint.restore(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 9, 10, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000000009", "step-000000010"]


def test_what_was_just_written_is_kept_beside_damaged_ones_of_later_steps(tmp_path):
    saved(tmp_path, 10, 20, keep=2)
    (tmp_path / "checkpoints/step-000000020/state.pt").write_bytes(b"cut")
    saved(tmp_path, 15, keep=1)
    assert checkpoint.restore(tmp_path)[0].step == 15
    assert not (tmp_path / "checkpoints/step-000000010").exists()


def test_milestones_stay(tmp_path):
    for step in (5, 10, 15, 20, 25):
        checkpoint.save(tmp_path, TrainProgress(step, step), state(step), keep=1, keep_every=10)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000000010", "step-000000020", "step-000000025"]


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "bad manifest", "no state"])
def test_a_damaged_one_is_passed_over_with_a_message(tmp_path, capsys, cli_log, damage):
    saved(tmp_path, 5, 10)
    newest = tmp_path / "checkpoints" / "step-000000010"
    content = bytearray((newest / "state.pt").read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage in ("flip", "cut"):
        (newest / "state.pt").write_bytes(content if damage == "flip" else content[:-9])
    elif damage == "bad manifest":
        (newest / "manifest.json").write_text(json.dumps({"progress": 3}))
    else:
        (newest / ("manifest.json" if damage == "no manifest" else "state.pt")).unlink()
    progress, _ = checkpoint.restore(tmp_path)
    assert progress.step == 5
    told = capsys.readouterr().err
    assert "step-000000010 is damaged" in told
    saved(tmp_path, 10)  # training gets there again and replaces it
    assert checkpoint.restore(tmp_path)[0].step == 10


def test_a_write_that_was_cut_short_is_never_found(tmp_path):
    saved(tmp_path, 5)
    half = tmp_path / "checkpoints" / ".step-000000010.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert checkpoint.restore(tmp_path)[0].step == 5
    saved(tmp_path, 10)
    assert checkpoint.restore(tmp_path)[0].step == 10


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    saved(tmp_path, 5)
    path = tmp_path / "checkpoints" / "step-000000010"
    path.mkdir()
    torch.save(Evil(), path / "state.pt")
    digest = checkpoint.sha256(path / "state.pt")
    (path / "manifest.json").write_text(json.dumps({"progress": {"step": 10, "samples": 40}, "sha256": digest}))
    assert checkpoint.restore(tmp_path)[0].step == 5
    assert not (tmp_path / "executed").exists()
