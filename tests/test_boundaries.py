"""What imports what, what `describe` tells of every stage, and what make hands on."""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys

import pytest

from pipeline import stages
from tests.conftest import ROOT, illm_here


def test_losses_pull_in_no_tracker_or_scheduler():
    code = "import sys, pipeline.losses; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"mlflow", "ray", "accelerate", "compressai", "pydantic"} & set(loaded.split())


def test_a_codec_needs_little_of_compressai_and_others_get_all_of_it():
    code = """
import sys
import pipeline.bitstream.codec
print("torch_geometric" in sys.modules)
import compressai
print(compressai.models.ScaleHyperprior.__name__, compressai.__version__, compressai.available_entropy_coders())
from compressai.zoo import bmshj2018_hyperprior
print(bmshj2018_hyperprior.__name__, "torch_geometric" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    version = importlib.metadata.version("compressai")
    assert lines == ["False", f"ScaleHyperprior {version} ['ans']", "bmshj2018_hyperprior True"], done.stderr


@pytest.mark.parametrize("words", [["--help"], ["gan", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = f"import sys; sys.argv = ['illm', *{words}]\nfrom pipeline.cli.app import app\n"
    code += "try: app()\nexcept SystemExit: pass\nprint(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Usage" in shown
    loaded = shown.rsplit("\n", 2)[-2].split()
    assert not {"torch", "numpy", "mlflow", "ray"} & set(loaded)
    # a heavy import under another name would bring hundreds
    assert 100 < len(loaded) < 600


def test_describe_counts_the_published_networks(tmp_path):
    ended = illm_here("describe", ROOT / "configs/gan.yaml", "--json", cwd=tmp_path)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["parameters"] == {
        "encoder": 7_423_420, "decoder": 156_774_683, "codec": 181_481_103, "discriminator": 17_877_073, "labeler": 18_116_178,
    }  # fmt: skip
    adds = told["multiply_adds_per_pixel"]
    assert adds["encoder"] == pytest.approx(81_000, rel=0.01)
    assert adds["decoder"] == pytest.approx(664_200, rel=0.01)
    assert adds["discriminator"] == pytest.approx(356_000, rel=0.01)
    assert told["steps"] == 100_000
    assert told["inputs"] == {"data.shards": "runs/shard", "codec": "runs/pretrain", "labeler": "runs/vqvae"}
    assert told["defaults"]["engine.precision"] == "fp32"
    assert "gan_weight" not in told["defaults"]


@pytest.mark.parametrize("stage", stages.STAGES)
def test_describe_tells_of_every_stage_without_training(stage, tmp_path):
    path = ROOT / ("configs/sweep/smoke.yaml" if stage == "sweep" else f"configs/demo/{stage}.yaml")
    ended = illm_here("describe", path, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert f"stage: {stage}" in ended.out
    assert list(tmp_path.iterdir()) == []


def dry_make(*words: str) -> list[str]:
    """The words of the command that `make` would run."""
    # `make test` hands its own level and flags to a make below it, which then also says which folder it leaves
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    told = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.ready", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return shlex.split(told.splitlines()[-1])


@pytest.mark.parametrize("name", ["my run", "it's mine", 'a "b" $$(c)'])
def test_make_takes_names_with_spaces_and_quotes(name):
    shown = name.replace("$$", "$")
    _, *words = dry_make("stage-gan", f"RUN=runs/{name}", f"CONFIG=configs/{name}.yaml", "SET='codec=runs/a b' seed=1")
    assert words == ["gan", f"configs/{shown}.yaml", f"run=runs/{shown}", "codec=runs/a b", "seed=1"]
    assert dry_make("demo", f"RUN=runs/{name}", f"DATA=/photos/{name}")[1:] == [
        "demo", "configs/demo", "--run", f"runs/{shown}", "--data", f"/photos/{shown}",
    ]  # fmt: skip
    assert dry_make("describe", f"CONFIG={name}.yaml")[-1] == f"{shown}.yaml"
    assert dry_make("sweep", f"RUN={name}")[-1] == f"run={shown}"
    assert f"runs/{shown}" in dry_make("submit-slurm", f"RUN=runs/{name}")
    assert dry_make("stage-gan")[1:] == ["gan", "configs/gan.yaml", "run=runs/gan"]


@pytest.mark.parametrize("stage", ["gan", "evaluate", "promote"])
def test_a_stage_starts_without_what_takes_seconds_to_import(stage):
    code = f"import sys, pipeline.stages.{stage}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch" in loaded.split()
    assert not {"torchvision", "torch._dynamo", "mlflow", "matplotlib", "ray", "pandas"} & set(loaded.split())
