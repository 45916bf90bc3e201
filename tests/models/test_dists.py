"""DISTS against the package that has its weights, and as a distance."""

import sys

import pytest
import torch
import torchvision
from DISTS_pytorch import DISTS

from pipeline.errors import ArtifactError
from pipeline.models import vgg16
from pipeline.models.vgg16 import Dists


@pytest.fixture(scope="module")
def both():
    """Ours and the package's with the same random convolutions."""
    torch.manual_seed(0)
    ours = Dists(None)
    trunk = torch.nn.Sequential(*(layer for stage in ours.stages for layer in stage))
    # the package's has a pooling layer where a stage ends
    layers = iter(trunk)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for number in range(30):
        if not isinstance(features[number], torch.nn.MaxPool2d):
            features[number] = next(layers)
    with pytest.MonkeyPatch.context() as patched:
        made = type("Made", (), {"features": features})
        patched.setattr("DISTS_pytorch.DISTS_pt.models.vgg16", lambda pretrained: made)
        theirs = DISTS(load_weights=False)
    alpha, beta = vgg16.dists_weights()
    theirs.alpha.data, theirs.beta.data = alpha, beta
    return ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(64, 96), (77, 53)])
def test_dists_is_the_packages(both, height, width):
    ours, theirs = both
    torch.manual_seed(1)
    x, y = torch.rand(2, 3, height, width), torch.rand(2, 3, height, width)
    assert ours(x, y) == pytest.approx(theirs(x, y).detach(), abs=2e-5)
    assert ours(x, y).min() > 0.01
    assert ours(x, x).abs().max() < 1e-5


def test_another_file_of_weights_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "DISTS_pytorch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.pt").write_bytes(b"others")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "DISTS_pytorch")
    vgg16.dists_weights.cache_clear()
    with pytest.raises(ArtifactError, match="not the file of DISTS"):
        vgg16.dists_weights()
