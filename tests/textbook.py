"""Textbook solutions of the assignment, from its words and the handout's names alone, as a student writes them.

Tests put them in place of the project's classes, one at a time. They have none of the project's extras: no `sample`,
`logits` or `blocks`, no cast of the inputs, and a mask that is saved with the weights.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Generator(nn.Module):
    def __init__(self, dim_z=100, channels=[64, 128, 256]):
        super().__init__()
        layers = []
        for c in channels:
            layers.append(nn.Linear(dim_z, c))
            layers.append(nn.LeakyReLU(0.2))
            dim_z = c
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(dim_z, 784)

    def forward(self, z):
        return torch.tanh(self.out(self.hidden(z)))


class Discriminator(nn.Module):
    def __init__(self, channels=[256, 128, 64], dropout=0.3):
        super().__init__()
        dim = 784
        self.hidden = nn.ModuleList()
        for c in channels:
            self.hidden.append(nn.Linear(dim, c))
            dim = c
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(dim, 1)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        for layer in self.hidden:
            x = self.drop(F.leaky_relu(layer(x), 0.2))
        return self.out(x)


class MaskedConv2d(nn.Conv2d):
    def __init__(self, mask_type, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)
        if mask_type not in ("A", "B"):
            raise ValueError("mask_type must be 'A' or 'B'")
        kh, kw = self.kernel_size
        mask = torch.ones(1, 1, kh, kw)
        mask[:, :, kh // 2, kw // 2 :] = 0
        mask[:, :, kh // 2 + 1 :, :] = 0
        if mask_type == "B":
            mask[:, :, kh // 2, kw // 2] = 1
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class ConditionalMaskedConv2d(MaskedConv2d):
    def __init__(
        self, mask_type, in_channels, out_channels, kernel_size, num_classes, stride=1, padding=0, bias=True
    ):
        super().__init__(mask_type, in_channels, out_channels, kernel_size, stride, padding, bias)
        self.class_emb = nn.Linear(num_classes, out_channels, bias=False)

    def forward(self, x, y):
        return super().forward(x) + self.class_emb(y).unsqueeze(-1).unsqueeze(-1)


class PixelCNN(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [MaskedConv2d("A", 1, 16, 7, padding=3), nn.ReLU()]
        for _ in range(4):
            layers += [MaskedConv2d("B", 16, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU()]
        self.net = nn.Sequential(*layers, MaskedConv2d("B", 16, 1, 1))

    def forward(self, x):
        return self.net(x)


class ConditionalPixelCNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.first = ConditionalMaskedConv2d("A", 1, 16, 7, num_classes, padding=3)
        self.hidden = nn.ModuleList(
            [ConditionalMaskedConv2d("B", 16, 16, 5, num_classes, padding=2) for _ in range(4)]
        )
        self.last = ConditionalMaskedConv2d("B", 16, 1, 1, num_classes)

    def forward(self, x, y):
        h = F.relu(self.first(x, y))
        for layer in self.hidden:
            h = F.relu(layer(h, y))
        return self.last(h, y)


class VAE_model(nn.Module):
    def __init__(self, input_dim, hidden_dims, decode_dim=-1):
        super().__init__()
        if decode_dim == -1:
            decode_dim = input_dim
        self.z_size = hidden_dims[-1] // 2
        encoder, decoder = [], []
        previous = input_dim
        for dim in hidden_dims[:-1]:
            encoder += [nn.Linear(previous, dim), nn.LeakyReLU()]
            previous = dim
        encoder.append(nn.Linear(previous, 2 * self.z_size))
        previous = self.z_size
        for dim in hidden_dims[:-1][::-1]:
            decoder += [nn.Linear(previous, dim), nn.LeakyReLU()]
            previous = dim
        decoder += [nn.Linear(previous, decode_dim), nn.Sigmoid()]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)

    def encode(self, x):
        h = self.encoder(x.view(x.size(0), -1))
        return h[:, : self.z_size], h[:, self.z_size :]

    def reparameterize(self, mean, logvar):
        return mean + torch.exp(logvar / 2) * torch.randn_like(logvar)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        mean, logvar = self.encode(x)
        z = self.reparameterize(mean, logvar)
        return {"imgs": self.decode(z), "z": z, "mean": mean, "logvar": logvar}


def loss_func(model, x, coeff):
    out = model(x)
    x = x.view(x.size(0), -1)
    reconstruction = F.binary_cross_entropy(out["imgs"], x, reduction="sum") / x.size(0)
    kl = 0.5 * torch.sum(out["logvar"].exp() + out["mean"] ** 2 - 1 - out["logvar"]) / x.size(0)
    return reconstruction + coeff * kl
