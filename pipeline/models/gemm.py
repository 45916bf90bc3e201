"""On a CPU: convolutions with many weights and few positions, each computed as one matrix product of all its windows.

There, products are faster than oneDNN's convolutions (docs/performance.md), and the gradient of the weights needs no copy: in the
channels_last layout the rows of a window are runs of memory, and products give outputs and gradients in the layout that they are
kept in. F.unfold and F.fold are of the other layout. Results are equal but for rounding.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# From how many weights on, and up to how many positions of the smaller map (of the whole batch) for each channel of the wider one
LEAST_WEIGHTS = 1 << 20
POSITIONS_PER_CHANNEL = 1.0
# Rows and columns
Pair = tuple[int, int]


def use_products(network: nn.Module) -> None:
    """From now on, convolutions of the network are computed as matrix products where it `pays`."""
    for module in network.modules():
        # A class and not a bound method as its forward: such a circle would keep gigabytes until Python looks for circles
        if type(module) is nn.Conv2d and _can(module):
            module.__class__ = ProductConv2d
        elif type(module) is nn.ConvTranspose2d and _can(module):
            module.__class__ = ProductConvTranspose2d


def _can(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return plain and isinstance(layer.padding, tuple) and max(layer.kernel_size) > 1


def pays(positions: int, weight: Tensor) -> bool:
    """Whether a product is faster."""
    few = positions <= POSITIONS_PER_CHANNEL * max(weight.shape[:2])
    return few and weight.numel() >= LEAST_WEIGHTS and not torch.compiler.is_compiling()


class _Geometry(NamedTuple):
    """kernel, stride, padding; small, large: sizes of the maps on both sides, of which windows of the large one meet the small."""

    kernel: Pair
    stride: Pair
    padding: Pair
    small: Pair
    large: Pair

    @property
    def covered(self) -> Pair:
        """What the windows cover, from the padding on."""
        rows, columns = ((n - 1) * s + k for n, s, k in zip(self.small, self.stride, self.kernel, strict=True))
        return rows, columns

    def windows(self, x: Tensor) -> Tensor:
        """Shapes: x (B, C, *large); returns (B * positions, C * kernel), channels last."""
        top, left = self.padding
        bottom, right = (c - p - n for c, p, n in zip(self.covered, self.padding, self.large, strict=True))
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, right, top, bottom))
        views = padded.unfold(1, self.kernel[0], self.stride[0]).unfold(2, self.kernel[1], self.stride[1])
        return views.permute(0, 1, 2, 4, 5, 3).reshape(len(x) * self.small[0] * self.small[1], -1)

    def sums(self, windows: Tensor, batch: int) -> Tensor:
        """The adjoint of `windows`. Shapes: windows (B * positions, C * kernel); returns (B, C, *large)."""
        windows = windows.view(batch, *self.small, *self.kernel, -1)
        rows, columns = (max(c, p + n) for c, p, n in zip(self.covered, self.padding, self.large, strict=True))
        dtype = torch.promote_types(windows.dtype, torch.float32)
        summed = windows.new_zeros(batch, rows, columns, windows.shape[-1], dtype=dtype)
        for row in range(self.kernel[0]):
            for column in range(self.kernel[1]):
                met = summed[:, row :: self.stride[0], column :: self.stride[1]][:, : self.small[0], : self.small[1]]
                met += windows[:, :, :, row, column]
        (top, left), (height, width) = self.padding, self.large
        y = _empty(windows, batch, windows.shape[-1], self.large)
        y.permute(0, 2, 3, 1).copy_(summed[:, top : top + height, left : left + width])
        return y


class ProductConv2d(nn.Conv2d):
    """Shapes as of nn.Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = _pairs(self)
        sizes = zip(x.shape[2:], padding, kernel, stride, strict=True)
        height, width = ((n + 2 * p - k) // s + 1 for n, p, k, s in sizes)
        if not pays(len(x) * height * width, self.weight):
            return super().forward(x)
        geometry = _Geometry(kernel, stride, padding, (height, width), (x.shape[2], x.shape[3]))
        return _Product.apply(*_cast(x, self.weight, self.bias), geometry, False)


class ProductConvTranspose2d(nn.ConvTranspose2d):
    """Shapes as of nn.ConvTranspose2d, without `output_size`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not pays(len(x) * x.shape[2] * x.shape[3], self.weight):
            return super().forward(x)
        kernel, stride, padding = _pairs(self)
        sizes = zip(x.shape[2:], stride, padding, kernel, self.output_padding, strict=True)
        height, width = ((n - 1) * s - 2 * p + k + more for n, s, p, k, more in sizes)
        geometry = _Geometry(kernel, stride, padding, (x.shape[2], x.shape[3]), (height, width))
        return _Product.apply(*_cast(x, self.weight, self.bias), geometry, True)


def _pairs(layer: nn.Conv2d | nn.ConvTranspose2d) -> tuple[Pair, Pair, Pair]:
    """Kernel, stride and padding."""
    return layer.kernel_size, layer.stride, layer.padding  # type: ignore[return-value]


def _cast(*values: Tensor | None) -> list[Tensor | None]:
    """As autocast does for a convolution."""
    if not torch.is_autocast_enabled("cpu"):
        return list(values)
    return [None if value is None else value.to(torch.get_autocast_dtype("cpu")) for value in values]


def _empty(like: Tensor, batch: int, channels: int, size: Pair) -> Tensor:
    """Not yet filled and no view, so that what follows may work in place."""
    return torch.empty(batch, channels, *size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """Shapes: (B, C, H, W); returns (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _matrix(weight: Tensor) -> Tensor:
    """Shapes: (S, L, h, w), channels of the small and the large map; returns (S, h * w * L)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


class _Product(torch.autograd.Function):
    """Windows times weights, or, transposed, its adjoint. Shapes as of the convolutions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.transposed = geometry, transposed
        if transposed:
            y = geometry.sums(_rows(x) @ _matrix(weight), len(x))
            return y if bias is None else y.add_(bias[:, None, None])
        windows, matrix = geometry.windows(x), _matrix(weight).T
        y = _empty(x, len(x), len(weight), geometry.small)
        if bias is None:
            torch.mm(windows, matrix, out=_rows(y))
        else:
            torch.addmm(bias, windows, matrix, out=_rows(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        geometry, transposed = ctx.geometry, ctx.transposed
        small, large = (x, dy) if transposed else (dy, x)
        rows = _rows(small)
        dx = dw = None
        if transposed or ctx.needs_input_grad[1]:
            windows = geometry.windows(large)
        if ctx.needs_input_grad[0] and transposed:
            dx = _empty(x, len(x), x.shape[1], geometry.small)
            torch.mm(windows, _matrix(weight).T, out=_rows(dx))
        elif ctx.needs_input_grad[0]:
            dx = geometry.sums(rows @ _matrix(weight), len(x))
        if ctx.needs_input_grad[1]:
            dw = (rows.T @ windows).view(len(weight), *geometry.kernel, -1).permute(0, 3, 1, 2)
        bias = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return dx, dw, bias, None, None
