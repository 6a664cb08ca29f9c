"""Checks of the GAN and the VAE: refused arguments, and networks in double or half precision."""

import math

import pytest
import torch

from models.GAN import Discriminator, Generator
from models.VAE import VAE_model
from utils.likelihoods import importance_bound, plane_log_likelihood


@pytest.mark.parametrize(
    "build, names",
    [
        (lambda: Generator(0), "dim_z"),
        (lambda: Generator(channels=[]), "channels"),
        (lambda: Generator(channels=[64, 0]), "channels"),
        (lambda: Discriminator([]), "channels"),
        (lambda: Discriminator([64, -3]), "channels"),
        (lambda: Discriminator(dropout=1.0), "dropout"),
        (lambda: Discriminator(dropout=-0.1), "dropout"),
        (lambda: Discriminator(dropout=math.nan), "dropout"),
        (lambda: VAE_model(784, []), "hidden_dims"),
        (lambda: VAE_model(784, [4]), "hidden_dims"),
        (lambda: VAE_model(784, [16, 3]), "even"),
        (lambda: VAE_model(784, [16, 0]), "at least 1"),
        (lambda: VAE_model(784, [16, -2]), "at least 1"),
        (lambda: VAE_model(784, [0, 4]), "at least 1"),
        (lambda: VAE_model(0, [16, 4]), "at least 1"),
        (lambda: VAE_model(784, [16, 4], 0), "at least 1"),
        (lambda: VAE_model(784, [16, 4], -2), "at least 1"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(build, names):
    with pytest.raises(ValueError, match=names) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.double, torch.half, torch.bfloat16])
@pytest.mark.parametrize("build", [Generator, lambda: VAE_model(784, [16, 4])])
def test_networks_of_other_types_draw_nearly_the_same(build, dtype):
    network = build()
    expected = network.sample(2)
    images = network.to(dtype).sample(2)
    assert images.dtype is dtype and images.shape == (2, 1, 28, 28)
    assert torch.allclose(images.float(), expected, atol=0.02)


@pytest.mark.parametrize("num_pixels", [1568, 3])
def test_a_vae_of_other_images_cannot_draw_28x28_images(num_pixels):
    with pytest.raises(ValueError, match=str(num_pixels)):
        VAE_model(784, [16, 4], num_pixels).sample(2)


def test_likelihoods_in_double_precision():
    model, x = VAE_model(6, [5, 4]), (torch.rand(3, 6) > 0.5).float()
    estimates = [importance_bound(model, x, 20), plane_log_likelihood(model, x, 0.5)]
    model, x = model.double(), x.double()
    in_double = [importance_bound(model, x, 20), plane_log_likelihood(model, x, 0.5)]
    for estimate, expected in zip(estimates, in_double):
        assert expected.dtype is torch.double and torch.allclose(estimate.double(), expected, atol=1e-4)
