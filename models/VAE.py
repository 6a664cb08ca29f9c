"""Variational autoencoder of fully connected layers (Kingma & Welling 2014, arXiv 1312.6114).

The encoder gives the mean and the log-variance of q(z|x) = N(mean, diag(exp(logvar))). The decoder gives the
Bernoulli means of p(x|z). The prior p(z) is N(0, I). Hidden layers use LeakyReLU. The decoder's output has a
sigmoid.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.common import IMAGE_SHAPE, NUM_PIXELS, checked, linear_layers


class VAE_model(nn.Module):
    """Encoder and mirrored decoder of images with `input_dim` pixels.

    Args:
        hidden_dims: [h1, h2, ..., 2 * latent]. These are the encoder's hidden layers, one or more, and its
            output, the mean beside the log-variance. The decoder has the hidden layers in reverse.
        decode_dim: pixels of the reconstruction, where -1 stands for input_dim.
    """

    def __init__(self, input_dim, hidden_dims, decode_dim=-1):
        super().__init__()
        self.decode_dim = input_dim if decode_dim == -1 else decode_dim
        *hidden, output = hidden_dims
        self.z_size = output // 2
        self.encoder = nn.Sequential(*linear_layers(input_dim, *hidden, output))
        widths = self.z_size, *reversed(hidden), self.decode_dim
        self.decoder = nn.Sequential(*linear_layers(*widths), nn.Sigmoid())

    def encode(self, x):
        """Return mean and logvar of q(z|x), (N, z_size) each, for images x (N, ...) in [0, 1]."""
        first = self.encoder[0]
        x = checked("x", x.flatten(1), ("N", first.in_features), first.weight)
        return self.encoder(x).chunk(2, dim=1)

    def reparameterize(self, mean, logvar):
        """Draw z = mean + sigma * epsilon with epsilon ~ N(0, I) (Kingma & Welling 2014, section 2.4)."""
        return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)

    def decode(self, z):
        """Return the Bernoulli means of the pixels, (N, decode_dim) in [0, 1], for z (N, z_size)."""
        return self.decoder(checked("z", z, ("N", self.z_size), self.decoder[0].weight))

    def decode_logits(self, z):
        """Return the logits of the Bernoulli means, (N, decode_dim), for z (N, z_size)."""
        return self.decoder[:-1](checked("z", z, ("N", self.z_size), self.decoder[0].weight))

    def forward(self, x):
        """Return a dict of the decoded `imgs` (N, decode_dim), and `z`, `mean`, `logvar` (N, z_size).

        One z for each image estimates the expectation of Eq. 2.
        """
        mean, logvar = self.encode(x)
        z = self.reparameterize(mean, logvar)
        return {"imgs": self.decode(z), "z": z, "mean": mean, "logvar": logvar}

    @torch.no_grad()
    def sample(self, num_samples, generator=None):
        """Decode z ~ N(0, I) to Bernoulli means in [0, 1], (num_samples, 1, 28, 28), if decode_dim is 784.

        `generator` draws z, a CPU `torch.Generator`, by default a new one with seed 0.
        """
        if self.decode_dim != NUM_PIXELS:
            raise ValueError(f"the decoder gives {self.decode_dim} pixels, which are no 28 x 28 image")
        generator = generator or torch.Generator().manual_seed(0)
        z = torch.randn(num_samples, self.z_size, generator=generator, dtype=torch.float32)
        return self.decode(z.to(next(self.parameters()).device)).reshape(-1, *IMAGE_SHAPE)


def reconstruction_loss(imgs, x):
    """Return -log p(x|z) = -sum_i [x_i log imgs_i + (1 - x_i) log(1 - imgs_i)], (N,), in nats per image.

    Kingma & Welling 2014, appendix C.1, for Bernoulli means `imgs` (N, D) and targets x (N, ...) in [0, 1].
    """
    # A diverged network gives NaN, for which binary_cross_entropy raises an error. We return NaN, and the run stops.
    nats = F.binary_cross_entropy(imgs.nan_to_num(), x.flatten(1).to(imgs.dtype), reduction="none").sum(dim=1)
    return nats.masked_fill(imgs.isnan().any(dim=1), torch.nan)


def kl_divergence(mean, logvar):
    """Return KL(N(mean, diag(exp(logvar))) || N(0, I)), (N,), in nats per image, for (N, z_size) each.

    Eq. 2 of the assignment, and Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (logvar.exp() + mean.square() - 1 - logvar).sum(dim=1)


def loss_terms(model, x):
    """Return the two terms of Eq. 2, reconstruction and KL: scalars in nats, means over the images x."""
    outputs = model(x)
    reconstruction = reconstruction_loss(outputs["imgs"], x).mean()
    return reconstruction, kl_divergence(outputs["mean"], outputs["logvar"]).mean()
