import copy
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.layers import ChannelNorm
from pipeline.training.device import best_precision
from pipeline.training.engine_config import EngineConfig, choose_kernels
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime, mix_seed
from tests.conftest import CONFIGS, illm_here


def test_a_backward_pass_touches_the_gradients_of_its_own_network_alone():
    runtime = Runtime()
    inner, outer = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    trainable = runtime.trainable("inner", inner, AdamConfig(lr=0.1), 10)
    trainable.backward(outer(trainable.model(torch.ones(1, 2))).sum())
    assert inner.weight.grad.abs().sum() > 0
    assert outer.weight.grad is None


def test_an_update_clips_the_gradient_and_uses_the_schedule():
    module = torch.nn.Linear(1, 1, bias=False)
    before = module.weight.item()
    cfg = AdamConfig(lr=0.5, warmup_steps=10, max_grad_norm=1.0)
    trainable = Runtime().trainable("net", module, cfg, 100)
    trainable.backward(1000 * module.weight.sum())
    norm = trainable.update(step=0)
    assert norm.item() == 1000
    assert abs(before - module.weight.item() - 0.05) < 1e-4  # a tenth of the rate: Adam's first step is one rate long
    assert module.weight.grad is None


def test_state_round_trips():
    def made() -> Runtime:
        torch.manual_seed(0)
        runtime = Runtime()
        runtime.net = runtime.trainable("net", torch.nn.Linear(2, 2), AdamConfig(lr=0.1), 10)
        return runtime

    first, second = made(), made()
    x = torch.ones(1, 2)
    first.net.backward(first.net.model(x).sum())
    first.net.update(0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for runtime in (first, second):
        runtime.net.backward(runtime.net.model(x).square().sum())
        runtime.net.update(1)
    assert torch.equal(first.net.module.weight, second.net.module.weight)


def test_seeds_of_neighbouring_positions_are_unrelated():
    seeds = [mix_seed(s, n) for s in range(50) for n in range(50)]
    assert len(set(seeds)) == 2500
    assert all(0 <= s < 2**63 for s in seeds)
    bits = [bin(mix_seed(0, n) ^ mix_seed(0, n + 1)).count("1") for n in range(500)]
    assert 28 < sum(bits) / len(bits) < 35  # about half of 63 bits differ


@pytest.mark.parametrize(
    ("keys", "told"),
    [({"cudnn_benchmark": True}, "needs deterministic=false"), ({"cuda_graphs": True}, "needs compile=true")],
)
def test_options_that_contradict_each_other_are_refused(keys, told):
    with pytest.raises(ValidationError, match=told):
        EngineConfig(**keys)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_gpus_kernels_are_chosen_by_the_config(wanted):
    codec = Codec(
        CodecConfig(channels=(8, 12, 16, 20, 24), latent_channels=20, hyper_channels=8, num_residual_blocks=1)
    )
    choose_kernels(codec, EngineConfig(fused_norms=wanted, pad_channels=wanted))
    norms = [part for part in codec.modules() if isinstance(part, ChannelNorm)]
    assert len(norms) == 5 + 2 + 2 + 4
    assert all((norm.kernel is not None) is wanted for norm in norms)
    assert ("forward" in vars(codec.synthesis.head[1])) is wanted


def test_auto_takes_bf16_where_the_processor_multiplies_it_and_says_so():
    flags = Path("/proc/cpuinfo").read_text().split()
    has = "amx_tile" in flags or "avx512_bf16" in flags
    assert best_precision() == ("bf16" if has else "fp32")
    runtime = Runtime(EngineConfig(precision="auto"))
    assert runtime.autocast()._enabled is has
    assert runtime.cfg.facts() == {"precision": f"{best_precision()}, by engine.precision=auto"}
    assert EngineConfig(precision="bf16").facts() == {}


def test_a_run_by_auto_goes_on_only_where_auto_chooses_the_same(smoke, tmp_path):
    words = [CONFIGS / "vqvae.yaml", f"run={tmp_path / 'run'}", "engine.precision=auto", "fit.checkpoint_every=1"]
    assert (ended := illm_here("vqvae", *words, "fit.steps=2", cwd=smoke)).code == 0, ended.err
    assert f"precision {best_precision()}, by engine.precision=auto" in " ".join(ended.err.split())
    (tmp_path / "run/artifact/manifest.json").unlink()
    recorded = tmp_path / "run/run.yaml"
    changed = yaml.safe_load(recorded.read_text()) | {"(precision)": "another, by engine.precision=auto"}
    recorded.write_text(yaml.safe_dump(changed))
    refused = illm_here("vqvae", *words, "fit.steps=2", cwd=smoke)
    assert refused.code == 2
    assert "(precision): another, by engine.precision=auto there" in refused.err
