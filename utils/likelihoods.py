"""Estimates of log p(x) for a VAE."""

import math

import torch
from torch.nn import functional as F

from utils.machine import progress

NUM_DECODED = 4000  # latent vectors decoded at once, of one image at least; this bounds the memory


@torch.no_grad()
def importance_bounds(model, x, num_samples, generator=None, priors=(None,)):
    """Return log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) in nats for each prior, with K = `num_samples` z_k ~ q(z|x).

    This is the bound of Burda et al. 2016 (arXiv 1509.00519), Eq. 8. Its expectation grows with K from the
    ELBO to log p(x), and slowly so for an image whose q(z|x) is misplaced.

    Args:
        x: targets in [0, 1], (N, ...).
        generator: CPU `torch.Generator` of the noise, by default a new one with seed 0.
        priors: each has a `log_prob` for z (..., z_size); None is N(0, I). The result is (priors, N).
    """
    generator = generator or torch.Generator().manual_seed(0)
    x = x.flatten(1).to(next(model.parameters()))
    bounds = []
    for images in progress(x.split(max(1, NUM_DECODED // num_samples)), "importance-weighted bound"):
        mean, logvar = model.encode(images)
        noise = torch.randn(num_samples, *mean.shape, generator=generator, dtype=torch.float32).to(mean)
        z = mean + torch.exp(0.5 * logvar) * noise
        # log p(x|z), (samples, images): minus reconstruction_loss, without its rounding near 0 and 1.
        logits = _logits(model, z.flatten(0, 1)).unflatten(0, z.shape[:2])
        log_p = torch.einsum("knd,nd->kn", logits, images) - F.softplus(logits).sum(2)
        log_ratio = log_p - _log_normal(z, mean, logvar)
        sums = torch.stack([(log_ratio + _log_prior(z, prior)).logsumexp(0) for prior in priors])
        bounds.append(sums - math.log(num_samples))
    return torch.cat(bounds, 1)


@torch.no_grad()
def plane_log_likelihood(model, x, spacing=0.04, half_width=5.0):
    """Return log p(x), (N,) in nats, by summing p(x|z) p(z) over a square grid in a latent plane, z_size = 2.

    The sum is nearly exact if the spacing is below the posteriors' standard deviations. For the default model
    and the test images, spacings of 0.04 and 0.02 differ by less than 0.01 nat on average.

    Args:
        x: targets in [0, 1], (N, ...).
        half_width: half the side of the square around zero. Outside 5.0 the prior N(0, I) has a mass of 1e-6.
    """
    images = x.flatten(1).to(next(model.parameters()))
    axis = (torch.arange(round(2 * half_width / spacing)).to(images) + 0.5) * spacing - half_width
    total = torch.full_like(images[:, 0], -math.inf)
    for z in progress(torch.cartesian_prod(axis, axis).split(NUM_DECODED), "integral over the latent plane"):
        total = torch.logaddexp(total, _log_joint(model, images, z).logsumexp(1))
    return total + 2 * math.log(spacing)


@torch.no_grad()
def plane_posteriors(model, x, low=(-4.0, -4.0), high=(4.0, 4.0), side=160):
    """Return a grid z (side^2, 2) of a part of the latent plane, and log p(z|x) and log q(z|x) there, (N, side^2) each.

    Both are normalised over the grid. For targets x in [0, 1], (N, ...), the sum of q (log q - log p) is KL(q || p), the
    gap between the ELBO and log p(x).
    """
    images = x.flatten(1).to(next(model.parameters()))
    z = torch.cartesian_prod(*(torch.linspace(*ends, side).to(images) for ends in zip(low, high)))
    log_q = _log_normal(z, *(each[:, None] for each in model.encode(images)))
    return z, _log_joint(model, images, z).log_softmax(1), log_q.log_softmax(1)


def plane_gaps(model, x, steps=80):
    """Return KL(q || p(z|x)) in nats, (2, N): of the encoder's q(z|x), and of the best q that we find, by Adam.

    The second is the approximation gap of a Gaussian with independent coordinates, and the difference is the
    amortisation gap (Cremer et al. 2018, arXiv 1801.03558). For a latent plane and targets x in [0, 1], (N, ...).
    """
    gaps = []
    for images in progress(x.split(50), "gaps of the bound"):
        z, log_p, _ = plane_posteriors(model, images)

        def gap(mean, logvar):
            log_q = _log_normal(z, mean[:, None], logvar[:, None]).log_softmax(1)
            return (log_q.exp() * (log_q - log_p)).sum(1)

        mean, logvar = (each.detach() for each in model.encode(images.flatten(1).to(z)))
        found = [gap(mean, logvar)]
        for start in (mean, z[log_p.argmax(1)]):  # of the encoder, and at the peak of p(z|x)
            q = [each.clone().requires_grad_() for each in (start, logvar)]
            optimizer = torch.optim.Adam(q, lr=0.06)
            for _ in range(steps):
                loss = gap(*q)
                found.append(loss.detach())
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
        gaps.append(torch.stack([found[0], torch.stack(found).amin(0)]))
    return torch.cat(gaps, 1)


def _log_joint(model, x, z):
    """Return log p(x|z) + log p(z) of each image x (N, D) and each z (M, z_size), (N, M)."""
    logits = _logits(model, z)
    return torch.addmm(_log_prior(z) - F.softplus(logits).sum(1), x, logits.T)


def _logits(model, z):
    """Return the logits of the Bernoulli means of p(x|z), from the means themselves if that is all that `model` has."""
    return model.decode_logits(z) if hasattr(model, "decode_logits") else model.decode(z).logit(eps=1e-7)


def _log_prior(z, prior=None):
    zero = z.new_zeros(())
    return _log_normal(z, zero, zero) if prior is None else prior.log_prob(z)


def _log_normal(z, mean, logvar):
    """Return log N(z; mean, diag(exp(logvar))), summed over the last dimension."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean).square() / logvar.exp()).sum(-1)
