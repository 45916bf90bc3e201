"""Weights that training starts from.

PyTorch's own shrink signals from layer to layer, and a first layer that is not centered sees little but brightness, which
ChannelNorm takes away: training then spends hundreds of steps at a constant image.
"""

from typing import Literal

import torch
from torch import nn

from pipeline.models.codec import Codec
from pipeline.models.discriminator import DownBlock, LabelDiscriminator, UpBlock
from pipeline.models.labeler import Labeler
from pipeline.models.transforms import LightBlock

# "he": ours, centered on mid-gray; "pytorch": torch's own, as in the release
Init = Literal["he", "pytorch"]
MID_GRAY = 0.5
# of the last layer: a codec's first image is nearly gray, and not noise that would have to be unlearned, and a discriminator
# begins undecided
LAST_LAYER = 0.1
# of the last layer of residual blocks without norms
RESIDUAL = 0.1


@torch.no_grad()
def he_labeler(labeler: Labeler) -> None:
    """He's initialization of every convolution, with the first and the last layer centered on mid-gray.

    Source: He et al. 2015, arXiv:1502.01852.
    """
    _he(labeler)
    _centre(labeler.encoder[0], labeler.decoder[-1])


@torch.no_grad()
def he_codec(codec: Codec) -> None:
    """He's initialization of analysis and synthesis, centered on mid-gray; the hyperprior keeps PyTorch's.

    Without norms, signals must not grow from layer to layer: blocks begin small, and layers that no activation follows
    have no gain for it.

    Source: He et al. 2015, arXiv:1502.01852.
    """
    _he(codec.analysis)
    _he(codec.synthesis)
    if codec.cfg.transforms == "light":
        blocks = [m for m in (*codec.analysis.modules(), *codec.synthesis.modules()) if isinstance(m, LightBlock)]
        activated = [_convolutions(block)[0] for block in blocks]
        for convolution in _convolutions(codec.analysis) + _convolutions(codec.synthesis):
            if not any(convolution is other for other in activated):
                convolution.weight.mul_(0.5**0.5)
        for block in blocks:
            _convolutions(block)[-1].weight.mul_(RESIDUAL)
    last = _convolutions(codec.synthesis)[-1]
    _centre(_convolutions(codec.analysis)[0], last)
    last.weight.mul_(LAST_LAYER)


@torch.no_grad()
def he_label_discriminator(network: LabelDiscriminator) -> None:
    """He's initialization, centered on mid-gray; what is added to something else has no gain for an activation.

    Source: He et al. 2015, arXiv:1502.01852.
    """
    _he(network)
    blocks = [m for m in network.modules() if isinstance(m, DownBlock | UpBlock)]
    added = [*(block.conv2 for block in blocks), *(block.shortcut for block in blocks), *(network.skips or ())]
    for layer in added:
        if isinstance(layer, nn.Conv2d):
            layer.weight.mul_(0.5**0.5)
    for layer in (blocks[0].conv1, blocks[0].shortcut):
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.copy_(-MID_GRAY * layer.weight[:, :3].sum((1, 2, 3)))
    network.head.weight.mul_(LAST_LAYER)


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def _he(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            nn.init.normal_(module.weight, std=(2 / fan_in(module)) ** 0.5)
            nn.init.zeros_(module.bias)


def fan_in(module: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """How many weights meet in an output value; of a transposed convolution on average, since its stride skips some."""
    taps = module.kernel_size[0] * module.kernel_size[1]
    skipped = module.stride[0] * module.stride[1] if isinstance(module, nn.ConvTranspose2d) else 1
    return module.in_channels * taps / skipped


def _centre(first: nn.Module, last: nn.Module) -> None:
    """Makes mid-gray the zero of the first layer, and what the last layer gives for zeros."""
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    assert first.bias is not None
    assert last.bias is not None
    first.bias.copy_(-MID_GRAY * first.weight.sum((1, 2, 3)))
    last.bias.fill_(MID_GRAY)
