"""How passes are computed: the `engine` section of a training stage's config."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from pipeline.config import Changeable, Config
from pipeline.models.layers import ChannelNorm
from pipeline.models.padded import pad_channels
from pipeline.training.device import best_precision


class EngineConfig(Config):
    """How passes are computed. Processes and ZeRO come from the launcher's file, see configs/launch."""

    precision: Literal["fp32", "fp32_exact", "bf16", "auto"] = "fp32"
    """Arithmetic of the forward and backward pass: fp32 (on a GPU: TF32 convolutions), fp32_exact, or bf16 autocast; auto: bf16
    where the device multiplies it, else fp32."""
    deterministic: Annotated[bool, Changeable()] = True
    """On a GPU, use only kernels that give the same bits each time; on the CPU all do."""
    gradient_accumulation_steps: Annotated[PositiveInt, Changeable()] = 1
    """Number of forward and backward passes per step, each over an equal part of the batch."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """How DDP sends gradients between processes: as they are, or rounded to bf16, half the bytes."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the weights' exponential moving average, which is validated and published; null: no average."""
    activation_checkpointing: Annotated[bool, Changeable()] = False
    """Recompute the activations of residual blocks in the backward pass: less memory, more time."""
    compile: Annotated[bool, Changeable()] = False
    """Use torch.compile for the trained networks and the frozen labeler; needs a C++ compiler."""
    cuda_graphs: Annotated[bool, Changeable()] = False
    """On a GPU, record what is compiled as CUDA graphs, which start all their kernels at once: for few crops per process."""
    fused_norms: Annotated[bool, Changeable()] = False
    """On a GPU, compute ChannelNorm and its activation in one kernel, in bf16 as it comes and goes; needs a C compiler."""
    pad_channels: Annotated[bool, Changeable()] = False
    """On a GPU, fill up channels to multiples of eight with zeros."""
    cudnn_benchmark: Annotated[bool, Changeable()] = False
    """On a GPU, let cuDNN try kernels and take the fastest; only with deterministic=false."""

    @model_validator(mode="after")
    def fits_together(self) -> "EngineConfig":
        if self.cudnn_benchmark and self.deterministic:
            raise ValueError("cudnn_benchmark needs deterministic=false: each process may settle on other kernels")
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs needs compile=true: what is compiled is recorded")
        return self

    def facts(self) -> dict[str, str]:
        """What this machine chose, as facts of a run: a run goes on only where they are the same."""
        return {"precision": f"{best_precision()}, by engine.precision=auto"} if self.precision == "auto" else {}


def choose_kernels(module: nn.Module, cfg: EngineConfig) -> None:
    """Has `module` compute on a GPU as the config says."""
    if cfg.fused_norms:
        # Triton is there on Linux only
        from pipeline.models.fused_norm import fused_norm

        for norm in (part for part in module.modules() if isinstance(part, ChannelNorm)):
            norm.kernel = fused_norm
    if cfg.pad_channels:
        pad_channels(module)
