"""Generative adversarial network of fully connected layers (Goodfellow et al. 2014, arXiv 1406.2661).

The generator G maps noise z ~ N(0, I) to an image, the discriminator D gives the logit of "this image
is real". Both use LeakyReLU throughout; dropout regularises the discriminator alone.
"""

import torch
from torch import nn

IMAGE_SHAPE = (1, 28, 28)
NUM_PIXELS = 28 * 28
LEAKY_SLOPE = 0.2


class Discriminator(nn.Module):
    """Logit of the probability that an image is real.

    Args:
        channels: units of each hidden layer, first to last.
        dropout: probability with which each hidden unit is dropped in training.
    """

    def __init__(self, channels=(256, 128, 64), dropout=0.1):
        super().__init__()
        layers, width = [], NUM_PIXELS
        for hidden in channels:
            layers += [nn.Linear(width, hidden), nn.LeakyReLU(LEAKY_SLOPE), nn.Dropout(dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x):
        """(N, 1, 28, 28) or (N, 784) images in [-1, 1] -> (N, 1) logits, no sigmoid."""
        return self.layers(x.flatten(1))


class Generator(nn.Module):
    """Image from noise.

    Args:
        dim_z: dimensions of the noise.
        channels: units of each hidden layer, first to last.
    """

    def __init__(self, dim_z=100, channels=(64, 128, 256)):
        super().__init__()
        self.dim_z = dim_z
        layers, width = [], dim_z
        for hidden in channels:
            layers += [nn.Linear(width, hidden), nn.LeakyReLU(LEAKY_SLOPE)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, NUM_PIXELS), nn.Tanh())

    def forward(self, z):
        """(N, dim_z) noise -> (N, 784) pixels in [-1, 1]."""
        return self.layers(z)

    @torch.no_grad()
    def sample(self, num_samples, generator=None):
        """Draw (num_samples, 1, 28, 28) images in [0, 1].

        The noise comes from `generator` (a CPU `torch.Generator`; without one, a fresh one with seed 0),
        so the global random state is left alone and the draw is repeatable on every device.
        """
        generator = generator or torch.Generator().manual_seed(0)
        z = torch.randn(num_samples, self.dim_z, generator=generator)
        images = self(z.to(next(self.parameters()).device))
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
    """One optimiser step on -log D(x) - log(1 - D(G(z))), the discriminator's side of Eq. 1.

    Args:
        images: real images, (N, 1, 28, 28) or (N, 784), in [-1, 1].
        fake_images: the generator's, (N, 784); no gradient reaches the generator.
        criterion: mean binary cross-entropy on logits, `torch.nn.BCEWithLogitsLoss()`.
        real_label: target for real images; below 1 it is one-sided label smoothing
            (Salimans et al. 2016, arXiv 1606.03498, section 3.4).
        relativistic: put the difference of the logits of a real image and a fake one in the place of both
            (Huang et al. 2024, arXiv 2501.05441, section 2.1), so that the loss is twice theirs and has the
            optimum of Eq. 1. As many fakes as images are needed, and the logits that are returned are
            these differences.
        penalty: weight of `gradient_penalty`.

    Returns:
        (d_loss, outputs_real, outputs_fake, d_loss_fake): the summed loss without the penalty, the (N, 1)
        logits of the real and of the fake images, and the part of the loss that the fakes make.
    """
    images, fake_images = images.to(device).flatten(1), fake_images.detach().to(device).flatten(1)
    sizes = [len(images), len(fake_images)]
    x = torch.cat([images, fake_images]).requires_grad_(penalty > 0)
    # Without batch normalisation, one pass over both halves gives the logits of two.
    outputs = discriminator(x)
    outputs_real, outputs_fake = outputs.split(sizes)
    if relativistic:
        outputs_real, outputs_fake = outputs_real - outputs_fake, outputs_fake - outputs_real
    d_loss_fake = criterion(outputs_fake, torch.zeros_like(outputs_fake))
    d_loss = criterion(outputs_real, torch.full_like(outputs_real, real_label)) + d_loss_fake
    d_optimizer.zero_grad()
    (d_loss + penalty * gradient_penalty(x, outputs, sizes) if penalty else d_loss).backward()
    d_optimizer.step()
    return d_loss.detach(), outputs_real.detach(), outputs_fake.detach(), d_loss_fake.detach()


def gradient_penalty(x, outputs, sizes):
    """R1 + R2: half the mean of |gradient of D with respect to x|^2 over real images, plus the same over fakes.

    Mescheder et al. 2018 (arXiv 1801.04406), Eq. 9 and 10.

    Args:
        x: images, real ones first, (N + M, 784), that require gradients.
        outputs: their logits, (N + M, 1), each a function of its image alone.
        sizes: [N, M].
    """
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return sum(part.mean() / 2 for part in gradient.square().sum(1).split(sizes))


def train_generator(
    generator, g_optimizer, discriminator_outputs, criterion, device, saturating=False, outputs_real=None
):
    """One optimiser step on -log D(G(z)), the non-saturating loss (Goodfellow et al. 2014, section 3).

    Args:
        discriminator_outputs: (N, 1) logits D(G(z)), still attached to the generator's graph.
        criterion: mean binary cross-entropy on logits, `torch.nn.BCEWithLogitsLoss()`.
        saturating: minimise log(1 - D(G(z))) instead, the generator's side of Eq. 1, whose gradient vanishes
            where the discriminator is sure.
        outputs_real: (N, 1) logits of real images; with them the loss is the relativistic one, of the
            differences (Huang et al. 2024, arXiv 2501.05441, section 2.1).

    Returns:
        (g_loss, g_loss_fake): the loss that was minimised, and -log(1 - D(G(z))), what the same fakes cost
        the discriminator.
    """
    outputs = discriminator_outputs.to(device)
    if outputs_real is not None:
        outputs = outputs - outputs_real.detach().to(device)
    cost = criterion(outputs, torch.zeros_like(outputs))
    g_loss = -cost if saturating else criterion(outputs, torch.ones_like(outputs))
    # Differentiating with respect to the generator alone leaves no gradient behind in the discriminator.
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(g_loss, parameters)):
        parameter.grad = gradient
    g_optimizer.step()
    return g_loss.detach(), cost.detach()
