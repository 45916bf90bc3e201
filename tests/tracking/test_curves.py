"""Where one run's curves leave another's."""

import json
import math

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.tracking import curves
from pipeline.tracking.curves import Curves
from tests.conftest import assert_one_clear_line, illm_here
from tests.system.test_pipeline import RUNS

STEPS = range(10, 2001, 10)


def run(values, steps=STEPS, stage="pretrain", **config) -> Curves:
    return Curves(stage=stage, config=config, made={}, curves={"val/x": list(zip(steps, values, strict=True))})


def falling(noise=0.0, seed=0):
    """From 10 to 1, most of it early."""
    around = np.random.default_rng(seed).normal(0, noise, len(STEPS)) if noise else np.zeros(len(STEPS))
    return (1 + 9 * np.exp(-np.array(STEPS) / 300) + around).tolist()


def verdict(ours, theirs):
    (found,) = curves.compare(ours, theirs)
    return found.verdict


def test_equal_curves_and_other_noise_are_no_departure():
    assert verdict(run(falling()), run(falling())) == "as the reference"
    for seed in range(20):
        assert verdict(run(falling(0.3, seed)), run(falling(0.3, 100 + seed))) == "as the reference", seed


def test_a_run_that_leaves_is_told_with_step_side_and_values():
    away = [value + (2.0 if step > 1000 else 0.0) for step, value in zip(STEPS, falling(), strict=True)]
    # the window from 1005 to 1104.5
    assert verdict(run(away), run(falling())).startswith("above from step 1055 on: 3.269 there, 1.269 in the reference")
    below = [value - (2.0 if 500 < step < 900 else 0.0) for step, value in zip(STEPS, falling(), strict=True)]
    assert verdict(run(below), run(falling())).startswith("below at step 557")
    assert "back at step 955" in verdict(run(below), run(falling()))


def test_a_run_that_comes_back_and_leaves_again_is_told_by_where_it_left_last():
    def between(low, high, by):
        return [by if low < step < high else 0.0 for step in STEPS]

    twice = np.array(falling()) + between(300, 600, 2.0) + between(1500, 3000, -1.0)
    assert verdict(run(twice.tolist()), run(falling())).startswith("below from step 15")
    assert verdict(run([*falling()[:-1], 9.0]), run(falling())) == "as the reference"


def test_a_diverged_run_is_told_and_can_be_kept(tmp_path):
    broken = [value if step < 1000 else math.nan for step, value in zip(STEPS, falling(), strict=True)]
    assert verdict(run(broken), run(falling())).startswith("not a number from step 9")
    (tmp_path / "x.json").write_text(curves.as_json(run(broken)))
    json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert verdict(curves.read(tmp_path / "x.json"), run(falling())).startswith("not a number")


def test_one_window_is_a_spike_and_no_departure():
    spike = [value + (2.0 if 1005 < step < 1100 else 0.0) for step, value in zip(STEPS, falling(), strict=True)]
    assert verdict(run(spike), run(falling())) == "as the reference"


def test_a_run_in_progress_is_compared_as_far_as_it_is():
    few = len(STEPS) // 2
    assert verdict(run(falling()[:few], STEPS[:few]), run(falling())) == "as the reference"
    (found,) = curves.compare(run([5.0], [1000]), run(falling()))
    assert found.steps == [1000]
    assert found.verdict.startswith("above from step 1000 on: 5 there")


def test_a_constant_curve_has_room_in_its_own_size():
    flat = [2.0] * len(STEPS)
    assert verdict(run([2.05] * len(STEPS)), run(flat)) == "as the reference"
    assert verdict(run([2.2] * len(STEPS)), run(flat)).startswith("above from step")


def test_keys_that_differ_are_named_and_other_stages_refused():
    text = curves.as_text(run(falling(), a=1, b=2), run(falling(), a=1, b=3), "mine", "docs/x.json")
    assert "differs: b: 3 there, 2 now" in text
    assert "differs: a" not in text
    with pytest.raises(ArtifactError, match="gan run cannot be compared with a pretrain run"):
        curves.compare(run([1.0], [1], "gan"), run([1.0], [1]))


def test_a_file_holds_what_the_run_recorded(smoke, tmp_path):
    made = illm_here("export-run", smoke / RUNS / "pretrain", tmp_path / "p.json", cwd=tmp_path)
    assert made.code == 0, made.err
    found = curves.read(tmp_path / "p.json")
    assert found.stage == "pretrain"
    assert {"machine", "packages", "command", "written"} <= set(found.made)
    assert "val/psnr_db" in found.curves
    assert not [name for name in found.curves if name.startswith("system/")]
    same = illm_here("compare-run", smoke / RUNS / "pretrain", tmp_path / "p.json", cwd=tmp_path)
    assert same.code == 0, same.err
    assert "differs" not in same.out
    assert same.out.count("as the reference") == len(found.curves)
    # a line that another process is writing is left out
    records = (smoke / RUNS / "pretrain/tracking.jsonl").read_text()
    (tmp_path / "live").mkdir()
    again = json.dumps({"kind": "metrics", "step": 10, "metrics": {"val/bpp": 7.5}})
    (tmp_path / "live/tracking.jsonl").write_text(records + '{"kind": "metr')
    assert curves.of_run(tmp_path / "live").curves == found.curves
    # a step that was repeated after a resume counts once, with its last value
    (tmp_path / "live/tracking.jsonl").write_text(f"{records}{again}\n")
    points = curves.of_run(tmp_path / "live").curves["val/bpp"]
    assert (10, 7.5) in points
    assert points == sorted(dict(points).items())


def test_what_is_no_run_is_told(tmp_path, smoke):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text(json.dumps({"stage": "pretrain"}))
    for words, expected in (
        (("compare-run", "empty", "empty"), "run folder"),
        (("compare-run", "other.json", "other.json"), "export-run"),
        (("compare-run", "nowhere", "nowhere"), "No such file"),
        (("export-run", smoke / RUNS / "shard", "x.json"), "train first"),
        (("export-run", smoke / RUNS / "vqvae", "other.json"), "--force"),
        (("compare-run", smoke / RUNS / "vqvae", smoke / RUNS / "gan"), "cannot be compared"),
    ):
        assert_one_clear_line(illm_here(*words, cwd=tmp_path), expected)
