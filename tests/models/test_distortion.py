import dataclasses
import hashlib

import lpips
import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import ArtifactError
from pipeline.models import distortion, pretrained
from pipeline.models.distortion import Distortion, DistortionConfig
from pipeline.models.lpips import Lpips, _unit, load_lpips
from pipeline.training.runtime import step_seed


def test_lpips_equals_the_library_on_ordinary_images():
    torch.manual_seed(0)
    ours = Lpips(None)
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    assert torch.allclose(ours(x, y), ours.net(x, y, normalize=True).flatten(), rtol=1e-3)
    assert ours(x, x).abs().max() < 1e-7
    assert lpips.__name__ == "lpips"


def test_the_gradient_stays_finite_where_all_features_are_zero():
    model = Lpips(None)
    with torch.no_grad():
        for parameter in model.net.net.parameters():
            parameter.zero_()
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    distance = model(x, torch.rand(1, 3, 64, 64))
    assert distance.item() == 0
    distance.sum().backward()
    assert torch.isfinite(x.grad).all()
    features = torch.zeros(1, 5, 2, 2, requires_grad=True)
    _unit(features).sum().backward()
    assert features.grad.flatten().tolist() == pytest.approx([1 / (5 * 1e-8) ** 0.5] * 20)  # steep, and finite


def test_weights_with_another_digest_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert pretrained.find("alexnet") is None
    path = pretrained.folder() / pretrained.FILES["alexnet"].file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not these")
    with pytest.raises(ArtifactError, match="does not start with 7be5be79"):
        load_lpips()


@pytest.mark.slow
def test_weights_with_the_right_digest_are_loaded_into_the_right_layers(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(1)
    alexnet = torchvision.models.alexnet()
    pretrained.folder().mkdir(parents=True)
    content = pretrained.folder() / "made.pth"
    torch.save(alexnet.state_dict(), content)
    digest = hashlib.sha256(content.read_bytes()).hexdigest()[:8]
    made = pretrained.WeightsFile(f"alexnet-owt-{digest}.pth", "https://example.invalid", "LPIPS")
    content.rename(pretrained.folder() / made.file)
    monkeypatch.setitem(pretrained.FILES, "alexnet", made)
    model = load_lpips()
    x = torch.rand(1, 3, 64, 64)
    assert torch.allclose(model.net.net(x).relu1, alexnet.features[:2](x))
    assert torch.allclose(model.net.net(x).relu5, alexnet.features[:12](x))
    assert DistortionConfig().lpips_state() == made.file


@pytest.mark.slow
def test_convolutions_alone_are_enough_if_their_numbers_are_the_right_ones(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(2)
    alexnet = torchvision.models.alexnet()
    layers = [f"features.{i}.{part}" for i in (0, 3, 6, 8, 10) for part in ("weight", "bias")]
    digest = hashlib.sha256(b"".join(alexnet.state_dict()[name].numpy().tobytes() for name in layers)).hexdigest()
    pretrained.folder().mkdir(parents=True)
    path = pretrained.folder() / "alexnet_features.safetensors"
    save_file({name: alexnet.state_dict()[name].clone() for name in reversed(layers)}, path)
    with pytest.raises(ArtifactError, match=f"convolutions is {digest}, expected 2b566cc3"):
        pretrained.find("alexnet")
    made = dataclasses.replace(pretrained.FILES["alexnet"], features_sha256=digest)
    monkeypatch.setitem(pretrained.FILES, "alexnet", made)
    x = torch.rand(1, 3, 64, 64)
    assert torch.allclose(load_lpips().net.net(x).relu5, alexnet.features[:12](x))
    # the same numbers as the whole file's, so the same LPIPS
    assert DistortionConfig().lpips_state() == made.file
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be used"):
        pretrained.find("alexnet")
    save_file({name.removeprefix("features."): alexnet.state_dict()[name].clone() for name in layers}, path)
    with pytest.raises(ArtifactError, match=r"expected features.N.weight"):
        pretrained.find("alexnet")


def test_missing_weights_stop_or_are_announced(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ArtifactError, match="illm fetch-weights"):
        DistortionConfig().lpips_state()
    assert DistortionConfig(if_lpips_missing="skip").lpips_state() == "absent"
    assert DistortionConfig(lpips=0).lpips_state() == "off"


def test_distortion_weighs_the_squared_error():
    total, parts = Distortion(DistortionConfig(mse=150, lpips=0))(
        torch.full((1, 3, 8, 8), 0.1), torch.zeros(1, 3, 8, 8)
    )
    assert total.item() == pytest.approx(1.5)
    assert parts["psnr_db"].item() == pytest.approx(20.0, abs=1e-4)


def test_distortion_adds_weighted_lpips(monkeypatch):
    torch.manual_seed(0)
    model = Lpips(None)
    monkeypatch.setattr(distortion, "load_lpips", lambda: model)
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    total, parts = Distortion(DistortionConfig(mse=10, lpips=3))(x, y)
    assert total.item() == pytest.approx(10 * (x - y).square().mean().item() + 3 * model(x, y).mean().item(), rel=1e-5)
    assert parts["lpips"].item() == pytest.approx(model(x, y).mean().item(), rel=1e-5)


def test_lpips_sees_both_images_shifted_alike_by_every_number_of_pixels():
    x = torch.arange(2 * 3 * 20 * 24, dtype=torch.float32).reshape(2, 3, 20, 24)
    seen, state = set(), torch.get_rng_state()
    for step in range(200):
        a, b = distortion._shifted(3, step_seed(0, step), x, -x)
        assert a.shape == (2, 3, 17, 21)
        assert torch.equal(a, -b)
        seen.add((int(a[0, 0, 0, 0]) // 24, int(a[0, 0, 0, 0]) % 24))
    assert seen == {(top, left) for top in range(4) for left in range(4)}
    # The seed alone decides, and nothing else draws other numbers
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shifted_lpips_is_that_of_the_cropped_images_and_squared_error_sees_all(monkeypatch):
    torch.manual_seed(0)
    model = Lpips(None)
    monkeypatch.setattr(distortion, "load_lpips", lambda: model)
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    loss = Distortion(DistortionConfig(mse=10, lpips=3, lpips_shift=2))
    parts = [loss(x, y, seed) for seed in range(40)]
    for total, part in parts:
        expected = 10 * (x - y).square().mean().item() + 3 * part["lpips"].item()
        assert total.item() == pytest.approx(expected, rel=1e-5)
    cropped = [
        model(x[..., i : i + 62, j : j + 62], y[..., i : i + 62, j : j + 62]).mean() for i in range(3) for j in range(3)
    ]
    found = {min(range(9), key=lambda n: abs(cropped[n] - part["lpips"])) for _, part in parts}
    assert len(found) > 5
    assert all(min(abs(one - part["lpips"]) for one in cropped) < 1e-6 for _, part in parts)


def test_without_a_shift_images_are_whole():
    a = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert distortion._shifted(0, 5, a, a) == (a, a)
