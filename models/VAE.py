"""Variational autoencoder of fully connected layers (Kingma & Welling 2014, arXiv 1312.6114).

The encoder gives the mean and log-variance of q(z|x) = N(mean, diag(exp(logvar))), the decoder the
Bernoulli means of p(x|z); the prior p(z) is N(0, I). LeakyReLU throughout, a sigmoid at the end.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_SHAPE = (1, 28, 28)
LEAKY_SLOPE = 0.2
NUM_DECODED = 4000  # latent vectors decoded at once, which bounds the memory of the estimates below


def _hidden_layers(widths):
    """Linear layers between consecutive widths, each followed by LeakyReLU."""
    return [
        layer
        for width, hidden in zip(widths, widths[1:])
        for layer in (nn.Linear(width, hidden), nn.LeakyReLU(LEAKY_SLOPE))
    ]


class VAE_model(nn.Module):
    """Encoder and mirrored decoder.

    Args:
        input_dim: pixels of an image, 784 for MNIST.
        hidden_dims: [h1, h2, ..., 2 * latent], the encoder's hidden layers and its output, which is the
            mean and the log-variance side by side; the decoder takes the hidden layers in reverse.
        decode_dim: pixels of the reconstruction; -1 for input_dim.
    """

    def __init__(self, input_dim, hidden_dims, decode_dim=-1):
        super().__init__()
        *hidden, output = hidden_dims
        if output < 2 or output % 2:
            raise ValueError(f"the last of hidden_dims is twice the latent dimension, so even; got {output}")
        self.z_size = output // 2
        decode_dim = input_dim if decode_dim == -1 else decode_dim
        encoder, decoder = [input_dim, *hidden], [self.z_size, *reversed(hidden)]
        self.encoder = nn.Sequential(*_hidden_layers(encoder), nn.Linear(encoder[-1], output))
        self.decoder = nn.Sequential(
            *_hidden_layers(decoder), nn.Linear(decoder[-1], decode_dim), nn.Sigmoid()
        )

    def encode(self, x):
        """(N, 1, 28, 28) or (N, input_dim) images in [0, 1] -> mean and logvar of q(z|x), (N, z_size) each."""
        return self.encoder(x.flatten(1)).chunk(2, dim=1)

    def reparameterize(self, mean, logvar):
        """z = mean + sigma * epsilon with epsilon ~ N(0, I) (Kingma & Welling 2014, section 2.4)."""
        return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)

    def decode(self, z):
        """(N, z_size) -> (N, decode_dim) Bernoulli means in [0, 1]."""
        return self.decoder(z)

    def decode_logits(self, z):
        """(N, z_size) -> (N, decode_dim), what the last sigmoid takes."""
        return self.decoder[:-1](z)

    def forward(self, x):
        """Images -> dict of `imgs` (N, decode_dim), and `z`, `mean`, `logvar` (N, z_size)."""
        mean, logvar = self.encode(x)
        z = self.reparameterize(mean, logvar)
        return {"imgs": self.decode(z), "z": z, "mean": mean, "logvar": logvar}

    @torch.no_grad()
    def sample(self, num_samples, generator=None):
        """Decode z ~ N(0, I): (num_samples, 1, 28, 28) Bernoulli means in [0, 1].

        The noise comes from `generator` (a CPU `torch.Generator`; without one, a fresh one with seed 0),
        so the global random state is left alone and the draw is repeatable on every device.
        """
        generator = generator or torch.Generator().manual_seed(0)
        z = torch.randn(num_samples, self.z_size, generator=generator)
        return self.decode(z.to(next(self.parameters()).device)).reshape(-1, *IMAGE_SHAPE)


def reconstruction_loss(imgs, x):
    """-log p(x|z) = -sum_i [x_i log imgs_i + (1 - x_i) log(1 - imgs_i)], (N,), nats per image.

    Kingma & Welling 2014, appendix C.1. `imgs` (N, D) are Bernoulli means, `x` (N, ...) targets in [0, 1]. NaN
    where a diverged network has given NaN.
    """
    # binary_cross_entropy itself would stop at a NaN.
    nats = F.binary_cross_entropy(imgs.nan_to_num(), x.flatten(1), reduction="none").sum(dim=1)
    return nats.masked_fill(imgs.isnan().any(dim=1), torch.nan)


def kl_divergence(mean, logvar):
    """KL(N(mean, diag(exp(logvar))) || N(0, I)) = 1/2 sum_j (sigma_j^2 + mean_j^2 - 1 - log sigma_j^2).

    Eq. 2 of the assignment; Kingma & Welling 2014, appendix B. (N, z_size) each -> (N,), nats per image.
    """
    return 0.5 * (logvar.exp() + mean.square() - 1 - logvar).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------
# Estimates of log p(x)


@torch.no_grad()
def importance_bound(model, x, num_samples, generator=None, prior_share=0.0):
    """log 1/K sum_k p(x|z_k) p(z_k) / r(z_k|x), z_k ~ r(z|x), for K = `num_samples`: (N,), nats per image.

    Burda et al. 2016 (arXiv 1509.00519), Eq. 8, where r(z|x) is q(z|x). In expectation it is at most log p(x), no
    less than the ELBO, and grows with K to log p(x). For an image whose q(z|x) is misplaced it does so only slowly.

    Args:
        x: (N, ...) targets in [0, 1].
        generator: of the noise, a CPU `torch.Generator`; without one, a fresh one with seed 0.
        prior_share: this share of the samples is drawn from the prior p(z), the others from q(z|x), and r is the
            mixture of the two with just these shares. So every part of the latent space is visited, and the
            estimate of p(x) stays unbiased: a mixture with a fixed number of samples from each component, the
            balance heuristic (Veach & Guibas 1995, section 3; Owen & Zhou 2000, section 3).

    Raises:
        ValueError: no sample, or a share outside 0 to 1.
    """
    if num_samples < 1 or not 0 <= prior_share <= 1:
        raise ValueError(f"takes samples and a share from 0 to 1, not {num_samples} and {prior_share}")
    generator = generator or torch.Generator().manual_seed(0)
    num_prior = round(prior_share * num_samples)
    bounds = []
    for images in x.flatten(1).split(max(1, NUM_DECODED // num_samples)):
        mean, logvar = model.encode(images)
        total = torch.full((len(images),), -math.inf, device=x.device)
        for first in range(0, num_samples, NUM_DECODED):
            samples = torch.arange(first, min(first + NUM_DECODED, num_samples))
            noise = torch.randn(len(samples), *mean.shape, generator=generator).to(x.device)
            from_prior = (samples < num_prior).view(-1, 1, 1).to(x.device)
            z = torch.where(from_prior, noise, mean + torch.exp(0.5 * logvar) * noise)
            log_prior = _log_normal(z, torch.zeros_like(mean), torch.zeros_like(logvar))
            share = torch.tensor(num_prior / num_samples, device=x.device)
            log_proposal = torch.logaddexp(
                share.log() + log_prior, (1 - share).log() + _log_normal(z, mean, logvar)
            )
            log_weights = _log_likelihood_of_each(model, images, z) + log_prior - log_proposal
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        bounds.append(total - math.log(num_samples))
    return torch.cat(bounds)


@torch.no_grad()
def plane_log_likelihood(model, x, spacing=0.04, half_width=5.0):
    """log p(x) = log of the integral of p(x|z) p(z) over the plane, by a sum over a square grid: (N,), nats.

    For two latent dimensions alone. A grid point is decoded once for all images. The sum is as good as exact where
    the spacing is below the posteriors' standard deviations: on the test images of a model of the default size
    0.04 is within 0.01 nat of 0.02 in the mean. Beyond 5 the prior has 1e-6 of its mass.
    """
    if model.z_size != 2:
        raise ValueError(f"the plane has two latent dimensions, not {model.z_size}")
    count = round(2 * half_width / spacing)
    axis = (torch.arange(count, device=x.device) + 0.5) * spacing - half_width
    images = x.flatten(1)
    total = torch.full((len(images),), -math.inf, device=x.device)
    for z in torch.cartesian_prod(axis, axis).split(NUM_DECODED):
        logits = model.decode_logits(z)
        log_prior = _log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
        constant = log_prior - F.softplus(logits).sum(1)
        for chunk, sums in zip(images.split(NUM_DECODED), total.split(NUM_DECODED)):
            log_joint = torch.addmm(constant, chunk, logits.T)  # (images, grid points)
            sums.copy_(torch.logaddexp(sums, log_joint.logsumexp(1)))
    return total + 2 * math.log(spacing)


def active_units(means, threshold=0.01):
    """How many latent dimensions are in use: those whose posterior mean, (N, z_size), varies more over the images.

    Burda et al. 2016 (arXiv 1509.00519), section 5.2.
    """
    return (means.var(0) > threshold).sum().item()


def _log_likelihood_of_each(model, images, z):
    """log p(x|z) for images (N, D) and K latent vectors of each, (K, N, z_size): (K, N)."""
    logits = model.decode_logits(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    # sum_i [x_i logit_i - log(1 + exp(logit_i))], which is -reconstruction_loss without its rounding near 0 and 1.
    return torch.einsum("knd,nd->kn", logits, images) - F.softplus(logits).sum(2)


def _log_normal(z, mean, logvar):
    """log N(z; mean, diag(exp(logvar))), summed over the last dimension."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean).square() / logvar.exp()).sum(-1)
