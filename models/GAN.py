"""Generative adversarial network of fully connected layers (Goodfellow et al. 2014, arXiv 1406.2661).

The generator G turns noise z ~ N(0, I) into an image. The discriminator D gives the logit of "this image is
real". Both use LeakyReLU. Only the discriminator has dropout.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.common import IMAGE_SHAPE, NUM_PIXELS, checked, linear_layers

KIND_LENGTH = 2.0  # of the one-hot part of the noise


class Discriminator(nn.Module):
    """Network that tells real images from generated ones; `channels` are the units of its hidden layers."""

    def __init__(self, channels=(256, 128, 64), dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(*linear_layers(NUM_PIXELS, *channels, 1, dropout=dropout))

    def forward(self, x):
        """Return the logits (N, 1), without a sigmoid, of images x (N, 1, 28, 28) or (N, 784) in [-1, 1]."""
        return self.layers(checked("x", x.flatten(1), ("N", NUM_PIXELS), self.layers[0].weight))


class Generator(nn.Module):
    """Network that turns noise of `dim_z` dimensions (100 in the handout) into an image.

    With `kinds`, the last so many coordinates of the noise only choose: the network sees a one-hot vector of length
    KIND_LENGTH, at the largest of them. So kinds of images need not turn into one another.
    """

    def __init__(self, dim_z=100, channels=(64, 128, 256), kinds=0):
        super().__init__()
        self.dim_z, self.kinds = dim_z, kinds
        self.layers = nn.Sequential(*linear_layers(dim_z, *channels, NUM_PIXELS), nn.Tanh())

    def forward(self, z):
        """Turn noise z (N, dim_z) into images (N, 784) in [-1, 1]."""
        z = checked("z", z, ("N", self.dim_z), self.layers[0].weight)
        if self.kinds:
            z, choices = z.split([self.dim_z - self.kinds, self.kinds], 1)
            z = torch.cat([z, KIND_LENGTH * F.one_hot(choices.argmax(1), self.kinds)], 1)
        return self.layers(z)

    @torch.no_grad()
    def sample(self, num_samples, generator=None):
        """Draw images in [0, 1], (num_samples, 1, 28, 28).

        `generator` draws the noise, a CPU `torch.Generator`, by default a new one with seed 0.
        """
        generator = generator or torch.Generator().manual_seed(0)
        z = torch.randn(num_samples, self.dim_z, generator=generator, dtype=torch.float32)
        images = self(z.to(next(self.parameters()).device))
        return ((images + 1) / 2).reshape(-1, *IMAGE_SHAPE)


def train_discriminator(
    discriminator, d_optimizer, images, fake_images, criterion, device, relativistic=False, penalty=0.0
):
    """Take one optimiser step on -log D(x) - log(1 - D(G(z))), the discriminator's side of Eq. 1.

    Args:
        images: real images, (N, 1, 28, 28) or (N, 784), in [-1, 1].
        fake_images: generated images, (N, 784). No gradient reaches the generator.
        criterion: mean binary cross-entropy on logits, `torch.nn.BCEWithLogitsLoss()`.
        relativistic: take `relativistic_logits` in the loss. Both terms of the loss are then equal.
        penalty: weight of `gradient_penalty`, which is minimised as well but is no part of d_loss.

    Returns:
        (d_loss, outputs_real, outputs_fake, d_loss_fake), as in the handout. The outputs are logits (N, 1) before
        the step, and d_loss_fake is the loss on fake images alone.
    """
    images, fake_images = images.to(device).flatten(1), fake_images.detach().to(device).flatten(1)
    sizes = [len(images), len(fake_images)]
    # One pass is faster than two. Without batch normalisation, images do not influence one another.
    x = torch.cat([images, fake_images]).requires_grad_(penalty > 0)
    outputs = discriminator(x)
    outputs_real, outputs_fake = real, fake = outputs.split(sizes)
    if relativistic:
        real, fake = relativistic_logits(outputs_real, outputs_fake)
    d_loss_fake = criterion(fake, torch.zeros_like(fake))
    d_loss = criterion(real, torch.ones_like(real)) + d_loss_fake
    loss = d_loss + penalty * gradient_penalty(x, outputs, sizes) if penalty else d_loss
    d_optimizer.zero_grad()  # also clears what the generator's step has left
    loss.backward()
    d_optimizer.step()
    return d_loss.detach(), outputs_real.detach(), outputs_fake.detach(), d_loss_fake.detach()


def relativistic_logits(outputs_real, outputs_fake):
    """Return D(x) - D(G(z)) and D(G(z)) - D(x), logits (N, 1) of "this one of the two is real".

    Trained on these (Huang et al. 2024, arXiv 2501.05441, section 2.1), D fixes its own logits only up to a constant.
    """
    return outputs_real - outputs_fake, outputs_fake - outputs_real


def gradient_penalty(x, outputs, sizes):
    """Return R1 + R2 (Mescheder et al. 2018, arXiv 1801.04406, Eq. 9 and 10).

    R1 is half the mean of |gradient of D with respect to x|^2 over the real images, R2 over the fake images.
    The images x (N, 784) are sizes[0] real ones, then sizes[1] fake ones. `outputs` are their logits (N, 1).
    """
    # Each logit depends on its own image alone, so the gradient of the sum holds the gradient of every image.
    # create_graph: it will be differentiated again.
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    squares_real, squares_fake = gradient.square().sum(1).split(sizes)
    return squares_real.mean() / 2 + squares_fake.mean() / 2


def train_generator(
    generator, g_optimizer, discriminator_outputs, criterion, device, saturating=False, outputs_real=None
):
    """Take one optimiser step on -log D(G(z)), the non-saturating loss (Goodfellow et al. 2014, section 3).

    Args:
        generator: as in the handout, but not needed here: g_optimizer has its weights.
        discriminator_outputs: logits of G(z), (N, 1), still attached to the graph of the generator.
        saturating: minimise log(1 - D(G(z))) instead, as in Eq. 1. Its gradient vanishes where D is sure.
        outputs_real: logits of real images, (N, 1), for the relativistic loss of `train_discriminator`.

    Returns:
        (g_loss, g_loss_fake), as in the handout: the minimised loss, and the discriminator's -log(1 - D(G(z))).
    """
    outputs = discriminator_outputs.to(device)
    if outputs_real is not None:
        _, outputs = relativistic_logits(outputs_real.detach().to(device), outputs)
    g_loss_fake = criterion(outputs, torch.zeros_like(outputs))
    g_loss = -g_loss_fake if saturating else criterion(outputs, torch.ones_like(outputs))
    g_optimizer.zero_grad()
    g_loss.backward()  # leaves gradients in the discriminator, too, which `train_discriminator` clears
    g_optimizer.step()
    return g_loss.detach(), g_loss_fake.detach()
