"""Variational autoencoder of fully connected layers (Kingma & Welling 2014, arXiv 1312.6114).

The encoder gives the mean and the log-variance of q(z|x) = N(mean, diag(exp(logvar))). The decoder gives the
Bernoulli means of p(x|z). The prior p(z) is N(0, I). Hidden layers use LeakyReLU, the last one a sigmoid.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_SHAPE = (1, 28, 28)
LEAKY_SLOPE = 0.2
NUM_DECODED = 4000  # latent vectors decoded at once in the estimates below, which bounds their memory


class VAE_model(nn.Module):
    """Encoder and mirrored decoder.

    Args:
        input_dim: pixels of an image, 784 for MNIST.
        hidden_dims: [h1, h2, ..., 2 * latent]. These are the encoder's hidden layers and its output, the mean
            beside the log-variance. The decoder has the hidden layers in reverse.
        decode_dim: pixels of the reconstruction, where -1 stands for input_dim.

    Raises:
        ValueError: no hidden layer, a layer without units, or an odd output.
    """

    def __init__(self, input_dim, hidden_dims, decode_dim=-1):
        decode_dim = input_dim if decode_dim == -1 else decode_dim
        _check_widths(input_dim, hidden_dims, decode_dim)
        super().__init__()
        *hidden, output = hidden_dims
        self.z_size, self.decode_dim = output // 2, decode_dim
        encoder, decoder = [input_dim, *hidden], [self.z_size, *reversed(hidden)]
        self.encoder = nn.Sequential(*_hidden_layers(encoder), nn.Linear(encoder[-1], output))
        self.decoder = nn.Sequential(
            *_hidden_layers(decoder), nn.Linear(decoder[-1], decode_dim), nn.Sigmoid()
        )

    def encode(self, x):
        """Return mean and logvar of q(z|x), (N, z_size) each, for images x (N, ...) in [0, 1]."""
        return self.encoder(x.flatten(1)).chunk(2, dim=1)

    def reparameterize(self, mean, logvar):
        """Draw z = mean + sigma * epsilon with epsilon ~ N(0, I) (Kingma & Welling 2014, section 2.4)."""
        return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)

    def decode(self, z):
        """Return the Bernoulli means of the pixels, (N, decode_dim) in [0, 1], for z (N, z_size)."""
        return self.decoder(z)

    def decode_logits(self, z):
        """Return the logits of the Bernoulli means, (N, decode_dim), for z (N, z_size)."""
        return self.decoder[:-1](z)

    def forward(self, x):
        """Return a dict of the decoded `imgs` (N, decode_dim), and `z`, `mean`, `logvar` (N, z_size)."""
        mean, logvar = self.encode(x)
        z = self.reparameterize(mean, logvar)
        return {"imgs": self.decode(z), "z": z, "mean": mean, "logvar": logvar}

    @torch.no_grad()
    def sample(self, num_samples, generator=None):
        """Decode z ~ N(0, I) to Bernoulli means in [0, 1], (num_samples, 1, 28, 28).

        Args:
            generator: CPU `torch.Generator` of the noise, by default a new one with seed 0. The global random
                state is not used, and every device gets the same noise.

        Raises:
            ValueError: the decoder does not give 28 x 28 pixels.
        """
        if self.decode_dim != math.prod(IMAGE_SHAPE):
            raise ValueError(f"the decoder gives {self.decode_dim} pixels, which are no 28 x 28 image")
        generator = generator or torch.Generator().manual_seed(0)
        z = torch.randn(num_samples, self.z_size, generator=generator)
        return self.decode(z.to(next(self.parameters()))).reshape(-1, *IMAGE_SHAPE)


def _check_widths(input_dim, hidden_dims, decode_dim):
    if len(hidden_dims) < 2:
        raise ValueError(f"hidden_dims must list a hidden layer and twice the latent size, not {hidden_dims}")
    if min(input_dim, decode_dim, *hidden_dims) < 1:
        raise ValueError(f"layers must have at least 1 unit, not {[input_dim, *hidden_dims, decode_dim]}")
    if hidden_dims[-1] % 2:
        raise ValueError(
            f"the last of hidden_dims must be even, twice the latent dimension, not {hidden_dims[-1]}"
        )


def _hidden_layers(widths):
    """Make linear layers between consecutive widths, each followed by LeakyReLU."""
    return [
        layer
        for width, hidden in zip(widths, widths[1:])
        for layer in (nn.Linear(width, hidden), nn.LeakyReLU(LEAKY_SLOPE))
    ]


# ---------------------------------------------------------------------------------------------------------
# The two terms of the loss


def reconstruction_loss(imgs, x):
    """Return -log p(x|z) = -sum_i [x_i log imgs_i + (1 - x_i) log(1 - imgs_i)], (N,), in nats per image.

    Kingma & Welling 2014, appendix C.1. It is NaN for images where a diverged network has returned NaN.

    Args:
        imgs: Bernoulli means, (N, D).
        x: targets in [0, 1], (N, ...).
    """
    # binary_cross_entropy itself would stop at a NaN.
    nats = F.binary_cross_entropy(imgs.nan_to_num(), x.flatten(1), reduction="none").sum(dim=1)
    return nats.masked_fill(imgs.isnan().any(dim=1), torch.nan)


def kl_divergence(mean, logvar):
    """Return KL(N(mean, diag(exp(logvar))) || N(0, I)), (N,), in nats per image, for (N, z_size) each.

    1/2 sum_j (sigma_j^2 + mean_j^2 - 1 - log sigma_j^2): Eq. 2 of the assignment, and appendix B of Kingma &
    Welling 2014.
    """
    return 0.5 * (logvar.exp() + mean.square() - 1 - logvar).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------
# Estimates of log p(x)


@torch.no_grad()
def importance_bound(model, x, num_samples, generator=None, prior_share=0.0):
    """Return log 1/K sum_k p(x|z_k) p(z_k) / r(z_k|x), (N,) in nats, with K = `num_samples` z_k ~ r(z|x).

    With r(z|x) = q(z|x) this is the bound of Burda et al. 2016 (arXiv 1509.00519), Eq. 8. Its expectation
    lies between the ELBO and log p(x), and grows with K to log p(x). It grows slowly for an image whose
    q(z|x) is misplaced.

    Args:
        x: targets in [0, 1], (N, ...).
        generator: CPU `torch.Generator` of the noise, by default a new one with seed 0.
        prior_share: fraction of the samples that come from the prior p(z). The rest come from q(z|x), and r
            is the mixture of both in these proportions, the balance heuristic (Veach & Guibas 1995, section
            3; Owen & Zhou 2000, section 3). The estimate of p(x) stays unbiased, and the whole latent space
            is visited.

    Raises:
        ValueError: no sample, or a fraction outside [0, 1].
    """
    if num_samples < 1 or not 0 <= prior_share <= 1:
        raise ValueError(
            f"num_samples must be at least 1 and prior_share in [0, 1], not {num_samples} and {prior_share}"
        )
    generator = generator or torch.Generator().manual_seed(0)
    num_prior = round(prior_share * num_samples)
    bounds = []
    for images in x.flatten(1).split(max(1, NUM_DECODED // num_samples)):
        mean, logvar = model.encode(images)
        total = torch.full_like(mean[:, 0], -math.inf)
        for first in range(0, num_samples, NUM_DECODED):
            samples = torch.arange(first, min(first + NUM_DECODED, num_samples))
            noise = torch.randn(len(samples), *mean.shape, generator=generator).to(mean)
            from_prior = (samples < num_prior).view(-1, 1, 1).to(x.device)
            z = torch.where(from_prior, noise, mean + torch.exp(0.5 * logvar) * noise)
            log_prior = _log_normal(z, torch.zeros_like(mean), torch.zeros_like(logvar))
            weight = mean.new_tensor(num_prior / num_samples)
            log_proposal = torch.logaddexp(
                weight.log() + log_prior, (1 - weight).log() + _log_normal(z, mean, logvar)
            )
            log_weights = _log_likelihood_of_each(model, images, z) + log_prior - log_proposal
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        bounds.append(total - math.log(num_samples))
    return torch.cat(bounds)


@torch.no_grad()
def plane_log_likelihood(model, x, spacing=0.04, half_width=5.0):
    """Return log p(x), (N,) in nats, by summing p(x|z) p(z) over a square grid in the latent plane.

    It needs two latent dimensions. Each grid point is decoded once for all images. The sum is nearly exact if
    the spacing is below the posteriors' standard deviations. With the default model and test images, spacings
    of 0.04 and 0.02 differ by less than 0.01 nat on average. The prior has a mass of 1e-6 outside the default
    square.

    Args:
        x: targets in [0, 1], (N, ...).
        spacing: distance between grid points.
        half_width: half the side of the square, which is centred on zero.

    Raises:
        ValueError: the model does not have two latent dimensions.
    """
    if model.z_size != 2:
        raise ValueError(f"the plane has two latent dimensions, not {model.z_size}")
    count = round(2 * half_width / spacing)
    images = x.flatten(1)
    axis = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) * spacing - half_width
    total = torch.full_like(images[:, 0], -math.inf)
    for z in torch.cartesian_prod(axis, axis).split(NUM_DECODED):
        logits = model.decode_logits(z)
        log_prior = _log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
        constant = log_prior - F.softplus(logits).sum(1)
        for chunk, sums in zip(images.split(NUM_DECODED), total.split(NUM_DECODED)):
            log_joint = torch.addmm(constant, chunk, logits.T)  # (images, grid points)
            sums.copy_(torch.logaddexp(sums, log_joint.logsumexp(1)))
    return total + 2 * math.log(spacing)


def active_units(means, threshold=0.01):
    """Count the latent dimensions in use, those whose posterior mean varies from image to image.

    Args:
        means: posterior means of the images, (N, z_size).
        threshold: least variance over the images (Burda et al. 2016, arXiv 1509.00519, section 5.2).
    """
    return (means.var(0) > threshold).sum().item()


def _log_likelihood_of_each(model, images, z):
    """Return log p(x|z), (K, N), for images (N, D) and K latent vectors of each, (K, N, z_size)."""
    logits = model.decode_logits(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    # sum_i [x_i logit_i - log(1 + exp(logit_i))] is -reconstruction_loss without its rounding near 0 and 1.
    return torch.einsum("knd,nd->kn", logits, images) - F.softplus(logits).sum(2)


def _log_normal(z, mean, logvar):
    """Return log N(z; mean, diag(exp(logvar))), summed over the last dimension."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean).square() / logvar.exp()).sum(-1)
