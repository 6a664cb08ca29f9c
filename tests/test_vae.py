"""Our extras of step 3: terms of the loss, estimates of log p(x), the latent plane, the warm-up of the KL term."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

import hw2_step3_main as step3
from models.VAE import VAE_model, reconstruction_loss
from tests.conftest import ROOT
from utils import likelihoods, vae_results
from utils.data import binarize, load_data
from utils.likelihoods import importance_bounds, plane_gaps, plane_log_likelihood


def constant_model(logit=0.0, num_pixels=784):
    """Return a model with q(z|x) = N((1, -0.5), diag(1/4, 2)) whose pixels are on with probability sigmoid(logit)."""
    model = VAE_model(num_pixels, [16, 4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(model.decoder[-2].bias, logit)
    model.encoder[-1].bias.data = torch.tensor([1.0, -0.5, math.log(0.25), math.log(2)])
    return model


def test_reconstruction_against_torch_distributions():
    imgs = torch.rand(4, 784).clamp(0.01, 0.99)
    x = (torch.rand(4, 1, 28, 28) > 0.5).float()
    expected = -Bernoulli(imgs).log_prob(x.flatten(1)).sum(1)
    assert torch.allclose(reconstruction_loss(imgs, x), expected, rtol=1e-4)


def test_terms_average_over_images_with_a_short_last_batch():
    model = constant_model(math.log(0.2 / 0.8))
    nn.init.zeros_(model.encoder[-1].bias)
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    images[4] = 255
    reconstruction, kl = step3.evaluate(model, binarize(images, "none"), batch_size=2)
    assert reconstruction == pytest.approx(784 * (-4 * math.log(0.8) - math.log(0.2)) / 5, rel=1e-5)
    assert kl == pytest.approx(0, abs=1e-6)


def test_the_bound_of_a_decoder_that_ignores_z():
    """The pixels are independent, which gives log p(x). The bound averages p(z) / q(z|x), whose mean is one."""
    x = (torch.rand(3, 1, 4, 4) < 0.2).float()
    expected = Bernoulli(logits=torch.tensor(-1.0)).log_prob(x).sum((1, 2, 3))
    (bound,) = importance_bounds(constant_model(-1.0, 16), x, 50_000)
    # The narrow q leaves rare, large weights. Their variance does not exist, and the error falls slowly.
    assert torch.allclose(bound, expected, atol=0.3, rtol=0)


def test_probabilities_of_all_images_add_up_to_one():
    """Few pixels, so that every image can be counted, and a q(z|x) that is far from the posterior."""
    model = VAE_model(3, [8, 4]).eval()
    for parameter in model.decoder.parameters():
        parameter.data *= 4
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    assert plane_log_likelihood(model, x, 0.1, 6.0).exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def trained():
    """The committed model, 40 binarised test digits, their log p(x) by integration over the plane, and the mean ELBO."""
    _, (images, _) = load_data(ROOT / "data")
    x = binarize(images[:40], "stochastic", torch.Generator().manual_seed(0))
    model = step3.load_model(ROOT / "results" / step3.STEP / "model.pt")
    torch.manual_seed(0)
    with torch.no_grad():
        elbo = -sum(sum(step3.loss_terms(model, x)).item() for _ in range(100)) / 100
    return model, x, plane_log_likelihood(model, x), elbo


def test_the_grid_of_the_integration_is_fine_enough(trained):
    """A grid that is shifted by half its spacing gives the same mean."""
    model, x, exact, _ = trained
    shifted = plane_log_likelihood(model, x, spacing=0.04, half_width=5.02)
    assert not torch.equal(shifted, exact) and abs(shifted.mean() - exact.mean()) < 0.02


def test_the_bound_grows_with_the_samples_from_the_elbo_to_log_p(trained):
    """This holds in expectation. The means of independent draws have standard errors of about 0.2 nat."""
    model, x, exact, elbo = trained
    bounds = [importance_bounds(model, x, count).mean().item() for count in (1, 10, 100, 1000)]
    assert bounds[0] == pytest.approx(elbo, abs=0.6)
    assert elbo < bounds[1] < bounds[2] < bounds[3] < exact.mean().item()


def test_the_gap_of_the_elbo_is_the_divergence_from_the_true_posterior(trained):
    model, x, exact, elbo = trained
    gap, best = plane_gaps(model, x, steps=25)
    assert gap.mean().item() == pytest.approx(exact.mean().item() - elbo, abs=0.3)
    assert ((0 <= best) & (best <= gap)).all() and best.mean() < gap.mean() / 2


@pytest.mark.parametrize("num_samples", [1, 3, 40])
def test_estimates_decode_a_bounded_number_at_once(num_samples, monkeypatch):
    sizes, decode = [], VAE_model.decode_logits
    monkeypatch.setattr(likelihoods, "NUM_DECODED", 7)
    monkeypatch.setattr(VAE_model, "decode_logits", lambda self, z: sizes.append(len(z)) or decode(self, z))
    model, x = constant_model(), torch.rand(10, 1, 28, 28)
    nn.init.zeros_(model.encoder[-1].bias)  # q(z|x) is the prior, so the weights are p(x|z)
    bound = importance_bounds(model, x, num_samples)
    assert max(sizes) <= max(7, num_samples) and sum(sizes) == 10 * num_samples
    assert torch.allclose(bound, torch.tensor(-784 * math.log(2)))
    sizes.clear()
    integral = plane_log_likelihood(model, x, spacing=0.5)
    assert max(sizes) <= 7 and sum(sizes) == 400
    assert torch.allclose(integral, torch.tensor(-784 * math.log(2)))


def test_the_typical_image_is_nearest_to_the_median():
    means = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0], [2.0, 2.0], [50.0, 50.0]])
    assert vae_results.typical(means, torch.tensor([3, 7, 3, 3, 7]), 3) == 2


def test_the_latent_plane_has_z_1_to_the_right_and_z_2_upwards():
    """The first row has the largest z_2. Further latent dimensions stay at zero."""
    model, decoded = VAE_model(784, [16, 6]), []
    model.decode = lambda z: decoded.append(z) or torch.zeros(len(z), 784)
    assert vae_results.decode_plane(model, 3).shape == (9, 1, 28, 28)
    low = Normal(0.0, 1.0).icdf(torch.tensor(1 / 6)).item()  # thirds of the prior, each by its median
    expected = torch.tensor([[x, y, 0.0] for y in (-low, 0, low) for x in (low, 0, -low)])
    assert torch.allclose(decoded[0], expected, atol=1e-6)


def test_kl_warm_up_rises_to_the_weight():
    assert [step3.kl_weight(2.0, 0.25, done) for done in (0, 0.125, 0.25, 0.9)] == [0, 1, 2, 2]
    assert step3.kl_weight(2.0, 0.0, 0) == 2
