"""Device, ranks and what all of them agree on. With engines.py and launch.py, all that imports accelerate or deepspeed."""

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.errors import TrainingError, UserError
from pipeline.log import logger
from pipeline.models.gemm import use_products
from pipeline.training.collectives import ControlGroup, init_process_group, timeout_of
from pipeline.training.device import Precision, best_precision, settle_arithmetic, usable_gpu
from pipeline.training.engine_config import EngineConfig, choose_kernels
from pipeline.training.engines import Trainable, ZeroTrainable, compiled, launched_zero_stage, zero_config
from pipeline.training.optim import AdamConfig

T = TypeVar("T")
# Trained in one stage
MAX_NETWORKS = 2
REMEDY = "A lower learning rate in a new run= usually fixes this"


class Stateful(Protocol):
    """What a checkpoint holds besides the trainables."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class Runtime:
    """This process among all processes of the stage: its device, its rank, what it trains, what a checkpoint holds.

    Raises: TrainingError if the launcher started processes that cannot see each other, more of them than there are GPUs,
    or asks for ZeRO 3; or if there is a GPU that cannot be used.
    """

    def __init__(self, cfg: EngineConfig | None = None):
        self.cfg = cfg or EngineConfig()
        self.zero_stage = launched_zero_stage()
        has_gpu = usable_gpu()
        self.precision: Precision = best_precision() if self.cfg.precision == "auto" else self.cfg.precision
        if has_gpu:
            settle_arithmetic(self.precision, self.cfg.deterministic, self.cfg.cudnn_benchmark)
        hook = DDPCommunicationHookType.BF16 if self.cfg.gradient_compression == "bf16" else DDPCommunicationHookType.NO
        handlers: list[Any] = [
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook)
        ]
        # Before processes meet: of two that meet, one would see the other's end
        if self.zero_stage and self.cfg.gradient_compression != "none":
            raise TrainingError(
                "engine.gradient_compression is for DDP, and this was launched with DeepSpeed; leave it out"
            )
        if self.zero_stage and not has_gpu and torch.cuda.is_available():
            raise TrainingError(
                "DeepSpeed takes a GPU that it sees; to train on the CPU, set CUDA_VISIBLE_DEVICES= too"
            )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 or self.zero_stage:
            backend = "nccl" if has_gpu else "gloo"
            init_process_group(backend)
            handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout_of(backend)))
        # Precision is ours to apply, the same way for every engine; a launch file's mixed_precision is ignored.
        if self.zero_stage:
            # With this variable Accelerate would silently drop DeepSpeed
            os.environ.pop("ACCELERATE_USE_CPU", None)
            # The launch file says the stage; zero_config says the rest
            os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
            plugins = {
                f"network {i}": DeepSpeedPlugin(hf_ds_config=zero_config(self.zero_stage)) for i in range(MAX_NETWORKS)
            }
            self.accelerator = Accelerator(mixed_precision="no", deepspeed_plugins=plugins, kwargs_handlers=handlers)
        else:
            self.accelerator = Accelerator(mixed_precision="no", cpu=not has_gpu, kwargs_handlers=handlers)
        if self.accelerator.num_processes != launched:
            raise TrainingError(
                f"the launcher started {launched} processes, but this one sees {self.accelerator.num_processes}; "
                "see configs/launch and docs/engines.md"
            )
        self.control = ControlGroup(self.num_processes)
        self._stateful: dict[str, Stateful] = {"generators": Generators(self.device)}
        self._networks = 0

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

    @property
    def engine(self) -> str:
        """What trains, in a word or two: for people."""
        several = f"ZeRO-{self.zero_stage}" if self.zero_stage else "DDP"
        return several if self.num_processes > 1 or self.zero_stage else "one process"

    @property
    def device_name(self) -> str:
        """For people."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def sizes(self) -> dict[str, int]:
        """Number of trained weights of each network."""
        networks = {name: part for name, part in self._stateful.items() if isinstance(part, Trainable)}
        return {name: sum(p.numel() for p in network.trained.values()) for name, network in networks.items()}

    def autocast(self) -> torch.autocast:
        """The run's precision for a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def trainable(
        self, name: str, module: nn.Module, cfg: AdamConfig, total_steps: int, published: bool = True
    ) -> Trainable:
        """`module` on this device behind the engine, with its optimizer; part of every checkpoint under `name`.

        `published` networks are averaged where the config says so.
        """
        accelerator = self.accelerator
        # One Accelerator holds one DeepSpeed engine
        if self.zero_stage:
            accelerator = self.accelerator if not self._networks else Accelerator()
            accelerator.state.select_deepspeed_plugin(f"network {self._networks}")
        self._networks += 1
        cls = ZeroTrainable if self.zero_stage else Trainable
        made = cls(accelerator, self.place(module), cfg, total_steps, self.autocast)
        if self.cfg.compile:
            made.compile(self.cfg.cuda_graphs)
        if published and self.cfg.ema_decay is not None:
            made.average(self.cfg.ema_decay)
        self.register(name, made)
        return made

    def register(self, name: str, state: Stateful) -> None:
        """Makes `state` part of every checkpoint under `name`."""
        if name in self._stateful:
            raise ValueError(f"{name!r} is registered already")
        self._stateful[name] = state

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint holds, on this device and not copied: all processes call it together."""
        return {name: part.state_dict() for name, part in self._stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._stateful.items():
            part.load_state_dict(state[name])

    def check_weights(self, step: int) -> None:
        """Looks at every weight of every trained network, and waits for the device; all processes call it together.

        Warns if ranks hold different bits, which happens where a device computes wrongly or is of another kind.
        Raises: TrainingError if a weight is not finite.
        """
        held = [value for part in self._stateful.values() if isinstance(part, Trainable) for value in part.floats()]
        finite = torch.stack([value.isfinite().all() for value in held]).all().long()
        digests = torch.stack([value.view(torch.int32).sum(dtype=torch.int64) for value in held])
        everyones = self.gather(torch.cat([finite[None], digests])[None]).cpu()  # (processes, 1 + tensors)
        if not everyones[:, 0].all():
            raise TrainingError(
                f"weights are not finite at step {step}; no checkpoint was written, the previous one is kept. {REMEDY}"
            )
        if (everyones != everyones[0]).any():
            logger.warning(f"ranks hold different weights at step {step}; those of rank 0 are saved")

    def place(self, module: nn.Module) -> nn.Module:
        """`module` on this device, with the kernels and the memory layout that are fastest there."""
        if self.device.type == "cuda":
            choose_kernels(module, self.cfg)
        elif self.device.type == "cpu":
            use_products(module)
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def frozen(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A pass through a network that is not trained, compiled where the config says so."""
        return compiled(function, self.cfg.cuda_graphs) if self.cfg.compile else function

    def place_batch(self, batch: Batch) -> list[Batch]:
        """The parts of a batch, one per pass, on this device: what a step begins with."""
        self.begin_step()
        return [part.to(self.device, torch.channels_last) for part in batch.split(self.cfg.gradient_accumulation_steps)]

    def begin_step(self) -> None:
        """Says that nothing that the graphs returned in the step before is still used."""
        if self.cfg.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def generators(self, seed: int, positions: list[int]) -> list[torch.Generator]:
        """One random generator per sample, whose numbers depend on the seed and the sample's position alone."""
        return [torch.Generator(self.device).manual_seed(mix_seed(seed, position)) for position in positions]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        if self.num_processes == 1:
            return value
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

    def gather(self, value: Tensor) -> Tensor:
        """The values of all processes, one after the other along the first dimension, on each of them."""
        if self.num_processes == 1:
            return value
        everyones = value.new_empty(self.num_processes * len(value), *value.shape[1:])
        dist.all_gather_into_tensor(everyones, value.contiguous())
        return everyones

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returned on the main process, on every process; a user's error is raised on all."""
        if self.num_processes == 1:
            return action()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = action()
            except (UserError, OSError) as error:
                box[1] = error
        self.control.broadcast(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def close(self) -> None:
        """Ends the process group in step with the others; call it last."""
        if dist.is_initialized():
            self.control.broadcast([None])
            self.control.close()
            dist.destroy_process_group()


class Generators:
    """torch's own random generators. Our randomness follows from seed and position; this is for code that does not know."""

    def __init__(self, device: torch.device):
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        on_gpu = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **on_gpu}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def step_seed(seed: int, step: int) -> int:
    """A seed for what is drawn once per step, on every rank and for every part of the batch alike."""
    # Images draw theirs by their positions, from 0 on
    return mix_seed(seed, -1 - step)


def mix_seed(seed: int, number: int) -> int:
    """A 63-bit seed from two numbers; neighboring inputs give unrelated seeds (splitmix64's finalizer)."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) >> 1
