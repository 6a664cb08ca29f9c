"""The optimal discriminator on densities that are known: D(x) = p_data(x) / (p_data(x) + p_g(x)).

Goodfellow et al. 2014 (arXiv 1406.2661), proposition 1. In one dimension it can be drawn beside the output of
a network, which the discriminator's step of step 1 trains.
"""

import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from models.GAN import train_discriminator

STEPS = 600
BATCH_SIZE = 1000
LEARNING_RATE = 2e-2


def mixture(weights, means, deviations):
    """Return the density of a mixture of Gaussians on the line."""
    parts = Normal(torch.tensor(means), torch.tensor(deviations))
    return MixtureSameFamily(Categorical(torch.tensor(weights)), parts)


P_DATA = mixture([0.4, 0.6], [-2.0, 1.5], [0.6, 0.9])
P_G = mixture([1.0], [0.0], [1.6])


def optimal_discriminator(p_data, p_g, x):
    """Return p_data / (p_data + p_g) at each of x."""
    return torch.sigmoid(p_data.log_prob(x) - p_g.log_prob(x))


def trained_discriminator(p_data, p_g, x):
    """Train a network to tell draws of p_data from draws of p_g; return its output at each of x, (N,)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed a GPU as well
        network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
        # The rate falls to zero, so that the noise of the last batches averages out.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        criterion = nn.BCEWithLogitsLoss()
        for _ in range(STEPS):
            real, fake = (density.sample((BATCH_SIZE, 1)) for density in (p_data, p_g))
            train_discriminator(network, optimizer, real, fake, criterion, "cpu")
            schedule.step()
    with torch.no_grad():
        return network(x[:, None]).sigmoid()[:, 0]
