"""A mixture of Gaussians as the prior of a trained VAE (Ghosh et al. 2020, arXiv 1903.12436, section 4.1)."""

import math

import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from utils import files, machine
from utils.data import binarize

STEP = "step3_vae_prior"  # in prior.pt, which files.save_model writes and files.load_network reads
KMEANS_STEPS, KMEANS_CODES = 20, 20_000
EM_STEPS, MIN_GAIN = 50, 2e-3  # EM ends when a step gains fewer nats per code
NUMBERS = (10, 30, 100, 300)  # of components, to choose from
PSEUDO_CODES = 50.0  # each covariance is averaged with the pooled covariance, which counts as so many codes
BLOCK = 2000  # codes at once
DRAWS = 4  # codes of each image


class MixturePrior(nn.Module):
    """Mixture of Gaussians on the CPU in double precision. Covariances are `factors` @ `factors`.mT."""

    def __init__(self, num_components, z_size):
        super().__init__()
        self.register_buffer("shares", torch.full((num_components,), 1 / num_components).double())
        self.register_buffer("means", torch.zeros(num_components, z_size).double())
        self.register_buffer("factors", torch.eye(z_size).double().repeat(num_components, 1, 1))

    def log_joint(self, features):
        """Return log p(k) + log p(z|k) of each component k, (N, num_components), from `_features` of z."""
        components = MultivariateNormal(self.means, scale_tril=self.factors)
        constant = self.shares.log() + components.log_prob(torch.zeros_like(self.means))  # at z = 0
        linear = (components.precision_matrix @ self.means.unsqueeze(2)).squeeze(2)
        quadratic = components.precision_matrix.flatten(1) / -2
        return features @ torch.cat([constant.unsqueeze(1), linear, quadratic], 1).T

    def log_prob(self, z):
        """Return log p(z) in nats, (...), for z (..., z_size) on any device."""
        blocks = z.flatten(0, -2).split(BLOCK)
        log_probs = [self.log_joint(_features(block)).logsumexp(1) for block in blocks]
        return torch.cat(log_probs).view(z.shape[:-1]).to(z)

    def sample(self, num_samples, generator):
        """Draw z in single precision, (num_samples, z_size), with a CPU generator."""
        chosen = torch.multinomial(self.shares, num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, self.means.shape[1], generator=generator).double()
        return (self.means[chosen] + torch.einsum("nij,nj->ni", self.factors[chosen], noise)).float()

    def maximize(self, moments):
        """Do the M-step of EM from the sums of `_features`, weighted by component: one row for each."""
        counts, sums, products = moments.tensor_split([1, 1 + self.means.shape[1]], 1)
        self.shares, self.means = counts.squeeze(1) / counts.sum(), sums / counts.clamp(min=1e-9)
        scatters = products.view_as(self.factors) - sums.unsqueeze(2) * self.means.unsqueeze(1)
        pooled = scatters.sum(0) / counts.sum()
        pooled.diagonal().add_(1e-6)  # or very few codes had a singular covariance
        covariances = (scatters + PSEUDO_CODES * pooled) / (counts.unsqueeze(2) + PSEUDO_CODES)
        self.factors = torch.linalg.cholesky(covariances)


def _features(z):
    """Return 1, z_i and z_i z_j, in which the log-density of a Gaussian is linear: (N, 1 + z_size + z_size^2)."""
    z = z.cpu().double()
    return torch.cat([torch.ones_like(z[:, :1]), z, (z.unsqueeze(2) * z.unsqueeze(1)).flatten(1)], 1)


def fit_mixture(codes, num_components):
    """Fit a mixture to codes (N, z_size) by EM, from a start by k-means."""
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    few, centres = codes[:KMEANS_CODES], codes[:num_components]
    for _ in range(KMEANS_STEPS):
        owners = F.one_hot(torch.cdist(few, centres).argmin(1), num_components).to(few)
        centres = owners.T @ few / owners.sum(0).clamp(min=1).unsqueeze(1)  # without codes it moves to 0
    prior, last = MixturePrior(num_components, codes.shape[1]), -math.inf
    moments = owners.double().T @ _features(few)
    for _ in machine.progress(range(EM_STEPS), f"{num_components} Gaussians, steps at most"):
        prior.maximize(moments)
        log_prob, moments = 0, 0
        for features in map(_features, codes.split(BLOCK)):
            log_joint = prior.log_joint(features)
            log_prob += log_joint.logsumexp(1).sum().item() / len(codes)
            moments += log_joint.softmax(1).T @ features
        if log_prob < last + MIN_GAIN:
            break
        last = log_prob
    return prior


def fit_prior(codes, held_out_codes, numbers=NUMBERS):
    """Fit a mixture to all codes, with the number of components by which held-out codes are most likely.

    The number is chosen by fits to `codes` (N, z_size) alone. The second result is {number: mean log-density of the
    held-out codes in nats}.
    """
    codes, held_out_codes = codes.cpu(), held_out_codes.cpu()
    densities = {each: fit_mixture(codes, each).log_prob(held_out_codes).mean().item() for each in numbers}
    best = max(densities, key=densities.get)
    return fit_mixture(torch.cat([codes, held_out_codes]), best), densities


@torch.no_grad()
def draw_codes(model, images, draws=1):
    """Draw z ~ q(z|x) for uint8 images (N, 1, 28, 28) as stochastic pixels, each `draws` times: (draws * N, z_size)."""
    generator, codes = torch.Generator().manual_seed(0), []
    for block in images.repeat(draws, 1, 1, 1).split(BLOCK):
        mean, logvar = model.encode(binarize(block, "stochastic", generator).flatten(1))
        codes.append(mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean))
    return torch.cat(codes)


def fit(run, model, images):
    """Fit a prior to codes of the uint8 training images; write prior.pt. A run to choose by has none: None, {}."""
    if run.args.held_out:
        return None, {}
    machine.say("fitting a prior to the codes of the training images")
    count = max(1, len(images) // 6)  # the last ones choose the number of components
    parts = (draw_codes(model, part, DRAWS) for part in (images[:-count], images[-count:]))
    prior, densities = fit_prior(*parts, (2,) if run.args.dry_run else NUMBERS)
    best, more = len(prior.shares), dict(held_out_images=count, log_densities=densities)
    files.save_model(run.folder / "prior.pt", STEP, prior, dict(num_components=best, z_size=model.z_size), {})
    formula = "the number with the largest mean log-density of the codes of the last training images"
    return prior, {"prior_components": files.metric(float(best), "components", formula, **more)}


def load_prior(path):
    """Return the prior that was fitted to the codes of the model.pt at `path`."""
    return files.load_network(path.with_name("prior.pt"), (STEP,), MixturePrior)
