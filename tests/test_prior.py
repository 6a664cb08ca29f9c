"""The fitted prior of step 3: its density against torch.distributions, EM on a known mixture, bounds."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, MixtureSameFamily, MultivariateNormal

from models.VAE import VAE_model
from utils import files, prior
from utils.likelihoods import importance_bounds
from utils.prior import MixturePrior, draw_codes, fit_mixture, fit_prior

SHARES = torch.tensor([0.5, 0.3, 0.2])
MEANS = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-2.0, 3.0]])
FACTORS = torch.tensor([[[1.0, 0.0], [0.8, 0.5]], [[0.5, 0.0], [0.0, 0.5]], [[0.3, 0.0], [-0.5, 1.0]]])
TRUTH = MixtureSameFamily(Categorical(SHARES), MultivariateNormal(MEANS, scale_tril=FACTORS))


def mixture(**parameters):
    made = MixturePrior(*parameters["means"].shape)
    made.load_state_dict(parameters)
    return made


def test_density_and_samples_are_those_of_torch_distributions():
    made = mixture(shares=SHARES, means=MEANS, factors=FACTORS)
    z = 3 * torch.randn(prior.BLOCK + 7, 3, 2)  # more than one chunk
    assert torch.allclose(made.log_prob(z), TRUTH.log_prob(z), rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    first, again = (made.sample(200_000, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())
    assert torch.allclose(first.mean(0), TRUTH.mean, atol=0.02)
    covariance = torch.tensor([[3.843, -1.13], [-1.13, 2.21]])  # by hand: E z z^T - m m^T
    assert torch.allclose(first.T.cov(), covariance, atol=0.05)


def test_fit_finds_a_known_mixture_and_its_number_of_components():
    codes, held_out = TRUTH.sample((10_000,)), TRUTH.sample((10_000,))
    fitted, densities = fit_prior(codes, held_out, numbers=(1, 3, 100))
    assert len(fitted.shares) == 3 and densities[3] > max(densities[1], densities[100]) + 0.01
    assert densities[3] == pytest.approx(TRUTH.log_prob(held_out).mean().item(), abs=0.01)
    order = fitted.shares.argsort(descending=True)
    assert torch.allclose(fitted.shares[order].float(), SHARES, atol=0.03)
    assert torch.allclose(fitted.means[order].float(), MEANS, atol=0.15)
    again, _ = fit_prior(codes, held_out, numbers=(3,))
    assert all(map(torch.equal, fitted.buffers(), again.buffers()))


def test_no_step_of_em_lowers_the_likelihood(monkeypatch):
    codes, densities = TRUTH.sample((1000,)), []
    monkeypatch.setattr(prior, "PSEUDO_CODES", 0.0)  # with them, EM does not maximise the likelihood alone
    for steps in range(1, 12):
        monkeypatch.setattr(prior, "EM_STEPS", steps)
        densities.append(fit_mixture(codes, 5).log_prob(codes).mean().item())
    assert densities == sorted(densities) and densities[-1] > densities[0] + 0.01


def test_few_codes_suffice_and_the_file_loads(tmp_path):
    fitted, _ = fit_prior(torch.randn(3, 4), torch.randn(2, 4), numbers=(10,))
    files.save_model(tmp_path / "prior.pt", prior.STEP, fitted, dict(num_components=10, z_size=4), {})
    loaded, z = prior.load_prior(tmp_path / "model.pt"), torch.randn(5, 4)
    assert torch.equal(loaded.log_prob(z), fitted.log_prob(z)) and loaded.log_prob(z).isfinite().all()


def test_bounds_with_a_prior_of_their_own():
    """q(z|x) is the same for every image and is the prior; the decoder ignores z. So one sample is enough."""
    model = VAE_model(16, [16, 4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(model.decoder[-2].bias, -1.0)
    model.encoder[-1].bias.data = torch.tensor([1.0, -0.5, math.log(0.25), math.log(2)])
    mean, sigma = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2**0.5])
    q = mixture(shares=torch.ones(1), means=mean[None], factors=sigma.diag()[None])
    x = (torch.rand(3, 1, 4, 4) < 0.2).float()
    log_p = Bernoulli(logits=torch.tensor(-1.0)).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(importance_bounds(model, x, 1, priors=[q])[0], log_p, rtol=1e-5)
    normal = importance_bounds(model, x, 5, priors=[MixturePrior(1, 2)])[0]
    assert torch.allclose(normal, importance_bounds(model, x, 5)[0])
    codes = draw_codes(model, torch.zeros(50_000, 1, 4, 4, dtype=torch.uint8))
    assert torch.allclose(codes.mean(0), mean, atol=0.03) and torch.allclose(codes.std(0), sigma, atol=0.03)
