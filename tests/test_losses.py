import math

import pytest
import torch

from pipeline import losses
from pipeline.models.codec import num_bits


def one_hot_logits(classes: torch.Tensor, num_classes: int = 4, height: float = 50.0) -> torch.Tensor:
    return height * torch.nn.functional.one_hot(classes, num_classes).permute(0, 3, 1, 2).float()


def test_num_bits_is_the_code_length_per_image():
    likelihoods = torch.tensor([[[0.5, 0.25]], [[1.0, 0.125]]])
    assert num_bits(likelihoods).tolist() == [3.0, 3.0]


def test_each_image_pays_by_its_own_rounded_rate():
    bpp, rounded = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.6, 0.9])
    loss = losses.target_rate_loss(bpp, rounded, losses.RateTerm(target_bpp=0.6, weight=2.0))
    # the second is exactly at its target: not above it
    assert loss.item() == pytest.approx((0.0625 * 1 + 0.0625 * 2 + 2 * 4) / 3)


def test_the_rate_loss_passes_gradient_to_the_noisy_rate_only():
    bpp, rounded = torch.tensor([1.0, 1.0], requires_grad=True), torch.tensor([0.1, 0.9])
    losses.target_rate_loss(bpp, rounded, losses.RateTerm(0.5, 3.0)).backward()
    assert bpp.grad.tolist() == [0.03125, 1.5]


@pytest.mark.parametrize(("step", "target", "weight"), [(0, 0.20006, 1.0), (24_999, 0.20006, 1.0), (25_000, 0.14, 2.0)])
def test_rate_schedule_raises_the_target_and_halves_the_weight_during_warmup(step, target, weight):
    assert losses.rate_schedule(0.14, 2.0, step, 25_000) == pytest.approx((target, weight))


@pytest.mark.parametrize(("target", "weight"), [(0.00875, 32), (0.07, 4), (0.14, 2), (0.3, 1), (0.9, 0.25), (0.1, 2.8)])
def test_published_rate_weights(target, weight):
    assert losses.published_rate_weight(target) == pytest.approx(weight)


def test_psnr_of_a_hundredth_is_twenty_decibels():
    x = torch.zeros(1, 3, 2, 2)
    assert losses.psnr_db(losses.mse(x + 0.1, x)).item() == pytest.approx(20.0, abs=1e-4)


def test_discriminator_loss_listens_to_both_sides():
    labels = torch.tensor([[[0, 1], [2, 0]]])
    right, fake = one_hot_logits(labels + 1), one_hot_logits(torch.zeros_like(labels))
    assert losses.real_loss(right, labels) + losses.fake_loss(fake) < 1e-6
    assert losses.real_loss(right, labels) + losses.fake_loss(right) > 10  # fooled by the fakes
    assert losses.real_loss(fake, labels) + losses.fake_loss(fake) > 10  # calls real images fake


def test_discriminator_loss_is_the_mean_of_its_two_halves():
    labels = torch.tensor([[[1]]])
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1, 1)
    total = math.log(sum(math.exp(i) for i in range(4)))
    assert (losses.real_loss(logits, labels) + losses.fake_loss(logits)).item() == pytest.approx(
        (total - 2 + total - 0) / 2
    )


def test_generator_loss_wants_the_label_of_the_original():
    labels = torch.tensor([[[0, 1], [2, 0]]])
    assert losses.generator_loss(one_hot_logits(labels + 1), labels) < 1e-6
    assert losses.generator_loss(one_hot_logits(labels), labels) > 10  # off by the shift for "fake"
    uniform = torch.zeros(1, 1025, 2, 2)
    assert losses.generator_loss(uniform, labels).item() == pytest.approx(math.log(1025))  # 6.93 at the start


def test_a_label_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch size"):
        losses.generator_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64))


def test_vq_loss_pulls_each_side_alone():
    z = torch.tensor([[[[1.0]], [[0.0]]]], requires_grad=True)
    codes = torch.tensor([[[[0.0]], [[1.0]]]], requires_grad=True)
    commitment, embedding = losses.vq_loss(z, codes)
    assert commitment.item() == embedding.item() == 1.0
    commitment.backward()
    assert z.grad.flatten().tolist() == [1.0, -1.0]
    assert codes.grad is None
    embedding.backward()
    assert codes.grad.flatten().tolist() == [-1.0, 1.0]


def test_perplexity_counts_evenly_used_codes():
    assert losses.perplexity(torch.tensor([5, 5, 5, 5, 0, 0])).item() == pytest.approx(4.0)
    assert losses.perplexity(torch.tensor([9, 0, 0])).item() == pytest.approx(1.0)


def test_patch_losses_are_binary_cross_entropies():
    zero, high = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)
    assert losses.patch_generator_loss(zero).item() == pytest.approx(math.log(2))
    assert losses.patch_generator_loss(high).item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert (losses.patch_real_loss(zero) + losses.patch_fake_loss(zero)).item() == pytest.approx(
        2 * math.log(2)
    )  # the sum of both sides
    right = (losses.patch_real_loss(high) + losses.patch_fake_loss(-high)).item()
    assert right == pytest.approx(2 * math.log(1 + math.exp(-3)))
    assert (losses.patch_real_loss(high) + losses.patch_fake_loss(high)).item() == pytest.approx(
        right / 2 + math.log(1 + math.exp(3))
    )
    assert (losses.patch_real_loss(-high) + losses.patch_fake_loss(-high)).item() == pytest.approx(
        right / 2 + math.log(1 + math.exp(3))
    )


def test_cross_entropy_over_rows_is_that_over_maps():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 17, 5, 4, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 16, (3, 5, 4), generator=generator)
    entropy = torch.nn.functional.cross_entropy
    fake = torch.zeros_like(labels)
    for ours, maps in (
        (lambda x: losses.generator_loss(x, labels), lambda x: entropy(x, labels + 1)),
        (lambda x: losses.real_loss(x, labels), lambda x: entropy(x, labels + 1) / 2),
        (losses.fake_loss, lambda x: entropy(x, fake) / 2),
    ):
        values, gradients = [], []
        for loss in (ours, maps):
            x = logits.clone().requires_grad_()
            values.append(loss(x))
            gradients.append(torch.autograd.grad(values[-1], x)[0])
        torch.testing.assert_close(*values, rtol=1e-6, atol=0)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
