"""Outputs of small networks with weights from a formula: they change when a layer, a padding, a norm or a slope does.

The numbers were taken when tests/system/test_parity.py found the same layers equal to the authors' implementation.
"""

import pytest
import torch

from pipeline.models.codec import Codec
from pipeline.models.discriminator import (
    LabelDiscriminator,
    LabelDiscriminatorConfig,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
)
from pipeline.models.labeler import Labeler
from tests.models.test_networks import SMALL, SMALL_LABELER


def waves(shape: tuple[int, ...], phase: float) -> torch.Tensor:
    """Values in [-1, 1] that look irregular and are the same on every machine."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * n * 0.37 + n * 1.3 + phase).reshape(shape)


@torch.no_grad()
def fill(module: torch.nn.Module) -> torch.nn.Module:
    for number, (name, p) in enumerate(module.named_parameters()):
        values = waves(tuple(p.shape), number)
        if name.endswith("scale"):
            values = 1 + 0.3 * values
        elif p.dim() > 1:
            values = values * 1.7 / p[0].numel() ** 0.5
        p.copy_(values if not name.endswith(("bias", "shift")) else 0.2 * values)
    return module.double().eval()


@torch.no_grad()
def fingerprint(network: str) -> list[float]:
    x, y = (waves((2, 3, 64, 128), 0.5) + 1) / 2, 2 * waves((2, 8, 4, 8), 0.7)
    codec = fill(Codec(SMALL)) if network in ("analysis", "synthesis", "hyper") else None
    if network == "analysis":
        out = codec.analysis(x)
    elif network == "synthesis":
        out = codec.synthesis(y)
    elif network == "hyper":
        z = codec.hyper_analysis(y)
        out = torch.cat([codec.hyper_synthesis_mean(z), 3 * codec.hyper_synthesis_scale(z)])
    elif network in ("labeler encoder", "labeler decoder"):
        labeler = fill(Labeler(SMALL_LABELER))
        out = (
            labeler.to_code(labeler.encoder(x))
            if "encoder" in network
            else labeler.decoder(labeler.from_code(y[:, :4]))
        )
    elif network == "label discriminator":
        cfg = LabelDiscriminatorConfig(channels=(4, 6, 6, 8, 8, 10), head_channels=5, context_channels=2)
        out = fill(LabelDiscriminator(cfg, 6, 8))(x, y)
    else:
        cfg = PatchDiscriminatorConfig(channels=(4, 6, 6, 8), context_channels=2)
        patch = fill(PatchDiscriminator(cfg, 8)).train()
        for _ in range(200):  # the spectral norms converge
            patch(x[:, :, :64, :64], y[:, :, :4, :4])
        out = patch.eval()(x, y)
    flat = out.flatten()
    return [out.mean().item(), out.std().item(), flat[0].item(), flat[-1].item(), flat[len(flat) // 3].item()]


EXPECTED = {
    # name: [mean, standard deviation, first, last, and one value in between]
    "analysis": [0.00538195435, 0.94016815, 0.843412299, -0.419755571, 0.53733612],
    "synthesis": [0.290742116, 0.624671914, 0.582327274, 0.379498443, 0.38298131],
    "hyper": [-0.1695747, 0.353187095, 0.014940336, -0.814830341, 0.0577034625],
    "labeler encoder": [-0.0132673549, 0.865958637, -0.387299463, 0.938527706, -0.474066147],
    "labeler decoder": [-0.0328111644, 0.698594141, 0.11031783, -0.325375101, -0.255719992],
    "label discriminator": [0.237671429, 1.57475003, -0.991035834, -0.52207351, 3.41913824],
    "patch discriminator": [-0.0516379458, 0.0476803816, -0.0710989488, -0.0405693941, -0.077302315],
}


@pytest.mark.parametrize("network", EXPECTED)
def test_the_layers_are_what_they_were(network):
    tolerance = 1e-3 if network == "patch discriminator" else 1e-6  # its norms are estimated
    assert fingerprint(network) == pytest.approx(EXPECTED[network], rel=tolerance, abs=tolerance)
