"""Layers that more than one network uses."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

# Channels; bounded, since descriptions of networks may be untrusted
Width = Annotated[int, Field(gt=0, le=65536)]
Activation = Literal["relu", "silu"] | None
# Of x (B, C, H, W), scale and shift (C, 1, 1), epsilon and activation
NormKernel = Callable[[Tensor, Tensor, Tensor, float, Activation], Tensor]


class ChannelNorm(nn.Module):
    """Normalizes each pixel over its channels, so results do not depend on image size; then activates, if it is told to.

    Shapes: x (B, C, H, W); returns the same.
    Source: Mentzer et al. 2020 (HiFiC), arXiv:2006.09965.
    """

    def __init__(self, channels: int, activation: Activation = None, eps: float = 1e-3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.channels, self.activation = channels, activation
        # The authors' value, not PyTorch's usual 1e-5
        self.eps = eps
        # What computes it instead of the definition: `engine.fused_norms`
        self.kernel: NormKernel | None = None

    def forward(self, x: Tensor) -> Tensor:
        # The compiler writes such a kernel itself
        if self.kernel is not None and not torch.compiler.is_compiling():
            return self.kernel(x, self.scale, self.shift, self.eps, self.activation)
        # The definition divides the squares by C - 1, layer_norm by C: (x - m) / sqrt(v C / (C - 1) + eps) is
        # sqrt(k) (x - m) / sqrt(v + k eps) with k = (C - 1) / C. One kernel instead of six, and far less memory.
        k = (self.channels - 1) / self.channels
        weight = self.scale.flatten() * k**0.5
        y = F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,), weight, self.shift.flatten(), self.eps * k)
        # Before the view: an in-place operation on a view has its gradient copied twice
        y = F.relu_(y) if self.activation == "relu" else y if self.activation is None else F.silu(y)
        return y.permute(0, 3, 1, 2)
