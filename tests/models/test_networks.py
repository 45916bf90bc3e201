"""The published sizes, and what each network does with its input."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import discriminator, initial
from pipeline.models.codec import Codec, CodecConfig, Noise
from pipeline.models.discriminator import (
    LabelDiscriminator,
    LabelDiscriminatorConfig,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    build,
)
from pipeline.models.labeler import Labeler, LabelerConfig

SMALL = CodecConfig(channels=(4, 4, 6, 8, 12), latent_channels=8, hyper_channels=6, num_residual_blocks=1)
SMALL_LABELER = LabelerConfig(
    channels=4, channel_multipliers=(1, 1, 2, 2), num_blocks=1, embedding_channels=8, code_dim=4, num_codes=16
)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


SMALL_LIGHT = SMALL.model_copy(update={"transforms": "light", "channels": (4, 8, 12)})


def small_codec(seed: int = 0, cfg: CodecConfig = SMALL) -> Codec:
    torch.manual_seed(seed)
    codec = Codec(cfg)
    codec.update_tables()
    return codec.eval()


def zero_noise(x: torch.Tensor) -> Noise:
    return Noise(
        torch.zeros(len(x), 8, x.shape[2] // 16, x.shape[3] // 16),
        torch.zeros(len(x), 6, x.shape[2] // 64, x.shape[3] // 64),
    )


def test_light_transforms_have_three_widths():
    with pytest.raises(ValueError, match="light transforms have 3 widths, found 5"):
        CodecConfig(transforms="light")
    with pytest.raises(ValueError, match="published transforms have 5 widths, found 3"):
        CodecConfig(channels=(4, 8, 12))


def test_light_transforms_have_the_published_strides_and_ranges():
    codec, x = small_codec(cfg=SMALL_LIGHT), torch.rand(2, 3, 64, 128)
    out = codec(x, zero_noise(x))
    assert out.x_hat.shape == x.shape
    assert out.y_hat.shape == (2, 8, 4, 8)
    # two convolutions per block and level, on both sides, and those between
    assert sum(p.dim() == 4 for p in codec.analysis.parameters()) == 8
    assert sum(p.dim() == 4 for p in codec.synthesis.parameters()) == 10


def test_the_default_codec_has_the_published_size():
    with torch.device("meta"):
        codec = Codec(CodecConfig())
    assert count(codec.analysis) == 7_423_420
    assert count(codec.synthesis) == 156_774_683
    assert count(codec.hyper_analysis) == 5_754_560
    assert count(codec.hyper_synthesis_mean) == count(codec.hyper_synthesis_scale) == 5_754_460
    assert count(codec.hyper_entropy) == 19_520
    assert count(codec) == 181_481_103
    assert len(list(codec.synthesis.parameters())) == 96


def test_the_default_discriminator_and_labeler_have_the_published_size():
    with torch.device("meta"):
        assert count(LabelDiscriminator(LabelDiscriminatorConfig(), 1024, 220)) == 17_877_073
        labeler = Labeler(LabelerConfig())
    assert count(labeler) == 18_116_178
    assert count(labeler.encoder) == 7_443_523
    assert count(labeler.decoder) == 10_660_103


def test_shapes_of_the_published_networks():
    with torch.device("meta"):
        codec = Codec(CodecConfig())
        x = torch.empty(1, 3, 256, 256)
        y = codec.analysis(x)
        assert y.shape == (1, 220, 16, 16)
        assert codec.hyper_analysis(y).shape == (1, 320, 4, 4)
        assert codec.synthesis(y).shape == x.shape
        assert LabelDiscriminator(LabelDiscriminatorConfig(), 1024, 220)(x, y).shape == (1, 1025, 32, 32)


def test_entropy_tables_of_a_fresh_published_codec():
    codec = Codec(CodecConfig(channels=(4, 4, 4, 4, 4), num_residual_blocks=1))
    codec.update_tables()
    assert codec.entropy.quantized_cdf.shape == (64, 3133)
    assert codec.hyper_entropy.quantized_cdf.shape == (320, 23)
    assert codec.entropy.scale_table[0].item() == pytest.approx(0.11)
    assert codec.entropy.scale_table[-1].item() == pytest.approx(256)
    assert codec.hyper_entropy.target.tolist() == pytest.approx([-21.4164, 0, 21.4164], abs=1e-3)


def test_the_decoder_gets_rounded_latents_with_a_straight_gradient():
    codec, x = small_codec(), torch.rand(2, 3, 64, 128)
    out = codec(x, zero_noise(x))
    y_hat, _ = codec.encode(x)
    means, _ = codec.means_and_scales(codec.hyper_analysis(codec.analysis(x)))
    offsets = out.y_hat - means
    assert torch.allclose(offsets, offsets.round(), atol=1e-5)
    assert out.y_hat.shape == y_hat.shape
    gradient = torch.autograd.grad(out.x_hat.sum(), codec.analysis[0].weight)[0]
    assert gradient.abs().sum() > 0


def test_noise_changes_the_noisy_rate_and_not_the_rounded_latent_rate():
    codec, x = small_codec(), torch.rand(1, 3, 64, 64)
    still = zero_noise(x)
    moved = Noise(still.y + 0.4, still.z)
    a, b = codec(x, still), codec(x, moved)
    assert a.bits.item() != b.bits.item()
    assert a.rounded_bits.item() == b.rounded_bits.item()
    assert not a.rounded_bits.requires_grad


def test_bits_agree_with_compressai_likelihoods():
    codec = small_codec()
    z = torch.randn(2, 6, 1, 2) * 3
    rounded, likelihoods = codec.hyper_entropy(z, training=False)
    assert torch.allclose(codec._hyper_bits(rounded), -likelihoods.log2().sum((1, 2, 3)), rtol=1e-5)
    y, means, scales = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.rand(2, 8, 4, 4)
    rounded, likelihoods = codec.entropy(y, scales, means, training=False)
    assert torch.allclose(codec._latent_bits(rounded, means, scales), -likelihoods.log2().sum((1, 2, 3)), rtol=1e-5)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    codec, x = small_codec(), torch.rand(3, 3, 64, 64)
    together = codec.noise_like(x, [torch.Generator().manual_seed(i) for i in range(3)])
    alone = codec.noise_like(x[2:], [torch.Generator().manual_seed(2)])
    assert torch.equal(together.y[2:], alone.y)
    assert torch.equal(together.z[2:], alone.z)
    assert together.y.min() >= -0.5
    assert together.y.max() < 0.5


def test_sides_that_are_no_multiples_of_64_are_refused():
    with pytest.raises(ValueError, match="multiples of 64"):
        small_codec().encode(torch.rand(1, 3, 200, 300))


def test_the_labeler_picks_the_code_with_the_smallest_angle():
    torch.manual_seed(0)
    labeler = Labeler(SMALL_LABELER)
    z = F.normalize(torch.randn(1, 4, 2, 3), dim=1)
    codes = F.normalize(labeler.codebook, dim=1)
    distances = (z.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1)
    assert torch.equal(labeler.nearest(z), distances.argmin(-1))


def test_labels_have_one_entry_per_eight_by_eight_patch():
    labels = Labeler(SMALL_LABELER).label(torch.rand(2, 3, 64, 128))
    assert labels.shape == (2, 8, 16)
    assert labels.dtype == torch.int64
    assert labels.max() < 16


def test_the_labelers_straight_through_gradient_reaches_the_encoder():
    torch.manual_seed(0)
    labeler = Labeler(SMALL_LABELER)
    out = labeler(torch.rand(1, 3, 64, 64))
    out.x_hat.sum().backward()
    assert labeler.encoder[0].weight.grad.abs().sum() > 0
    assert labeler.codebook.grad is None  # codes learn from the embedding loss alone


def test_the_discriminator_looks_at_its_context():
    torch.manual_seed(0)
    network = LabelDiscriminator(
        LabelDiscriminatorConfig(channels=(4, 4, 4, 4, 4, 4), head_channels=4, context_channels=2), 16, 8
    )
    x, y = torch.rand(1, 3, 64, 64), torch.randn(1, 8, 4, 4)
    assert network(x, y).shape == (1, 17, 8, 8)
    assert not torch.equal(network(x, y), network(x, y + 1))


def test_shortcuts_of_the_discriminator_see_the_activated_input():
    torch.manual_seed(0)
    network = LabelDiscriminator(
        LabelDiscriminatorConfig(channels=(4, 4, 4, 4, 4, 4), head_channels=4, context_channels=2), 16, 8
    )
    block = network.down[1]
    for conv in (block.conv1, block.conv2):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    x = torch.randn(1, 4, 4, 4)
    assert torch.allclose(block(x), F.avg_pool2d(F.leaky_relu(x, 0.2), 2))


def test_high_frequencies_are_an_image_without_its_mean_of_nine_pixels():
    x = torch.zeros(1, 3, 64, 64)
    x[:, 1, 10, 20] = 0.9
    seen = discriminator._seen(x, torch.zeros(1, 8, 4, 4), None, 2.0)
    assert torch.equal(seen[:, :3], x)
    assert seen[0, 4, 9:12, 19:22].flatten().tolist() == pytest.approx([-0.2] * 4 + [1.6] + [-0.2] * 4)
    assert seen[0, 4].sum().item() == pytest.approx(0, abs=1e-5)
    assert not seen[0, 3].any()
    # also at the borders
    level = discriminator._seen(torch.full((1, 3, 64, 64), 0.3), torch.zeros(1, 8, 4, 4), None, 2.0)
    assert level[:, 3:].abs().max() < 1e-6


@pytest.mark.parametrize("skips", [False, True])
def test_skips_bring_a_patch_to_its_label_past_the_narrowest_place(skips):
    cfg = LabelDiscriminatorConfig(
        channels=(4, 4, 4, 4, 4, 5), head_channels=4, context_channels=2, skips=skips, high_pass=1
    )
    network = LabelDiscriminator(cfg, 16, 8)
    initial.he_label_discriminator(network)
    for p in network.down[5].parameters():
        torch.nn.init.zeros_(p)
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    network(x, torch.randn(1, 8, 4, 4))[0, :, 2, 3].sum().backward()
    assert bool(x.grad.any()) == skips
    if skips:
        assert x.grad[0, :, 16:24, 24:32].any()


def test_a_fresh_discriminator_passes_signals_on_and_begins_undecided():
    torch.manual_seed(0)
    cfg = LabelDiscriminatorConfig(
        channels=(32,) * 6, head_channels=32, context_channels=2, skips=True, conditional=False
    )
    network = LabelDiscriminator(cfg, 16, 8)
    initial.he_label_discriminator(network)
    gray, x = torch.full((1, 3, 64, 64), 0.5), torch.rand(4, 3, 64, 64)
    assert network.down[0](gray)[..., 2:-2, 2:-2].abs().max() < 1e-5
    h, scales = x, []
    for block in network.down:
        h = block(h)
        scales.append(h.std().item())
    assert max(scales) / min(scales) < 10
    assert network(x, torch.zeros(4, 8, 4, 4)).std() < 0.5


def test_the_default_patch_discriminator_has_hific_s_layers():
    network = PatchDiscriminator(PatchDiscriminatorConfig(), 220)
    convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    shapes = [(tuple(c.weight.shape), c.stride[0]) for c in convs]
    assert shapes == [
        ((12, 220, 3, 3), 1), ((64, 15, 4, 4), 2), ((128, 64, 4, 4), 2), ((256, 128, 4, 4), 2), ((512, 256, 4, 4), 1),
        ((1, 512, 4, 4), 1),
    ]  # fmt: skip
    assert count(network) == 2_800_797
    assert network(torch.rand(1, 3, 128, 64), torch.randn(1, 220, 8, 4)).shape == (1, 1, 16, 8)


def test_every_weight_of_the_patch_discriminator_has_spectral_norm_one():
    torch.manual_seed(0)
    network = PatchDiscriminator(PatchDiscriminatorConfig(channels=(4, 4, 8, 8), context_channels=2), 8)
    x, y = torch.rand(1, 3, 64, 64), torch.randn(1, 8, 4, 4)
    for _ in range(60):  # one power iteration each
        network(x, y)
    network.eval()
    for conv in (m for m in network.modules() if isinstance(m, torch.nn.Conv2d)):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    assert torch.equal(network(x, y), network(x, y))


def test_the_patch_discriminators_padding_is_tensorflows_same():
    """Two convolutions of 4x4 with stride 1 pad one before and two after, so a dot moves by what that leaves."""
    torch.manual_seed(0)
    network = PatchDiscriminator(PatchDiscriminatorConfig(conditional=False, channels=(2, 2, 2, 2)), 8).eval()
    dot = torch.zeros(1, 2, 9, 9)
    dot[0, :, 4, 4] = 1
    h = network.layers[6:9](dot) - network.layers[6:9](torch.zeros_like(dot))
    rows = h.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    assert rows == [2, 3, 4, 5]  # output i reads inputs i - 1 to i + 2
    strided = torch.zeros(1, 3, 8, 8)
    strided[0, :, 4, 4] = 1
    h = network.layers[0](strided) - network.layers[0](torch.zeros_like(strided))
    assert h.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [1, 2]  # output i reads inputs 2 i - 1 to 2 i + 2


@pytest.mark.parametrize("cfg", [
    LabelDiscriminatorConfig(conditional=False, channels=(4, 4, 4, 4, 4, 4), head_channels=4),
    PatchDiscriminatorConfig(conditional=False, channels=(4, 4, 4, 4)),
], ids=["label", "patch"])  # fmt: skip
def test_unconditional_discriminators_see_the_image_alone(cfg):
    torch.manual_seed(0)
    network = build(cfg, 16, 8).eval()
    x, y = torch.rand(1, 3, 64, 64), torch.randn(1, 8, 4, 4)
    assert torch.equal(network(x, y), network(x, y + 1))
    assert not torch.equal(network(x, y), network(1 - x, y))


def test_what_discriminators_believe():
    label = build(LabelDiscriminatorConfig(channels=(4, 4, 4, 4, 4, 4), head_channels=4, context_channels=2), 2, 8)
    logits = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [0, 0, 5]]).T.reshape(1, 3, 2, 2)  # fake, label 0, 1, 1
    labels = torch.tensor([[[0, 0], [1, 0]]])
    assert label.fooling_rate(logits, labels).tolist() == [0.5]
    assert label.fake_rate(logits).item() == 0.25
    patch = build(PatchDiscriminatorConfig(channels=(4, 4, 4, 4), context_channels=2), 0, 8)
    logits = torch.tensor([1.0, 2.0, 3.0, -1.0]).view(1, 1, 2, 2)
    assert patch.fooling_rate(logits, labels).tolist() == [0.75]
    assert patch.fake_rate(logits).item() == 0.25


def test_halving_is_average_pooling_bit_for_bit_and_so_is_its_gradient():
    x = torch.randn(2, 5, 8, 6).to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(2, 5, 4, 3)
    for bits in (x, x.detach().bfloat16().requires_grad_()):
        ours, theirs = discriminator._Halved.apply(bits), torch.nn.functional.avg_pool2d(bits, 2)
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        gradients = [torch.autograd.grad((y * weights).sum(), bits)[0] for y in (ours, theirs)]
        assert torch.equal(*gradients)
