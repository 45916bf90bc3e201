import csv

import pytest
import yaml

from pipeline import config
from pipeline.stages import sweep
from tests.conftest import ROOT, assert_one_clear_line, illm, illm_here


def point(bpp: float, psnr_db: float) -> sweep.Point:
    return {"bpp": bpp, "psnr_db": psnr_db}


def test_the_pareto_front_keeps_what_no_other_dominates():
    points = [point(0.1, 20), point(0.2, 25), point(0.2, 24), point(0.3, 25), point(0.4, 30), point(0.4, 30)]
    sweep.mark_pareto(points, "psnr_db")
    assert [p["pareto"] for p in points] == [True, True, False, False, True, True]


def test_a_mistake_in_the_search_space_is_found_before_any_trial(smoke):
    base = ["sweep", ROOT / "configs/sweep/smoke.yaml", "run=runs/typo"]
    where = [f"{stage}={ROOT}/configs/smoke/{stage}.yaml" for stage in ("pretrain", "gan", "evaluate")]
    ended = illm_here(*base, *where, "search={gan.gan_wait: {kind: grid, values: [1]}}", cwd=smoke)
    assert_one_clear_line(ended, "gan_wait: unknown key; did you mean 'gan_weight'?")
    ended = illm_here(*base, *where, "search={gun.gan_weight: {kind: grid, values: [1]}}", cwd=smoke)
    assert_one_clear_line(ended, "search.gun.gan_weight: begins with no stage")
    ended = illm_here(*base, *where, "search={pretrain.rate.weight: {kind: grid, values: [0.5, -1]}}", cwd=smoke)
    assert_one_clear_line(ended, "rate.weight: input should be greater than 0, got -1")


@pytest.mark.slow
def test_a_sweep_runs_its_trials_and_draws_their_front(smoke, tmp_path):
    base = config.read_yaml(ROOT / "configs/sweep/smoke.yaml")
    base |= {stage: f"{ROOT}/configs/smoke/{stage}.yaml" for stage in sweep.TRIAL_STAGES}
    base["search"] = {
        "pretrain.data.shards": {"kind": "grid", "values": ["runs/smoke/shard", "nowhere"]},  # the second trial fails
        "gan.discriminator": {"kind": "grid", "values": [{"kind": "patch", "channels": [4, 4, 4, 8]}]},
        "gan.gan_weight": {"kind": "log_uniform", "low": 0.001, "high": 0.1},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(base))
    ended = illm("sweep", path, "run=runs/sweep", cwd=smoke, limit=400)
    assert ended.code == 0, ended.err + ended.out
    rows = list(csv.DictReader((smoke / "runs/sweep/artifact/trials.csv").open()))
    good, bad = sorted(rows, key=lambda row: row["failed"])
    assert good["pareto"] == "True"
    assert "'kind': 'patch'" in good["gan.discriminator"]
    assert 0.001 <= float(good["gan.gan_weight"]) <= 0.1
    assert float(good["bpp"]) > 0
    assert bad["failed"] == "pretrain: exit code 2"
    assert (smoke / "runs/sweep/artifact/pareto.png").stat().st_size > 5000
