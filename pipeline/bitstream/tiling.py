"""Networks over images of any size, in bounded memory: window by window, each with enough around it to see what it would see
in the whole image. So there are no seams to hide, and results differ from those of the whole image by rounding alone.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


class Window(NamedTuple):
    """Rows and columns of a whole: those that are wanted, and those to compute them from."""

    top: int
    bottom: int
    left: int
    right: int
    outer_top: int
    outer_bottom: int
    outer_left: int
    outer_right: int

    def outer(self, x: Tensor) -> Tensor:
        """Shapes: x (B, C, height, width); returns (B, C, outer height, outer width)."""
        return x[..., self.outer_top : self.outer_bottom, self.outer_left : self.outer_right]

    def outer_within(self, x: Tensor, other: "Window") -> Tensor:
        """As `outer`, of an x that is only what another window with at least as much around it sees."""
        top, left = self.outer_top - other.outer_top, self.outer_left - other.outer_left
        height, width = self.outer_bottom - self.outer_top, self.outer_right - self.outer_left
        return x[..., top : top + height, left : left + width]

    def inner_of(self, y: Tensor, up: int = 1, down: int = 1) -> Tensor:
        """What is wanted of a network's output for `outer`. up, down: how its sides relate to the input's."""
        top, left = (self.top - self.outer_top) * up // down, (self.left - self.outer_left) * up // down
        height, width = (self.bottom - self.top) * up // down, (self.right - self.left) * up // down
        return y[..., top : top + height, left : left + width]


def windows(height: int, width: int, side: int, halo: int) -> Iterator[Window]:
    """Windows of at most side x side that cover a whole, each with `halo` around it as far as the whole reaches."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            bottom, right = min(top + side, height), min(left + side, width)
            yield Window(
                top, bottom, left, right,
                max(top - halo, 0), min(bottom + halo, height), max(left - halo, 0), min(right + halo, width),
            )  # fmt: skip


def tiled(network: Network, x: Tensor, side: int, halo: int, up: int = 1, down: int = 1) -> Tensor:
    """A network's output for all of x, on the CPU.

    Shapes: x (1, C, h, w); returns (1, C', h * up / down, w * up / down). side, halo: of windows, in positions of x, multiples
    of `down`; an output may depend on inputs up to `halo` away.
    """
    height, width = x.shape[-2:]
    whole: Tensor | None = None
    for window in windows(height, width, side, halo):
        part = window.inner_of(network(window.outer(x)), up, down).cpu()
        if whole is None:
            whole = torch.empty(1, part.shape[1], height * up // down, width * up // down, dtype=part.dtype)
        at = [n * up // down for n in window[:4]]
        whole[..., at[0] : at[1], at[2] : at[3]] = part
    assert whole is not None
    return whole
