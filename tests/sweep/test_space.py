"""The search space, its trials and their results; sweeps on a real Ray are in test_sweeps.py."""

import json
import os
import signal

import pytest
import yaml

from pipeline import config, stages
from pipeline.artifacts import ownership
from pipeline.errors import ConfigError, UserError
from pipeline.sweep import checks, results, space, trial
from tests.conftest import ROOT, assert_one_clear_line, illm_here

BASE = {
    "shards": "runs/smoke/shard",
    "labeler": "runs/smoke/vqvae",
    **{stage: f"{ROOT}/configs/smoke/{stage}.yaml" for stage in ("pretrain", "gan", "evaluate")},
}
RATES = {"kind": "grid", "values": [0.45, 0.9]}
WEIGHTS = {"kind": "grid", "values": [0.0, 0.01, 0.1]}


def made(**values) -> space.Space:
    return config.parse(space.Space, BASE | values, [], "test")


def test_grids_are_combined_and_different_pretrained_codecs_come_first():
    listed = space.enumerate_trials(made(search={"pretrain.rate.bpp": RATES, "gan.gan_weight": WEIGHTS}))
    assert [(p["pretrain.rate.bpp"], p["gan.gan_weight"]) for p in listed] == [
        (0.45, 0.0), (0.9, 0.0), (0.45, 0.01), (0.9, 0.01), (0.45, 0.1), (0.9, 0.1),
    ]  # fmt: skip


def test_what_stands_for_realism_may_change_when_a_sweep_is_run_again():
    assert "realism" in config.changeable(made(search={"gan.gan_weight": WEIGHTS}, realism="lpips"))


def test_random_values_keep_to_their_bounds_and_to_the_seed():
    search = {
        "gan.gan_weight": {"kind": "log_uniform", "low": 0.001, "high": 0.1},
        "gan.seed": {"kind": "int", "low": 3, "high": 5},
        "pretrain.rate.bpp": {"kind": "uniform", "low": 0.1, "high": 0.2},
        "gan.data.batch_size": {"kind": "choice", "values": [4, 8]},
    }
    drawn = space.enumerate_trials(made(search=search, num_samples=200))
    assert drawn == space.enumerate_trials(made(search=search, num_samples=200))
    assert drawn != space.enumerate_trials(made(search=search, num_samples=200, seed=1))
    assert {p["gan.seed"] for p in drawn} == {3, 4, 5}
    assert {p["gan.data.batch_size"] for p in drawn} == {4, 8}
    assert all(0.001 <= p["gan.gan_weight"] <= 0.1 for p in drawn)
    assert 60 < sum(p["gan.gan_weight"] < 0.01 for p in drawn) < 140  # half of them below the geometric mean
    assert all(0.1 <= p["pretrain.rate.bpp"] <= 0.2 for p in drawn)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"search": {"gan.gan_weight": {"kind": "uniform", "low": 1, "high": 0}}}, "expected low < high"),
        ({"search": {"gan.gan_weight": {"kind": "log_uniform", "low": 0, "high": 1}}}, "expected 0 < low < high"),
        ({"search": {"gan.gan_weight": WEIGHTS}, "algorithm": {"kind": "optuna"}}, "a grid is tried as a whole"),
        (
            {
                "search": {"pretrain.rate.bpp": {"kind": "choice", "values": [0.1]}},
                "scheduler": {"kind": "pbt", "metric": "val/psnr_db", "perturbation_interval": 5},
            },
            "so only gan.*",
        ),
        ({"search": {"gan.gan_weight": WEIGHTS}, "processes": 2, "gpus_per_trial": 0.5}, "need a GPU each"),
        ({"search": {"gan.gan_weight": WEIGHTS}, "scheduler": {"kind": "ascha"}}, "ascha"),
    ],
)
def test_a_search_that_cannot_be_is_refused(values, told):
    with pytest.raises(ConfigError, match=told.replace("*", r"\*")):
        made(**values)


def test_a_mistake_in_the_search_space_is_found_before_any_trial(smoke):
    base = ["sweep", ROOT / "configs/sweep/smoke.yaml", "run=runs/typo", *(f"{k}={v}" for k, v in BASE.items())]
    ended = illm_here(*base, "search={gan.gan_wait: {kind: grid, values: [1]}}", cwd=smoke)
    assert_one_clear_line(ended, "gan_wait: unknown key; did you mean 'gan_weight'?")
    ended = illm_here(*base, "search={gun.gan_weight: {kind: grid, values: [1]}}", cwd=smoke)
    assert_one_clear_line(ended, "search.gun.gan_weight: begins with no stage")
    ended = illm_here(*base, "search={pretrain.rate.weight: {kind: grid, values: [0.5, -1]}}", cwd=smoke)
    assert_one_clear_line(ended, "rate.weight: input should be greater than 0, got -1")
    assert not (smoke / "runs/typo").exists()


def test_two_sweeps_do_not_share_a_folder(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv(ownership.WAIT_ENV, "0")
    base = ["sweep", ROOT / "configs/sweep/smoke.yaml", f"run={tmp_path}/sweep", *(f"{k}={v}" for k, v in BASE.items())]
    base += [f"promote={ROOT}/configs/smoke/promote.yaml"]
    with ownership.held(tmp_path / "sweep"):
        assert_one_clear_line(illm_here(*base, cwd=smoke), f"in use by process {os.getpid()} on")
    assert not (tmp_path / "sweep/run.yaml").exists()


def point(bpp: float, psnr_db: float, fid: float, **settings) -> trial.Point:
    return {"name": str(bpp), "bpp": bpp, "psnr_db": psnr_db, "fid": fid, "settings": settings}


def test_fronts_hold_what_nothing_of_the_same_rate_dominates():
    points = [
        point(0.100, 30, 5), point(0.101, 29, 4), point(0.102, 29, 6),  # the third: both worse than the first
        point(0.200, 28, 9), point(0.229, 28, 9), point(0.231, 20, 50),  # equals stay; 0.231 is a rate of its own
    ]  # fmt: skip
    results.mark_pareto_fronts(points, "psnr_db", "fid")
    assert [p["rate_group"] for p in points] == [0, 0, 0, 1, 1, 2]
    assert [p["front"] for p in points] == [True, True, False, True, True, True]


def test_fidelity_is_the_best_metric_that_every_trial_has():
    points = [
        {"psnr_db": 1.0, "ms_ssim": 0.9, "lpips": 0.1, "fid": 3.0},
        {"psnr_db": 1.0, "ms_ssim": 0.9, "lpips": 0.1},
    ]
    assert results.realism_of(points, None) == "lpips"
    assert results.realism_of(points[:1], None) == "fid"
    assert results.realism_of(points, "lpips") == "lpips"
    with pytest.raises(ConfigError, match="fid was not measured in every trial"):
        results.realism_of(points, "fid")


def test_the_headline_figure_has_a_line_per_discriminator_along_the_weight():
    patch = {"kind": "patch"}
    points = [
        point(0.1, 30, 9, **{"gan.gan_weight": 0.1}), point(0.1, 31, 8, **{"gan.gan_weight": 0.0}),
        point(0.1, 28, 7, **{"gan.gan_weight": 0.2, "gan.discriminator": patch}),
    ]  # fmt: skip
    results.mark_pareto_fronts(points, "psnr_db", "fid")
    figure = results.headline_figure(points, "psnr_db", ["fid"])
    patchgan, label = figure.axes[0].containers
    assert (label.get_label(), patchgan.get_label()) == ("label discriminator", "PatchGAN")
    assert list(label.lines[0].get_xdata()) == [31, 30]
    # without a discriminator there is one point, which is where both begin
    assert list(patchgan.lines[0].get_xdata()) == [31, 28]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "0.2", "0", "0.1"]
    assert results.headline_figure([point(0.1, 30, 9)], "psnr_db", ["fid"]) is None
    assert results.headline_figure([*points, point(0.1, 30, 9, **{"gan.gan_weight": None})], "psnr_db", ["fid"]) is None
    both = results.headline_figure([p | {"lpips": 0.2} for p in points], "psnr_db", ["fid", "lpips"])
    assert [axes.get_ylabel().split(" ")[0] for axes in both.axes] == ["FID/256", "LPIPS"]
    assert all(line.lines[0].get_ydata()[0] == 0.2 for line in both.axes[1].containers)


def test_the_headline_figure_shows_the_mean_of_seeds_and_its_interval():
    free = {"kind": "label", "conditional": False}
    points = [
        point(0.1, psnr, 8, **{"gan.gan_weight": 0.1, "gan.seed": seed, "gan.discriminator": free})
        for seed, psnr in enumerate((29, 30, 31))
    ]
    results.mark_pareto_fronts(points, "psnr_db", "fid")
    (line,) = results.headline_figure(points, "psnr_db", ["fid"]).axes[0].containers
    assert line.get_label() == "label discriminator, unconditional"
    assert list(line.lines[0].get_xdata()) == [30]
    # Student's t with 2 degrees of freedom: 4.3027 / sqrt(3)
    (begin, _), (end, _) = line.lines[2][0].get_segments()[0]
    assert (end - begin) / 2 == pytest.approx(2.4841, abs=1e-4)


def test_equal_trials_without_a_discriminator_count_once():
    kinds = [{"kind": "label"}, {"kind": "patch"}]
    points = [
        point(0.1, 30 + weight + seed, 8, **{"gan.gan_weight": weight, "gan.seed": seed, "gan.discriminator": kind})
        for weight in (0, 1)
        for seed in (0, 1)
        for kind in kinds
    ]
    results.mark_pareto_fronts(points, "psnr_db", "fid")
    figure = results.headline_figure(points, "psnr_db", ["fid"])
    assert "means of up to 2 seeds" in figure.get_suptitle()
    assert [list(line.lines[0].get_xdata()) for line in figure.axes[0].containers] == [[30.5, 31.5]] * 2


def test_trials_that_differ_in_more_than_a_seed_are_not_averaged():
    points = [
        point(0.1, 29 + lr, 8, **{"gan.gan_weight": 0.1, "gan.generator_optimizer.lr": lr, "gan.seed": seed})
        for lr in (1, 2)
        for seed in (0, 1)
    ]
    results.mark_pareto_fronts(points, "psnr_db", "fid")
    lines = results.headline_figure(points, "psnr_db", ["fid"], {"kind": "patch"}).axes[0].containers
    assert [line.get_label() for line in lines] == [f"PatchGAN, generator_optimizer.lr {lr}" for lr in (1, 2)]
    assert [list(line.lines[0].get_xdata()) for line in lines] == [[30], [31]]


def test_without_an_adversarial_loss_one_trial_stands_for_all_discriminators():
    kinds = [{"kind": "label"}, {"kind": "label", "conditional": False}, {"kind": "patch"}]
    grids = {"gan.discriminator": kinds, "gan.gan_weight": [0, 0.1], "gan.seed": [0, 1]}
    trials = space.enumerate_trials(made(search={key: {"kind": "grid", "values": v} for key, v in grids.items()}))
    assert len(trials) == 2 + 3 * 2
    assert [v["gan.discriminator"] for v in trials if v["gan.gan_weight"] == 0] == kinds[:1] * 2


def test_trials_are_measured_on_the_images_named_and_a_shared_codec_not_again():
    search = {"gan.gan_weight": WEIGHTS}
    load = lambda searched: config.load(
        stages.get("evaluate").StageConfig, searched.evaluate, space.evaluation_inputs(searched, "p", "g")
    )
    assert load(made(search=search)).codecs == {"pretrained": "p", "fine-tuned": "g"}
    shared = load(made(search=search, pretrain=None, codec="p", images="photos"))
    assert (shared.images, shared.codecs) == ("photos", {"fine-tuned": "g"})


def test_a_realism_that_the_evaluations_leave_out_is_told(tmp_path):
    (tmp_path / "evaluate.yaml").write_text(f"extends: {ROOT}/configs/smoke/evaluate.yaml\nmetrics: [psnr_db]\n")
    searched = made(search={"gan.gan_weight": WEIGHTS}, evaluate=tmp_path / "evaluate.yaml", realism="ms_ssim")
    with pytest.raises(ConfigError, match="realism: ms_ssim is not among the metrics of"):
        checks.check(searched)
    with pytest.raises(UserError, match="nowhere"):
        checks.check(made(search={"gan.gan_weight": WEIGHTS}, images=str(tmp_path / "nowhere")))
    learned = {"algorithm": {"kind": "optuna", "metric": "ms_ssim"}, "realism": None}
    choice = {"gan.gan_weight": {"kind": "choice", "values": [0, 1]}}
    with pytest.raises(ConfigError, match=r"algorithm\.metric: ms_ssim is not among the metrics of"):
        checks.check(made(search=choice, evaluate=tmp_path / "evaluate.yaml", **learned))
    checks.check(made(search=choice, evaluate=tmp_path / "evaluate.yaml", realism="psnr_db"))


def test_a_sweep_of_a_given_codec_does_not_pretrain(tmp_path):
    given = {"pretrain": None, "codec": "runs/low"}
    searched = made(search={"gan.gan_weight": WEIGHTS}, **given)
    assert searched.stages == ("gan", "evaluate")
    best = {"name": "abc", "bpp": 0.1, "psnr_db": 30.0, "settings": {"gan.gan_weight": 0.1}}
    results.write_configs(tmp_path / "abc", searched, best, tmp_path / "sweep")
    assert {p.stem for p in (tmp_path / "abc").glob("*.yaml")} == {"gan", "evaluate"}
    loaded = {
        name: config.load(stages.get(name).StageConfig, tmp_path / f"abc/{name}.yaml") for name in ("gan", "evaluate")
    }
    assert loaded["gan"].codec == loaded["evaluate"].codecs["pretrained"] == "runs/low"
    with pytest.raises(
        ConfigError, match=r"search\.pretrain\.rate\.bpp: begins with no stage of a trial \(gan, evaluate\)"
    ):
        checks.check(made(search={"pretrain.rate.bpp": RATES}, **given))
    with pytest.raises(ConfigError, match="give either pretrain, a configuration, or codec"):
        made(search={"gan.gan_weight": WEIGHTS}, codec="runs/low")


def test_the_best_trials_become_configurations_that_load(tmp_path):
    searched = made(
        search={"pretrain.rate.bpp": RATES, "gan.gan_weight": WEIGHTS}, promote=f"{ROOT}/configs/smoke/promote.yaml"
    )
    best = {"name": "abc", "bpp": 0.1, "psnr_db": 30.0, "settings": {"pretrain.rate.bpp": 0.9, "gan.gan_weight": 0.1}}
    results.write_configs(tmp_path / "abc", searched, best, tmp_path / "sweep")
    loaded = {p.stem: config.load(stages.get(p.stem).StageConfig, p) for p in (tmp_path / "abc").glob("*.yaml")}
    assert set(loaded) == {"pretrain", "gan", "evaluate", "promote"}
    assert loaded["pretrain"].rate.bpp == 0.9
    assert loaded["gan"].gan_weight == 0.1
    assert loaded["promote"].evaluation == str(tmp_path / "sweep/trials/abc/evaluate")


def test_why_a_stage_ended(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("working\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
    assert trial.reason(1, log).startswith("out of memory; lower data.batch_size")
    log.write_text("working\n")
    assert "as the system does when memory runs out" in trial.reason(-signal.SIGKILL, log)
    log.write_text("working\nillm: data.batch_size is 3, expected a multiple of 2\n")
    assert trial.reason(2, log) == "data.batch_size is 3, expected a multiple of 2"


def test_a_member_goes_on_from_another_ones_newest_checkpoint(tmp_path):
    ours, theirs = tmp_path / "member-00", tmp_path / "member-01"
    for place in (ours, theirs):
        trial.prepare(place, {"gan.gan_weight": 0.1})
    for step in (10, 20):
        folder = theirs / "gan-00/checkpoints" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_text(str(step))
    trial.exploit_from(ours, theirs, {"gan.gan_weight": 0.12})
    assert trial.generation(ours) == (1, {"gan.gan_weight": 0.12})
    assert [p.name for p in (ours / "gan-01/checkpoints").iterdir()] == ["step-000000020"]
    about = json.loads((ours / trial.GENERATION).read_text())
    assert about["from"] == str(theirs / "gan-00")
    assert yaml.safe_load((ours / trial.SETTINGS).read_text()) == {"gan.gan_weight": 0.1}


def test_a_sweep_on_a_metric_whose_weights_are_missing_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    search = {"gan.gan_weight": {"kind": "choice", "values": [0.0, 0.1]}}
    by_realism = {"kind": "asha", "metric": "val/vgg_fd_64", "mode": "min", "grace_period": 5}
    for changed, told in (
        ({"scheduler": by_realism}, "^scheduler.metric: .*vgg16-397923af.pth is missing.*illm fetch-weights"),
        ({"algorithm": {"kind": "optuna", "metric": "lpips", "mode": "min"}}, "^algorithm.metric: .*alexnet"),
        ({"realism": "fid"}, "^realism: .*inception"),
    ):
        with pytest.raises(ConfigError, match=told):
            checks.check(made(search=search, **changed))
    with pytest.raises(ConfigError, match="expected one of fid, fid_64, vgg_fd_64"):
        made(search=search, realism="vgg")
