"""Mixture of Bernoulli distributions for binary images (Bishop 2006, section 9.3.3)."""

import torch
from torch import nn
from torch.nn import functional as F


class BernoulliMixture(nn.Module):
    """Choose one of the components, then draw each pixel with the component's own probability."""

    def __init__(self, components=50):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(components))
        self.pixels = nn.Parameter(torch.randn(components, 28 * 28))

    def forward(self, x):
        """Return log p(x), (N,) in nats, of images x (N, 1, 28, 28) in {0, 1}."""
        log_p = x.flatten(1) @ self.pixels.T + F.logsigmoid(-self.pixels).sum(1)  # of each component
        return (log_p + self.weights.log_softmax(0)).logsumexp(1)

    @torch.no_grad()
    def sample(self, num_samples, generator):
        """Draw images in {0, 1}, (num_samples, 1, 28, 28), with a CPU generator."""
        chosen = self.weights.softmax(0).cpu().multinomial(num_samples, True, generator=generator)
        return self.pixels[chosen].sigmoid().cpu().bernoulli(generator=generator).reshape(-1, 1, 28, 28)
