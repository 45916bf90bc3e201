"""Device, ranks and engines: the only file that imports accelerate or deepspeed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.data.loader import Batch
from pipeline.errors import TrainingError, UserError
from pipeline.training.optim import AdamConfig, adam, learning_rate

Precision = Literal["fp32", "bf16"]
T = TypeVar("T")


class Stateful(Protocol):
    """What a checkpoint holds besides the trainables."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class Runtime:
    """This process among all processes of the stage: its device, its rank, what it trains, what a checkpoint holds.

    Raises: TrainingError if the launcher started processes that cannot see each other.
    """

    def __init__(self, precision: Precision = "fp32"):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
            raise TrainingError(
                "launched with DeepSpeed, which the trainers do not support yet; use a launch file without it"
            )
        mixed = "no" if precision == "fp32" else precision
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.accelerator.num_processes != launched:
            raise TrainingError(
                f"the launcher started {launched} processes, but this one sees {self.accelerator.num_processes}; "
                "see configs/launch and the README's section on several processes"
            )
        self._stateful: dict[str, Stateful] = {}

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def trainable(self, name: str, module: nn.Module, cfg: AdamConfig, total_steps: int) -> "Trainable":
        """`module` on this device behind the engine, with its optimizer; part of every checkpoint under `name`."""
        made = Trainable(self.accelerator, self.place(module), cfg, total_steps)
        self.register(name, made)
        return made

    def register(self, name: str, state: Stateful) -> None:
        """Makes `state` part of every checkpoint under `name`."""
        if name in self._stateful:
            raise ValueError(f"{name!r} is registered already")
        self._stateful[name] = state

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._stateful.items():
            part.load_state_dict(state[name])

    def place(self, module: nn.Module) -> nn.Module:
        """`module` on this device, its 4-d weights in the memory layout that convolutions like best."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def place_batch(self, batch: Batch) -> Batch:
        return batch.to(self.device, torch.channels_last)

    def generators(self, seed: int, positions: list[int]) -> list[torch.Generator]:
        """One random generator per sample, whose numbers depend on the seed and the sample's position alone."""
        return [torch.Generator(self.device).manual_seed(mix(seed, position)) for position in positions]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        return self.accelerator.reduce(value, "sum")

    def gather(self, value: Tensor) -> Tensor:
        """The values of all processes, one after the other along the first dimension, on each of them."""
        return self.accelerator.gather(value)

    def any_rank(self, flag: bool) -> bool:
        """Whether any process says yes, known to all."""
        if self.num_processes == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returned on the main process, on every process; what a user can mend is raised on all."""
        if self.num_processes == 1:
            return action()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = action()
            except (UserError, OSError) as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def close(self) -> None:
        """Ends the process group in step with the others; call it last."""
        if dist.is_initialized():
            self.accelerator.wait_for_everyone()
            dist.destroy_process_group()


class Trainable:
    """A network, its optimizer and its learning rate behind one verb.

    `model` is the network behind the engine, for passes whose gradients train it; `module` is the plain network.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, cfg: AdamConfig, total_steps: int):
        self._accelerator, self._cfg, self._total_steps = accelerator, cfg, total_steps
        self.module = module
        self._plain_optimizer = adam(module, cfg)
        self.model, self.optimizer = accelerator.prepare(module, self._plain_optimizer)

    def update(self, loss: Tensor, step: int) -> Tensor:
        """One optimizer step on `loss` after `step` earlier ones; returns the gradient's 2-norm before clipping.

        A gradient that is not finite changes nothing, neither weights nor moments; the norm tells of it. Processes
        agree, because they share the gradient, and nobody waits for the device to find out.
        """
        self._accelerator.backward(loss)
        norm = self._accelerator.clip_grad_norm_(self.model.parameters(), self._cfg.clip_norm)
        assert norm is not None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._cfg, step, self._total_steps)
        self._plain_optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # fused AdamW heeds it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """`module` as a fixed function: gradients pass through it, its own weights collect none.

    Takes the plain network, never the one behind the engine: a second pass through an engine between two of its updates
    is what makes ranks drift apart (DDP) or gradients leak (ZeRO).
    """
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield module
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)


def mix(seed: int, number: int) -> int:
    """A 63-bit seed from two numbers; neighbouring inputs give unrelated seeds (splitmix64's finaliser)."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) >> 1
