"""The same numbers as the authors' implementation, with shared random weights. docs/parity.md tells what was compared.

Needs `neuralcompression` (requirements/parity.txt). Its widths are fixed, so these networks have the published ones,
with two residual blocks instead of nine.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import losses
from pipeline.bitstream import version1
from pipeline.bitstream.container import Packet
from pipeline.bitstream.latents import to_symbols
from pipeline.evaluation import metrics
from pipeline.models import reference_keys
from pipeline.models.codec import Codec, CodecConfig, Noise
from pipeline.models.discriminator import LabelDiscriminator, LabelDiscriminatorConfig
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.models.layers import ChannelNorm
from pipeline.models.lpips import Lpips
from tests.conftest import picture

pytestmark = pytest.mark.parity
pytest.importorskip("neuralcompression.models", reason="needs requirements/parity.txt: the authors' implementation")

import neuralcompression.functional as their_functional  # noqa: E402
from neuralcompression import loss_fn as their_losses  # noqa: E402
from neuralcompression import models as their_models  # noqa: E402
from neuralcompression.zoo import vqvae_xcit_p8_ch64_cb1024_h8  # noqa: E402

CODEC = CodecConfig(num_residual_blocks=2)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Largest difference against the largest value."""
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def disturb(module: torch.nn.Module) -> None:
    """Random norms and biases too: fresh ones are ones and zeros and would hide a mistake."""
    for name, p in module.named_parameters():
        if name.endswith(("gamma", "beta", "bias")):
            torch.nn.init.normal_(p, mean=1.0 if name.endswith("gamma") else 0.0, std=0.1)


def smooth(module: torch.nn.Module) -> torch.nn.Module:
    """Every ReLU replaced by a function without a kink, beside which the smallest difference changes a gradient."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(part, name, torch.nn.SiLU())
            if isinstance(child, ChannelNorm) and child.activation == "relu":
                child.activation = "silu"
    return module


@pytest.fixture(scope="module")
def codecs():
    torch.manual_seed(0)
    theirs = their_models.HiFiCAutoencoder(num_residual_blocks=2)
    disturb(theirs)
    with torch.no_grad():  # spread the latents over many integers, as after training
        theirs.encoder.blocks[5].weight.mul_(20)
        theirs.hyper_analysis[4].weight.mul_(30)
        theirs.hyper_synthesis_scale[4].bias.add_(2)
    ours = Codec(CODEC)
    ours.load_state_dict(reference_keys.import_state(theirs.state_dict(), CODEC).state)
    return ours, theirs


@pytest.fixture
def images():
    x = torch.from_numpy(np.stack([picture(i, 64, 128) for i in (1, 2)])).permute(0, 3, 1, 2) / 255
    return x.contiguous()  # the order in which CompressAI fills noise follows the memory layout


def num_bits(*likelihoods: torch.Tensor) -> torch.Tensor:
    return sum(-p.log2().flatten(1).sum(1) for p in likelihoods)


def test_the_codec_in_eval_mode(codecs, images):
    ours, theirs = codecs
    theirs.eval()
    with torch.no_grad():
        expected = theirs(images)
        y_hat, bits = ours.encode(images)
        x_hat = ours.synthesis(y_hat)
    assert y_hat.round().unique().numel() > 5
    assert close(y_hat, expected.latent)
    assert close(x_hat, expected.image)
    assert close(bits, num_bits(expected.latent_likelihoods, expected.hyper_latent_likelihoods))


def test_the_codec_in_train_mode_with_its_gradients(codecs, images):
    ours, theirs = (smooth(copy.deepcopy(codec)) for codec in codecs)
    theirs.train()
    torch.manual_seed(1)
    expected = theirs(images)
    torch.manual_seed(1)  # the same draws: z as CompressAI lays it out (channels first), then y
    z = torch.empty(320, 1, 2 * 1 * 2).uniform_(-0.5, 0.5).reshape(320, 2, 1, 2).transpose(0, 1)
    y = torch.empty(2, 220, 4, 8).uniform_(-0.5, 0.5)
    out = ours(images, Noise(y, z))
    assert close(out.y_hat, expected.latent)
    assert close(out.x_hat, expected.image)
    bits = num_bits(expected.latent_likelihoods, expected.hyper_latent_likelihoods)
    assert close(out.bits, bits)
    # The rounded rate of y is theirs; that of z differs on purpose: they round the noisy z.
    rounded_z = ours._hyper_bits((ours.hyper_analysis(ours.analysis(images)) - ours.medians()).round() + ours.medians())
    assert close(out.rounded_bits - rounded_z, num_bits(expected.quantized_latent_likelihoods))

    (150 * F.mse_loss(out.x_hat, images) + out.bits.mean() / 8192).backward()
    (150 * F.mse_loss(expected.image, images) + bits.mean() / 8192).backward()
    names = reference_keys.names(CODEC)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, p in ours.named_parameters():
        gradient = their_gradients[names[name]]
        if gradient is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert close(p.grad, gradient.reshape(p.shape), 1e-4), name
            compared += 1
    assert compared == sum(1 for _ in ours.parameters()) - 1  # all but the quantiles


def test_the_hyper_path(codecs, images):
    ours, theirs = codecs
    theirs.eval()
    with torch.no_grad():
        y = theirs.encoder(images)
        z = theirs.hyper_analysis(y)
        assert close(ours.hyper_analysis(ours.analysis(images)), z)
        means, scales = ours.means_and_scales(z)
        assert close(means, theirs.hyper_synthesis_mean(z))
        assert close(scales, theirs.hyper_synthesis_scale(z))


def test_their_entropy_coded_bytes_and_the_quantile_loss(codecs):
    ours, theirs = codecs
    theirs.eval()
    x = torch.from_numpy(picture(3, 70, 100)).permute(2, 0, 1)[None] / 255
    theirs.update_tensor_devices("compress")
    ours.update_tables()
    for name in ("_quantized_cdf", "_offset", "_cdf_length"):
        assert torch.equal(getattr(ours.entropy, name), getattr(theirs.latent_bottleneck, name))
        assert torch.equal(getattr(ours.hyper_entropy, name), getattr(theirs.hyper_bottleneck, name))
    with torch.no_grad():
        packet = theirs.compress(x)
        assert packet.padded_size == (128, 128)
        # The networks are compared above. Here they are the same ones, since the smallest difference may round a latent the
        # other way, and what is compared is what becomes of their output.
        same = copy.deepcopy(ours)
        same.analysis, same.hyper_analysis = theirs.encoder, theirs.hyper_analysis
        same.hyper_synthesis_mean, same.hyper_synthesis_scale = (
            theirs.hyper_synthesis_mean,
            theirs.hyper_synthesis_scale,
        )
        streams = packet.hyper_latent_strings[0], packet.latent_strings[0]
        symbols = version1.decode(same, Packet(1, same.version_1_id(), 70, 100, streams))
        # they pad by reflection
        y = theirs.encoder(F.pad(x, (0, 28, 0, 58), mode="reflect"))
        assert torch.equal(symbols.z, to_symbols(theirs.hyper_analysis(y) - same.medians()))
        means = theirs.hyper_synthesis_mean(symbols.z + same.medians())
        assert torch.equal(symbols.y, to_symbols(y - means))
        x_hat = ours.synthesis(symbols.y + means)[..., :70, :100].clamp(0, 1)
        expected = theirs.decompress(packet)
    assert close(x_hat, expected)
    assert ours.hyper_entropy.loss().item() == pytest.approx(theirs.hyper_bottleneck.loss().item(), rel=1e-6)
    theirs.update_tensor_devices("forward")


def test_the_labeler_its_labels_and_its_losses(images):
    torch.manual_seed(0)
    theirs = vqvae_xcit_p8_ch64_cb1024_h8()
    disturb(theirs)
    torch.nn.init.normal_(theirs.bottleneck_op.child.child.codebooks[0])
    ours = Labeler(LabelerConfig())
    ours.load_state_dict(reference_keys.import_state(theirs.state_dict(), LabelerConfig()).state)
    expected = theirs.train()(images)
    out = ours(images)
    assert close(out.x_hat, expected.image)
    vq = losses.vq_loss(out.z, out.codes)
    assert vq.commitment.item() == pytest.approx(expected.commitment_loss.item(), rel=1e-4)
    assert vq.embedding.item() == pytest.approx(expected.embedding_loss.item(), rel=1e-4)
    labels = their_models.VqVaeProjector(theirs)(images)
    assert labels.unique().numel() > 20
    assert torch.equal(ours.label(images).flatten(), labels)


def discriminators(conditional: bool):
    torch.manual_seed(0)
    if conditional:
        theirs = their_models.ConditionalUnetDiscriminator(1025, 8, 220)
        unet, ours = "_unet.model", LabelDiscriminator(LabelDiscriminatorConfig(), 1024, 220)
    else:
        theirs = their_models.UnetDiscriminator(1025, 8)
        unet, ours = "model", LabelDiscriminator(LabelDiscriminatorConfig(conditional=False), 1024, 220)
    their_state, state = theirs.state_dict(), {}
    for name in ours.state_dict():
        network, rest = name.split(".", 1)
        if network == "down":
            level, part, leaf = rest.split(".")
            their_part = {"conv1": "left_block.2", "conv2": "left_block.5", "shortcut": "left_shortcut.0"}[part]
            their = f"{unet}.0{'.child' * int(level)}.{their_part}.{leaf}"
        elif network == "up":
            level, part, leaf = rest.split(".")
            their_part = {"conv1": "right_block.3", "conv2": "right_block.6", "shortcut": "right_shortcut.0"}[part]
            their = f"{unet}.0{'.child' * (5 - int(level))}.{their_part}.{leaf}"
        else:
            their = {"head": f"{unet}.1", "context": "input_sequence.0"}[network] + f".{rest}"
        state[name] = their_state.pop(their)
    assert not their_state
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("conditional", [True, False])
def test_the_discriminator_with_its_in_place_activations(images, conditional):
    ours, theirs = discriminators(conditional)
    y = torch.randn(2, 220, 4, 8)
    expected = theirs(images, y) if conditional else theirs(images)
    x = images.clone().requires_grad_(True)
    logits = ours(x, y)
    assert logits.shape == (2, 1025, 8, 16)
    assert close(logits, expected)
    labels = torch.randint(1024, (2, 8, 16))
    (ours_gradient,) = torch.autograd.grad(losses.generator_loss(logits, labels), [x])
    x2 = images.clone().requires_grad_(True)
    theirs_loss = their_losses.OASISGeneratorLoss()(theirs(x2, y) if conditional else theirs(x2), labels.flatten(1))
    (their_gradient,) = torch.autograd.grad(theirs_loss, [x2])
    assert close(ours_gradient, their_gradient)


def test_the_adversarial_losses():
    torch.manual_seed(0)
    real, fake, labels = torch.randn(2, 1025, 4, 5), torch.randn(2, 1025, 4, 5), torch.randint(1024, (2, 4, 5))
    expected = their_losses.OASISDiscriminatorLoss()(real, fake, labels.flatten(1))
    assert (losses.real_loss(real, labels) + losses.fake_loss(fake)).item() == pytest.approx(expected.item(), rel=1e-6)
    expected = their_losses.OASISGeneratorLoss()(fake, labels.flatten(1))
    assert losses.generator_loss(fake, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    real, fake = real[:, :1], fake[:, :1]
    one = torch.tensor(1.0)
    # Theirs is the mean of both halves, HiFiC's and ours their sum.
    expected = 2 * their_losses.BinaryCrossentropyDiscriminatorLoss()(real, fake, one)
    assert (losses.patch_real_loss(real) + losses.patch_fake_loss(fake)).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    expected = their_losses.BinaryCrossentropyGeneratorLoss()(fake, one)
    assert losses.patch_generator_loss(fake).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_distortion(images):
    theirs = their_losses.NormFixLPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    ours = Lpips(None)
    ours.net.load_state_dict(theirs.state_dict())
    x_hat = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    x_hat[0, :, :40] = 0  # features that are all zero
    expected = theirs(x_hat, images, normalize=True).flatten()
    assert close(ours(x_hat, images), expected)
    assert losses.mse(x_hat, images).item() == pytest.approx(their_losses.MSELoss(150.0)(x_hat, images).item() / 150)


def test_the_published_metrics():
    x, y = picture(1, 181, 200), np.clip(picture(1, 181, 200).astype(int) + np.arange(200)[:, None] % 9, 0, 255)
    y = y.astype(np.uint8)
    as_tensor = lambda p: torch.from_numpy(p).permute(2, 0, 1)[None].double()
    expected = their_functional.multiscale_structural_similarity(as_tensor(y), as_tensor(x), data_range=255.0)
    assert metrics.ms_ssim(y, x) == pytest.approx(expected.item(), abs=1e-9)
