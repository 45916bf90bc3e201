import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.data.transforms import to_float
from pipeline.models import initial
from pipeline.models.codec import Codec, CodecConfig
from tests.conftest import picture
from tests.models.test_networks import zero_noise

NARROW = CodecConfig(channels=(8, 12, 16, 24, 32), latent_channels=8, hyper_channels=6, num_residual_blocks=1)
LIGHT = CodecConfig(
    transforms="light", channels=(16, 24, 32), latent_channels=8, hyper_channels=6, num_residual_blocks=1
)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(3, 8, 7, padding=3), 147),
        (nn.Conv2d(5, 8, 3, stride=2, padding=1), 45),  # a stride leaves outputs out, and no taps
        (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1), 9),  # 1, 2, 2 and 4 taps of 4 channels
        (nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1), 16),
    ],
)
def test_fan_in_is_the_number_of_weights_that_meet_in_an_output(layer, expected):
    assert initial.fan_in(layer) == expected
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    met = layer(torch.ones(1, layer.in_channels, 32, 32))[..., 4:-4, 4:-4]  # away from the borders
    assert met.mean().item() == pytest.approx(expected)


@pytest.mark.parametrize(("cfg", "first", "scale"), [(NARROW, 1, 3), (LIGHT, 2, 1)])
def test_mid_grey_is_the_middle_of_a_fresh_codec(cfg, first, scale):
    torch.manual_seed(0)
    codec = Codec(cfg)
    initial.he_codec(codec)
    seen = torch.full((1, 3, 64, 64), 0.5)
    for layer in list(codec.analysis)[:first]:
        seen = layer(seen)
    assert seen[..., 3:-3, 3:-3].abs().max() < 1e-5
    first_image = codec.synthesis(torch.randn(1, 8, 4, 4) * scale)
    assert first_image.mean().item() == pytest.approx(0.5, abs=0.1)
    assert first_image.std() < 0.2


def test_pytorchs_weights_of_the_hyperprior_are_kept():
    torch.manual_seed(0)
    fresh = {name: p.clone() for name, p in Codec(NARROW).named_parameters()}
    torch.manual_seed(0)
    codec = Codec(NARROW)
    initial.he_codec(codec)
    changed = {name.split(".")[0] for name, p in codec.named_parameters() if not torch.equal(p, fresh[name])}
    assert changed == {"analysis", "synthesis"}


def test_a_codec_learns_sooner_than_from_pytorchs_weights():
    x = torch.cat([to_float(picture(seed, 64, 64)[None]) for seed in range(4)])
    errors = {}
    for init in ("he", "pytorch"):
        torch.manual_seed(0)
        codec = Codec(NARROW)
        if init == "he":
            initial.he_codec(codec)
        optimizer = torch.optim.Adam(codec.parameters(), lr=2e-3)
        for _ in range(40):
            loss = F.mse_loss(codec(x, zero_noise(x)).x_hat, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[init] = loss.item()
    assert errors["he"] < errors["pytorch"] / 1.5
