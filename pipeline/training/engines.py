"""A trained network behind its engine: alone or with DDP, or with DeepSpeed's ZeRO. One file knows their differences.

Both engines take the same steps: passes forward and back, in as many parts as a step has, then one update. Both run
bf16 as autocast over weights in fp32, and both write the same checkpoint, so a run may change its engine.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch_config
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from pipeline.errors import TrainingError
from pipeline.training.optim import AdamConfig, Ema, GradientGuard, adam, learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq")
Autocast = Callable[[], torch.autocast]


class Trainable:
    """A network, its optimizer and its learning rate, on one process or on several with DDP.

    `model` is the network behind the engine, for passes whose gradients train it; `module` is the plain network.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, cfg: AdamConfig, total_steps: int, autocast: Autocast
    ):
        self.module, self.cfg, self.total_steps, self._autocast = module, cfg, total_steps, autocast
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = adam(module, cfg)
        self.guard = GradientGuard(cfg.skip_grad_spikes, accelerator.device)
        self.ema: Ema | None = None
        self._callable: Callable[..., Any] = module
        self._wrap(accelerator)

    def _wrap(self, accelerator: Accelerator) -> None:
        self._engine = accelerator.prepare_model(self.module)
        self._callable = self._engine
        if isinstance(self._engine, DistributedDataParallel):
            _settle_buckets(self._engine, list(self.trained.values()))

    def compile(self, cuda_graphs: bool) -> None:
        """Passes through `model` run compiled from now on; `module` stays as it is."""
        # The generator's pass through the discriminator keeps its graph
        functorch_config.donated_buffer = False
        if isinstance(self._engine, DistributedDataParallel):
            self._engine.module = compiled(self._engine.module, cuda_graphs)
        else:
            self._callable = compiled(self._callable, cuda_graphs)

    def average(self, decay: float) -> None:
        """Keeps an exponential moving average of the weights from now on, as part of the checkpoint."""
        self.ema = Ema(self.module, decay)

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass in the run's precision; what it returns is fp32."""
        with self._autocast():
            return convert_to_fp32(self._callable(*args, **kwargs))

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around a forward pass and its backward pass; `last` says that no other follows before the update.

        Gradients add up, and only the last pass exchanges them between processes.
        """
        if isinstance(self._engine, DistributedDataParallel):
            self._engine.require_backward_grad_sync = last
        yield

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to that of the network's weights, and to nothing else's."""
        torch.autograd.backward(loss, inputs=list(self.trained.values()))

    def update(self, step: int) -> Tensor:
        """One optimizer step after `step` earlier ones; returns the gradient's 2-norm before clipping.

        A gradient that the guard refuses changes nothing, neither weights nor moments; the norm is then returned as not
        finite. Processes agree, because they share the gradient, and without waiting for the device.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None], foreach=True)
        refused = self.guard.refuses(norm)
        # Clips: the fused update divides gradients by it as it reads them, which saves a pass over all of them
        self.optimizer.grad_scale = ((norm + 1e-6) / self.cfg.max_grad_norm).clamp_min(1)  # type: ignore[attr-defined]
        self._set_learning_rate(step)
        self.optimizer.found_inf = refused  # type: ignore[attr-defined]  # fused AdamW skips the update if it is set
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._after(norm, refused)

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within it, the network has the weights that are validated and published."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def sync_master_weights(self) -> None:
        """To be called after weights were changed in place from outside."""

    def floats(self) -> list[Tensor]:
        """Weights, buffers and averaged weights: what validation and publication may use."""
        held = [*self.module.state_dict().values(), *(self.ema.average if self.ema else ())]
        return [value for value in held if value.dtype == torch.float32 and value.numel()]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the same for every engine: a collective call under ZeRO."""
        state: dict[str, Any] = {"model": self.module.state_dict(), "optimizer": self._moments()}
        state["guard"] = self.guard.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        self.sync_master_weights()
        if state["optimizer"]:
            self._load_moments(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, step, self.total_steps)

    def _after(self, norm: Tensor, refused: Tensor) -> Tensor:
        if self.ema is not None:
            self.ema.update()
        return torch.where(refused > 0, torch.inf, norm)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Name of parameter -> its moments and its step; empty before the first step."""
        state = self.optimizer.state
        return {
            name: {key: state[p][key] for key in (*MOMENTS, "step")} for name, p in self.trained.items() if state[p]
        }

    def _load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        for name, p in self.trained.items():
            self.optimizer.state[p] = {key: _like(value, p) for key, value in moments[name].items()}


class ZeroTrainable(Trainable):
    """The same with DeepSpeed's ZeRO 1 or 2: optimizer state, and under ZeRO 2 gradients, split over processes."""

    def _wrap(self, accelerator: Accelerator) -> None:
        plugin = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["gradient_clipping"] = self.cfg.max_grad_norm
        self._plain_step = self.optimizer.step
        self.optimizer.step = self._guarded_step  # type: ignore[method-assign]
        self._refused = torch.zeros((), device=accelerator.device)
        # ZeRO flattens weights
        self.module.to(memory_format=torch.contiguous_format)
        self._engine, _ = accelerator.prepare(self.module, self.optimizer)
        self._zero = self._engine.optimizer
        # Gradients are collected by hooks on the weights, so passes need not go through the engine; its own forward
        # would take the generator's pass through the discriminator for one that trains it.
        self._callable = self.module

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self, step: int) -> Tensor:
        self._set_learning_rate(step)
        # Stays so if ZeRO finds the norm not finite and steps not at all
        self._refused = torch.ones_like(self._refused)
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._refused.device)
        return self._after(norm, self._refused)

    def _guarded_step(self, *args: Any, **kwargs: Any) -> Any:
        """What ZeRO calls as the step of the optimizer it splits, after it has measured and clipped the gradient."""
        norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self._refused.device)
        self._refused = self.guard.refuses(norm)
        self.optimizer.found_inf = self._refused  # type: ignore[attr-defined]
        return self._plain_step(*args, **kwargs)

    def sync_master_weights(self) -> None:
        self._zero.refresh_fp32_params()

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state as full

        steps = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        if not steps:
            return {}
        step = steps[0]
        return {
            name: {**{key: full(p, key) for key in MOMENTS}, "step": step.clone()} for name, p in self.trained.items()
        }

    def _load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state as fill

        for flat in self._zero.single_partition_of_fp32_groups:
            step = next(iter(moments.values()))["step"]
            self.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS} | {
                "step": step.to(flat.device)
            }
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, p in self.trained.items():
            for key in MOMENTS:
                fill(p, moments[name][key].to(p.device), key)


def compiled(function: Any, cuda_graphs: bool) -> Any:
    """`function`, a network's or another, compiled for the shapes that it is called with.

    With CUDA graphs, its tensors are copied: the next call would write over what a graph returns.
    """
    if not cuda_graphs:
        return torch.compile(function, dynamic=False)
    return _Copying(torch.compile(function, dynamic=False, mode="reduce-overhead"))


class _Copying(nn.Module):
    """What a function returns, copied."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, Tensor.clone, self.function(*args, **kwargs))


def _settle_buckets(engine: DistributedDataParallel, weights: list[nn.Parameter]) -> None:
    """Has DDP arrange its buckets for good, with a backward pass that changes nothing.

    DDP arranges them again before the second step of every process, and more than two processes then add up gradients in
    another order. So the first step after a resume would round otherwise than the same step of an uninterrupted run.
    """
    engine.reducer.prepare_for_backward([])
    torch.autograd.backward(torch.stack([weight.sum() for weight in weights]).sum())
    for weight in weights:
        weight.grad = None
    engine.reducer._rebuild_buckets()


def _like(value: Tensor, p: Tensor) -> Tensor:
    """A saved piece of optimizer state on the parameter's device and in its memory layout."""
    if value.shape != p.shape:
        return value.to(p.device, torch.float32)
    return torch.empty_like(p).copy_(value)


def launched_zero_stage() -> int:
    """The ZeRO stage the launcher asks for; 0: no DeepSpeed.

    Raises: TrainingError for stages the trainers do not support, or without the deepspeed package.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return 0
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if stage not in (1, 2):
        raise TrainingError(
            f"launched with ZeRO stage {stage}, expected 1 or 2: stage 3 splits the weights themselves, and the generator's "
            "pass through the discriminator needs them whole. See configs/launch"
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f"launched with DeepSpeed, which is not installed ({error}); pip install -r requirements/deepspeed.txt"
        ) from None
    return stage


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration of one network. Batch sizes only have to fit each other: the loss is scaled by us."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            # In weights: DeepSpeed's 5e8 would hold all, so nothing would overlap
            "reduce_bucket_size": 25_000_000,
        },
        "zero_allow_untested_optimizer": True,
        # Replaced by each network's own
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
