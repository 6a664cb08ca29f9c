"""Estimates of log p(x) for a VAE, and which latent dimensions it uses."""

import math

import torch
from torch.nn import functional as F

NUM_DECODED = 4000  # latent vectors decoded at once, which bounds the memory


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
