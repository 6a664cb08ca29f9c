"""Step 3: interface, the loss against torch.distributions and by hand."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.distributions import kl_divergence as kl_of

import hw2_step3_main as step3
from models.VAE import VAE_model, kl_divergence, reconstruction_loss


def test_architecture_and_shapes():
    model = VAE_model(784, [256, 128, 64, 4])
    widths = [
        (layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)
    ]
    assert widths == [(784, 256), (256, 128), (128, 64), (64, 4), (2, 64), (64, 128), (128, 256), (256, 784)]
    assert model.z_size == 2 and isinstance(model.decoder[-1], nn.Sigmoid)
    outputs = model(torch.rand(3, 1, 28, 28))
    assert set(outputs) == {"imgs", "z", "mean", "logvar"}
    assert outputs["imgs"].shape == (3, 784) and 0 <= outputs["imgs"].min() and outputs["imgs"].max() <= 1
    assert all(outputs[key].shape == (3, 2) for key in ("z", "mean", "logvar"))
    assert VAE_model(10, [8, 6], decode_dim=5).decode(torch.zeros(1, 3)).shape == (1, 5)
    with pytest.raises(ValueError, match="even"):
        VAE_model(784, [256, 3])


def test_kl_against_torch_distributions():
    mean, logvar = torch.randn(6, 5), torch.randn(6, 5)
    expected = kl_of(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl_divergence(mean, logvar), expected, rtol=1e-5)


def test_kl_known_values():
    zero = torch.zeros(1, 3)
    assert kl_divergence(zero, zero).item() == 0
    assert kl_divergence(zero + 2, zero).item() == pytest.approx(3 * 0.5 * 4)
    assert kl_divergence(zero, zero + math.log(4)).item() == pytest.approx(
        3 * 0.5 * (4 - 1 - math.log(4)), rel=1e-6
    )


def test_reconstruction_against_torch_distributions():
    imgs = torch.rand(4, 784).clamp(0.01, 0.99)
    x = (torch.rand(4, 1, 28, 28) > 0.5).float()
    assert torch.allclose(
        reconstruction_loss(imgs, x), -Bernoulli(imgs).log_prob(x.flatten(1)).sum(1), rtol=1e-4
    )


def test_loss_func_is_eq_2_summed_over_pixels_and_averaged_over_the_batch():
    """All weights zero: the decoder says 1/2 everywhere and q(z|x) has the encoder's bias as its parameters."""
    model = VAE_model(784, [16, 4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.encoder[-1].bias.data = torch.tensor([1.0, -1.0, 0.0, math.log(2)])
    kl = 0.5 * ((1 + 1 - 1 - 0) + (2 + 1 - 1 - math.log(2)))
    for count, coeff in ((1, 1.0), (7, 0.25)):
        loss = step3.loss_func(model, torch.rand(count, 1, 28, 28), coeff)
        assert loss.shape == () and loss.item() == pytest.approx(784 * math.log(2) + coeff * kl, rel=1e-5)


def test_reparameterize_has_the_mean_and_the_variance():
    model = VAE_model(784, [16, 4])
    mean, logvar = torch.tensor([1.0, -2.0]), torch.tensor([0.0, math.log(0.25)])
    z = model.reparameterize(mean.expand(100_000, 2), logvar.expand(100_000, 2))
    assert torch.allclose(z.mean(0), mean, atol=0.02)
    assert torch.allclose(z.std(0), torch.tensor([1.0, 0.5]), atol=0.02)


def test_terms_average_over_images_with_a_short_last_batch():
    model = VAE_model(784, [16, 4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(model.decoder[-2].bias, math.log(0.2 / 0.8))
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    images[4] = 255
    reconstruction, kl = step3.evaluate(model, images, "none", batch_size=2)
    assert reconstruction == pytest.approx(784 * (-4 * math.log(0.8) - math.log(0.2)) / 5, rel=1e-5)
    assert kl == pytest.approx(0, abs=1e-6)


def test_sampling_is_repeatable_and_leaves_the_global_state():
    model = VAE_model(784, [16, 4]).eval()
    state = torch.get_rng_state()
    images = model.sample(4)
    assert torch.equal(state, torch.get_rng_state())
    assert images.shape == (4, 1, 28, 28) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, model.sample(4))
    assert not torch.equal(images, model.sample(4, torch.Generator().manual_seed(1)))
