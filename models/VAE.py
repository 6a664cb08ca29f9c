"""Variational autoencoder of fully connected layers (Kingma & Welling 2014, arXiv 1312.6114).

The encoder gives the mean and log-variance of q(z|x) = N(mean, diag(exp(logvar))), the decoder the
Bernoulli means of p(x|z); the prior p(z) is N(0, I). LeakyReLU throughout, a sigmoid at the end.
"""

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_SHAPE = (1, 28, 28)
LEAKY_SLOPE = 0.2


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

    Kingma & Welling 2014, appendix C.1. `imgs` (N, D) are Bernoulli means, `x` (N, ...) targets in [0, 1].
    """
    return F.binary_cross_entropy(imgs, x.flatten(1), reduction="none").sum(dim=1)


def kl_divergence(mean, logvar):
    """KL(N(mean, diag(exp(logvar))) || N(0, I)) = 1/2 sum_j (sigma_j^2 + mean_j^2 - 1 - log sigma_j^2).

    Eq. 2 of the assignment; Kingma & Welling 2014, appendix B. (N, z_size) each -> (N,), nats per image.
    """
    return 0.5 * (logvar.exp() + mean.square() - 1 - logvar).sum(dim=1)
