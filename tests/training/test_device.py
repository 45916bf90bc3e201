"""What a GPU will be asked to do, as far as a CPU can tell: which device is taken, with what arithmetic, and what a step calls."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.batch import Batch
from pipeline.data.loader import LoaderConfig
from pipeline.errors import TrainingError
from pipeline.models.labeler import Labeler
from pipeline.stages.gan import GanTask
from pipeline.stages.gan import StageConfig as GanConfig
from pipeline.stages.pretrain import PretrainTask
from pipeline.stages.pretrain import StageConfig as PretrainConfig
from pipeline.stages.vqvae import StageConfig as VqvaeConfig
from pipeline.stages.vqvae import VqvaeTask
from pipeline.training import device
from pipeline.training.device import settle_arithmetic, usable_gpu
from pipeline.training.loop import Task
from pipeline.training.metrics import MetricAverager
from pipeline.training.optim import AdamConfig
from pipeline.training.runtime import Runtime
from tests.conftest import CONFIGS, assert_one_clear_line, illm
from tests.models.test_networks import SMALL, SMALL_LABELER, small_codec

aten = torch.ops.aten
# They hand a number to the host or take one from it, or their result's size depends on values
WAIT = {aten._local_scalar_dense, aten.nonzero, aten.bincount, aten._unique2, aten.masked_select, aten.lift_fresh}
# From torch.use_deterministic_algorithms: those that have no other kernel on a GPU
UNORDERED = {
    aten.nll_loss2d_forward, aten.nll_loss2d_backward, aten.reflection_pad2d_backward, aten.replication_pad2d_backward,
    aten.upsample_bilinear2d_backward, aten.upsample_bicubic2d_backward, aten.put_, aten.histc, aten.grid_sampler_2d_backward,
    aten._adaptive_avg_pool2d_backward, aten.kthvalue,
}  # fmt: skip
COMMON = {"data": LoaderConfig(shards="s", batch_size=4, crop_size=64), "fit": {"steps": 100}}
DISTORTION = {"mse": 150, "lpips": 0}
GUARDED = AdamConfig(lr=1e-4, skip_grad_spikes=10.0)
NO_CROPS = torch.zeros(0, 3, 64, 64)


class Refusing(TorchDispatchMode):
    """Remembers every call of the operations in `refused`, but for those that read an optimizer's own count of steps."""

    def __init__(self, refused: set[object], counts: list[torch.Tensor]):
        super().__init__()
        self.refused, self.counts, self.found = refused, {count.data_ptr() for count in counts}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket
        if name in self.refused and not (name is aten._local_scalar_dense and args[0].data_ptr() in self.counts):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def pretrain() -> Task:
    rate = {"kind": "target", "bpp": 0.14}
    cfg = PretrainConfig(**COMMON, codec=SMALL, distortion=DISTORTION, rate=rate, optimizer=GUARDED)
    return PretrainTask(cfg, Runtime(), NO_CROPS)


def vqvae() -> Task:
    return VqvaeTask(VqvaeConfig(**COMMON, labeler=SMALL_LABELER, optimizer=GUARDED), Runtime(), NO_CROPS)


def gan() -> Task:
    judge = {"kind": "label", "channels": (4,) * 6, "head_channels": 4, "context_channels": 2}
    cfg = GanConfig(
        **COMMON, codec="c", labeler="l", distortion=DISTORTION, discriminator=judge, generator_optimizer=GUARDED,
        discriminator_optimizer=GUARDED,
    )  # fmt: skip
    codec, labeler = small_codec().requires_grad_(False), Labeler(SMALL_LABELER).requires_grad_(False).eval()
    return GanTask(cfg, Runtime(), NO_CROPS, codec, labeler)


@pytest.mark.parametrize("made", [pretrain, vqvae, gan])
def test_a_step_asks_for_nothing_that_waits_for_the_device_or_sums_in_any_order(made):
    task, used = made(), Runtime()
    window, pixels = MetricAverager(used, 0), torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    parts = used.place_batch(Batch(pixels, [0, 1, 2, 3], [0, 1, 2, 3]))
    window.add(task.train_step(parts, 1))  # the first step makes the optimizers' state
    quantiles = task.quantiles.optimizer.state.values() if hasattr(task, "quantiles") else ()
    with Refusing(WAIT | UNORDERED, [state["step"] for state in quantiles]) as mode:
        parts = used.place_batch(Batch(pixels, [4, 5, 6, 7], [0, 1, 2, 3]))
        window.add(task.train_step(parts, 2))
    assert not mode.found


def test_codes_collect_their_gradient_in_one_order_whatever_the_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    labeler = Labeler(SMALL_LABELER)
    torch.set_num_threads(2)
    try:
        codes = labeler(torch.rand(2, 3, 512, 512)).codes
        given = torch.randn_like(codes)
        first, *others = (torch.autograd.grad(codes, labeler.codebook, given, retain_graph=True)[0] for _ in range(20))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


@pytest.fixture
def arithmetic() -> Iterator[None]:
    """Puts back what `settle_arithmetic` changes."""
    backends = torch.backends
    kept = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.deterministic
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        yield
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.deterministic = kept
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", True), ("bf16", True), ("fp32_exact", False)])
def test_convolutions_use_tf32_unless_exact_and_matrix_products_never(arithmetic, precision, tf32):
    torch.backends.cuda.matmul.allow_tf32 = True
    settle_arithmetic(precision, deterministic=False)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_is_asked_of_every_library(arithmetic, wanted):
    settle_arithmetic("fp32", deterministic=wanted)
    assert torch.backends.cudnn.deterministic is wanted
    assert torch.backends.cudnn.benchmark is False
    assert torch.are_deterministic_algorithms_enabled() is wanted
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)


def test_on_the_cpu_nothing_is_asked_for():
    Runtime()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.fixture
def machine(monkeypatch, tmp_path) -> pytest.MonkeyPatch:
    """Without a GPU, and with nothing that says anything about one."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "ACCELERATE_USE_CPU", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "no driver")
    return monkeypatch


SIGNS = [{"CUDA_VISIBLE_DEVICES": "0"}, {"SLURM_GPUS_ON_NODE": "8"}]


@pytest.mark.parametrize("signs", SIGNS, ids=str)
def test_a_gpu_that_torch_cannot_use_is_told_and_not_replaced_by_the_cpu(machine, signs):
    for name, value in signs.items():
        machine.setenv(name, value)
    with pytest.raises(TrainingError, match=r"torch cannot use a GPU.*nvidia-smi.*set ACCELERATE_USE_CPU=true"):
        usable_gpu()
    machine.setenv("ACCELERATE_USE_CPU", "true")
    assert not usable_gpu()


def test_a_driver_alone_is_a_sign_of_a_gpu(machine, tmp_path):
    assert not usable_gpu()
    machine.setattr(device, "DRIVER", Path(__file__))
    with pytest.raises(TrainingError, match=r"test_device.py is there on"):
        usable_gpu()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_the_cpu_by_choice(machine, hidden):
    machine.setenv("SLURM_GPUS_ON_NODE", "1")
    machine.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not usable_gpu()


def test_a_gpu_is_taken_unless_the_cpu_is_asked_for_and_never_shared(machine):
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    machine.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable_gpu()
    machine.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match=r"3 processes were started on .*, which shows 2 GPU\(s\)"):
        usable_gpu()
    machine.setenv("ACCELERATE_USE_CPU", "true")
    assert not usable_gpu()


def test_a_stage_that_would_train_on_the_cpu_by_mistake_says_so_in_one_line(smoke_copy):
    folder = smoke_copy("shard")
    run = ("pretrain", CONFIGS / "pretrain.yaml", "run=runs/new")
    ended = illm(*run, cwd=folder, env={"CUDA_VISIBLE_DEVICES": "77"})
    assert_one_clear_line(ended, "CUDA_VISIBLE_DEVICES=77", "ACCELERATE_USE_CPU=true")
    assert not (folder / "runs/new").exists()
