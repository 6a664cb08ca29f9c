"""Generative adversarial network of fully connected layers (Goodfellow et al. 2014, arXiv 1406.2661).

The generator G turns noise z ~ N(0, I) into an image. The discriminator D gives the logit of "this image is
real". Both use LeakyReLU. Only the discriminator has dropout.
"""

import torch
from torch import nn

IMAGE_SHAPE = (1, 28, 28)
NUM_PIXELS = 28 * 28
LEAKY_SLOPE = 0.2


class Discriminator(nn.Module):
    """Network that tells real images from generated ones.

    Args:
        channels: units of each hidden layer, first to last.
        dropout: probability of dropping a hidden unit in training.

    Raises:
        ValueError: no hidden layer, a layer without units, or a dropout outside [0, 1).
    """

    def __init__(self, channels=(256, 128, 64), dropout=0.1):
        _check_widths(channels)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
        super().__init__()
        layers, width = [], NUM_PIXELS
        for hidden in channels:
            layers += [nn.Linear(width, hidden), nn.LeakyReLU(LEAKY_SLOPE), nn.Dropout(dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x):
        """Return the logits (N, 1), without a sigmoid, of images x (N, 1, 28, 28) or (N, 784) in [-1, 1]."""
        return self.layers(x.flatten(1))


class Generator(nn.Module):
    """Network that turns noise into an image.

    Args:
        dim_z: dimensions of the noise.
        channels: units of each hidden layer, first to last.

    Raises:
        ValueError: no noise, no hidden layer, or a layer without units.
    """

    def __init__(self, dim_z=100, channels=(64, 128, 256)):
        _check_widths(channels)
        if dim_z < 1:
            raise ValueError(f"dim_z must be at least 1, not {dim_z}")
        super().__init__()
        self.dim_z = dim_z
        layers, width = [], dim_z
        for hidden in channels:
            layers += [nn.Linear(width, hidden), nn.LeakyReLU(LEAKY_SLOPE)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, NUM_PIXELS), nn.Tanh())

    def forward(self, z):
        """Turn noise z (N, dim_z) into images (N, 784) in [-1, 1]."""
        return self.layers(z)

    @torch.no_grad()
    def sample(self, num_samples, generator=None):
        """Draw images in [0, 1], (num_samples, 1, 28, 28).

        Args:
            generator: CPU `torch.Generator` of the noise, by default a new one with seed 0. The global random
                state is not used, and every device gets the same noise.
        """
        generator = generator or torch.Generator().manual_seed(0)
        z = torch.randn(num_samples, self.dim_z, generator=generator)
        images = self(z.to(next(self.parameters())))
        return ((images + 1) / 2).reshape(-1, *IMAGE_SHAPE)


def train_discriminator(
    discriminator,
    d_optimizer,
    images,
    fake_images,
    criterion,
    device,
    real_label=1.0,
    relativistic=False,
    penalty=0.0,
):
    """Take one optimiser step on -log D(x) - log(1 - D(G(z))), the discriminator's side of Eq. 1.

    Args:
        images: real images, (N, 1, 28, 28) or (N, 784), in [-1, 1].
        fake_images: images of the generator, (N, 784). No gradient reaches the generator.
        criterion: mean binary cross-entropy on logits, `torch.nn.BCEWithLogitsLoss()`.
        real_label: target for real images. Below 1 it is one-sided label smoothing (Salimans et al. 2016,
            arXiv 1606.03498, section 3.4).
        relativistic: replace the logit of each image by its difference to the logit of an image of the other
            kind (Huang et al. 2024, arXiv 2501.05441, section 2.1). It takes pairs of real and fake images.
        penalty: weight of `gradient_penalty`.

    Returns:
        (d_loss, outputs_real, outputs_fake, d_loss_fake): the loss without the penalty, the logits (N, 1) of
        the real and of the fake images, and the part of the loss on the fake images.
    """
    images, fake_images = images.to(device).flatten(1), fake_images.detach().to(device).flatten(1)
    sizes = [len(images), len(fake_images)]
    # One pass over both halves is faster. Without batch normalisation it gives the same logits as two.
    x = torch.cat([images, fake_images]).requires_grad_(penalty > 0)
    outputs = discriminator(x)
    outputs_real, outputs_fake = outputs.split(sizes)
    if relativistic:
        outputs_real, outputs_fake = outputs_real - outputs_fake, outputs_fake - outputs_real
    d_loss_fake = criterion(outputs_fake, torch.zeros_like(outputs_fake))
    d_loss = criterion(outputs_real, torch.full_like(outputs_real, real_label)) + d_loss_fake
    loss = d_loss + penalty * gradient_penalty(x, outputs, sizes) if penalty else d_loss
    d_optimizer.zero_grad()  # also clears what the generator's step has left
    loss.backward()
    d_optimizer.step()
    return d_loss.detach(), outputs_real.detach(), outputs_fake.detach(), d_loss_fake.detach()


def gradient_penalty(x, outputs, sizes):
    """Return R1 + R2 (Mescheder et al. 2018, arXiv 1801.04406, Eq. 9 and 10).

    R1 is half the mean of |gradient of D with respect to x|^2 over the real images, R2 over the fake images.

    Args:
        x: images that require gradients, real ones first, (N + M, 784).
        outputs: their logits, (N + M, 1), each a function of its own image only.
        sizes: [N, M].
    """
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return sum(part.mean() / 2 for part in gradient.square().sum(1).split(sizes))


def train_generator(
    generator, g_optimizer, discriminator_outputs, criterion, device, saturating=False, outputs_real=None
):
    """Take one optimiser step on -log D(G(z)), the non-saturating loss (Goodfellow et al. 2014, section 3).

    `backward` leaves gradients in the discriminator, too. `train_discriminator` clears them before its step.

    Args:
        discriminator_outputs: logits D(G(z)), (N, 1), still attached to the graph of the generator.
        criterion: mean binary cross-entropy on logits, `torch.nn.BCEWithLogitsLoss()`.
        saturating: minimise log(1 - D(G(z))) instead, as in Eq. 1. Its gradient vanishes where D is sure.
        outputs_real: logits of real images, (N, 1), for the relativistic loss (Huang et al. 2024,
            arXiv 2501.05441, section 2.1). It takes the differences of the logits in place of D(G(z)).

    Returns:
        (g_loss, g_loss_fake): the minimised loss, and the discriminator's loss -log(1 - D(G(z))).
    """
    outputs = discriminator_outputs.to(device)
    if outputs_real is not None:
        outputs = outputs - outputs_real.detach().to(device)
    g_loss_fake = criterion(outputs, torch.zeros_like(outputs))
    g_loss = -g_loss_fake if saturating else criterion(outputs, torch.ones_like(outputs))
    g_optimizer.zero_grad()
    g_loss.backward()
    g_optimizer.step()
    return g_loss.detach(), g_loss_fake.detach()


def _check_widths(channels):
    if len(channels) == 0 or min(channels) < 1:
        raise ValueError(f"channels must list one or more hidden layers with at least 1 unit, not {channels}")
