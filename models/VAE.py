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
    """Encoder and mirrored decoder of images with `input_dim` pixels; impossible widths raise ValueError.

    Args:
        hidden_dims: [h1, h2, ..., 2 * latent]. These are the encoder's hidden layers, one or more, and its
            output, the mean beside the log-variance. The decoder has the hidden layers in reverse.
        decode_dim: pixels of the reconstruction, where -1 stands for input_dim.
    """

    def __init__(self, input_dim, hidden_dims, decode_dim=-1):
        super().__init__()
        self.decode_dim = input_dim if decode_dim == -1 else decode_dim
        if len(hidden_dims) < 2 or hidden_dims[-1] % 2:
            raise ValueError(f"hidden_dims must list hidden layers and an even 2 * latent, not {hidden_dims}")
        if min(input_dim, self.decode_dim, *hidden_dims) < 1:
            raise ValueError(f"layers must have at least 1 unit, not {[input_dim, *hidden_dims, decode_dim]}")
        *hidden, output = hidden_dims
        self.z_size = output // 2
        self.encoder = _fully_connected(input_dim, *hidden, output)
        self.decoder = _fully_connected(self.z_size, *reversed(hidden), self.decode_dim).append(nn.Sigmoid())

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
        """Decode z ~ N(0, I) to Bernoulli means in [0, 1], (num_samples, 1, 28, 28), if decode_dim is 784.

        `generator` is a CPU `torch.Generator`, by default a new one with seed 0. The global state stays.
        """
        if self.decode_dim != math.prod(IMAGE_SHAPE):
            raise ValueError(f"the decoder gives {self.decode_dim} pixels, which are no 28 x 28 image")
        generator = generator or torch.Generator().manual_seed(0)
        z = torch.randn(num_samples, self.z_size, generator=generator)
        return self.decode(z.to(next(self.parameters()))).reshape(-1, *IMAGE_SHAPE)


def _fully_connected(*widths):
    """Make linear layers between consecutive widths, with LeakyReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(LEAKY_SLOPE)]
    return nn.Sequential(*layers[:-1])


def reconstruction_loss(imgs, x):
    """Return -log p(x|z) = -sum_i [x_i log imgs_i + (1 - x_i) log(1 - imgs_i)], (N,), in nats per image.

    Kingma & Welling 2014, appendix C.1, for Bernoulli means `imgs` (N, D) and targets x (N, ...) in [0, 1].
    """
    # A diverged network gives NaN. binary_cross_entropy itself would stop at it.
    nats = F.binary_cross_entropy(imgs.nan_to_num(), x.flatten(1), reduction="none").sum(dim=1)
    return nats.masked_fill(imgs.isnan().any(dim=1), torch.nan)


def kl_divergence(mean, logvar):
    """Return KL(N(mean, diag(exp(logvar))) || N(0, I)), (N,), in nats per image, for (N, z_size) each.

    Eq. 2 of the assignment, and Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (logvar.exp() + mean.square() - 1 - logvar).sum(dim=1)


@torch.no_grad()
def importance_bound(model, x, num_samples, generator=None):
    """Return log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), (N,) in nats, with K = `num_samples` z_k ~ q(z|x).

    This is the bound of Burda et al. 2016 (arXiv 1509.00519), Eq. 8. Its expectation grows with K from the
    ELBO to log p(x), and slowly so for an image whose q(z|x) is misplaced.

    Args:
        x: targets in [0, 1], (N, ...).
        generator: CPU `torch.Generator` of the noise, by default a new one with seed 0.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    generator = generator or torch.Generator().manual_seed(0)
    bounds, zero = [], x.new_zeros(())
    for images in x.flatten(1).split(max(1, NUM_DECODED // num_samples)):
        mean, logvar = model.encode(images)
        total = torch.full_like(mean[:, 0], -math.inf)
        for start in range(0, num_samples, NUM_DECODED):
            count = min(NUM_DECODED, num_samples - start)
            noise = torch.randn(count, *mean.shape, generator=generator).to(mean)
            z = mean + torch.exp(0.5 * logvar) * noise
            # log p(x|z), (samples, images): minus reconstruction_loss, without its rounding near 0 and 1.
            logits = model.decode_logits(z.flatten(0, 1)).unflatten(0, z.shape[:2])
            log_p = torch.einsum("knd,nd->kn", logits, images) - F.softplus(logits).sum(2)
            log_weights = log_p + _log_normal(z, zero, zero) - _log_normal(z, mean, logvar)
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        bounds.append(total - math.log(num_samples))
    return torch.cat(bounds)


@torch.no_grad()
def plane_log_likelihood(model, x, spacing=0.04, half_width=5.0):
    """Return log p(x), (N,) in nats, by summing p(x|z) p(z) over a square grid in a latent plane, z_size = 2.

    The sum is nearly exact if the spacing is below the posteriors' standard deviations. For the default model
    and the test images, spacings of 0.04 and 0.02 differ by less than 0.01 nat on average.

    Args:
        x: targets in [0, 1], (N, ...).
        half_width: half the side of the square around zero. Outside 5.0 the prior has a mass of 1e-6.
    """
    if model.z_size != 2:
        raise ValueError(f"the plane has two latent dimensions, not {model.z_size}")
    count = round(2 * half_width / spacing)
    images = x.flatten(1)
    axis = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) * spacing - half_width
    total, zero = torch.full_like(images[:, 0], -math.inf), x.new_zeros(())
    for z in torch.cartesian_prod(axis, axis).split(NUM_DECODED):
        logits = model.decode_logits(z)
        constant = _log_normal(z, zero, zero) - F.softplus(logits).sum(1)
        for chunk, sums in zip(images.split(NUM_DECODED), total.split(NUM_DECODED)):
            log_joint = torch.addmm(constant, chunk, logits.T)  # (images, grid points)
            sums.copy_(torch.logaddexp(sums, log_joint.logsumexp(1)))
    return total + 2 * math.log(spacing)


def _log_normal(z, mean, logvar):
    """Return log N(z; mean, diag(exp(logvar))), summed over the last dimension."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean).square() / logvar.exp()).sum(-1)


def active_units(means, threshold=0.01):
    """Count the latent dimensions whose posterior mean has a variance above the threshold over N images.

    `means` has the shape (N, z_size). See Burda et al. 2016, arXiv 1509.00519, section 5.2.
    """
    return (means.var(0) > threshold).sum().item()
