"""Sampling from step 2's networks: the cached sampler draws what the plain loop draws."""

import copy
import math

import pytest
import torch
from torch import nn

from models import AR
from models.AR import ConditionalMaskedConv2d, ConditionalPixelCNN, MaskedConv2d, PixelCNN
from tests.test_ar import ARCHITECTURES, SMALL, build, constant_network


def image_size(monkeypatch, height, width):
    """Let networks draw smaller images."""
    monkeypatch.setattr(AR, "IMAGE_SHAPE", (1, height, width))


def assert_cached_draws_what_plain_draws(network, what):
    cached = network.sample(what, torch.Generator().manual_seed(1))
    plain = network.sample(what, torch.Generator().manual_seed(1), cached=False)
    assert 0 < plain.mean() < 1 and torch.equal(cached, plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_sampling_draws_what_the_plain_loop_draws(architecture, monkeypatch):
    # The images are larger than the kernels reach from their centres, and smaller than the kernels.
    wide = architecture.get("first_kernel_size") == 27
    for size in [(15, 3), (3, 15)] if wide else [(7, 6)]:
        image_size(monkeypatch, *size)
        # In double precision the order of a sum changes no comparison with a random number.
        assert_cached_draws_what_plain_draws(build(PixelCNN, **architecture), 3)
        assert_cached_draws_what_plain_draws(build(ConditionalPixelCNN, **architecture), [0, 3, 6])
        assert_cached_draws_what_plain_draws(build(ConditionalPixelCNN, **architecture), [5])


def test_cached_sampling_of_the_default_networks(monkeypatch):
    """In single precision, as users call them, on parts of images."""
    image_size(monkeypatch, 4, 16)
    assert_cached_draws_what_plain_draws(PixelCNN(), 1)
    assert_cached_draws_what_plain_draws(ConditionalPixelCNN(), torch.tensor([7, 0]))


class WithoutBias(PixelCNN):
    def masked_layer(self, mask_type, in_channels, out_channels, kernel_size):
        padding = kernel_size // 2
        return MaskedConv2d(mask_type, in_channels, out_channels, kernel_size, 1, padding, bias=False)


class ConditionalWithoutBias(ConditionalPixelCNN):
    def masked_layer(self, mask_type, in_channels, out_channels, kernel_size):
        sizes = in_channels, out_channels, kernel_size, self.num_classes, 1, kernel_size // 2
        return ConditionalMaskedConv2d(mask_type, *sizes, bias=False)


class Normalised(PixelCNN):
    """With a normalisation whose input has to be an image."""

    def __init__(self, **architecture):
        super().__init__(**architecture)
        self.activation = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())


class TwoLayersInABlock(PixelCNN):
    def __init__(self, **architecture):
        super().__init__(**architecture)
        self.further = self.masked_layer("B", 5, 5, 3)

    def logits(self, x, convolve, position):
        return super().logits(
            x,
            lambda layer, h: convolve(self.further, h) if layer is self.blocks[1][0] else convolve(layer, h),
            position,
        )


@pytest.mark.parametrize(
    "network_class, what",
    [(WithoutBias, 2), (ConditionalWithoutBias, [4, 9]), (Normalised, 2), (TwoLayersInABlock, 2)],
)
def test_networks_that_a_reader_may_try_can_be_sampled(network_class, what, monkeypatch):
    image_size(monkeypatch, 6, 6)
    network = build(network_class, head_channels=5, pointwise=False)
    nn.init.normal_(network.head[-1].weight, std=3)
    assert_cached_draws_what_plain_draws(network, what)


@pytest.mark.parametrize("cached", [True, False])
def test_completion_keeps_the_given_rows_and_draws_the_rest(cached, monkeypatch):
    image_size(monkeypatch, 10, 8)
    network = build(PixelCNN)
    nn.init.normal_(network.head[-1].weight, std=3)  # so that the rows above matter
    whole = network.sample(3, cached=cached)
    # Completing the upper rows of a sample with the same random numbers gives that sample again.
    assert torch.equal(network.sample(3, cached=cached, given=whole[:, :, :5]), whole)
    given = 1 - whole[:, :, :5]
    completed = network.sample(3, cached=cached, given=given)
    assert torch.equal(completed[:, :, :5], given)
    assert not torch.equal(completed[:, :, 5:], whole[:, :, 5:])
    conditional = build(ConditionalPixelCNN)
    drawn = conditional.sample(torch.tensor([1, 2]), cached=cached)
    assert torch.equal(conditional.sample(torch.tensor([1, 2]), cached=cached, given=drawn[:, :, :1]), drawn)


def test_sampling_is_repeatable_and_leaves_the_global_state():
    network = PixelCNN(**SMALL)
    state = torch.get_rng_state()
    images = network.sample(4)
    assert torch.equal(state, torch.get_rng_state())
    assert images.shape == (4, 1, 28, 28) and set(images.unique().tolist()) == {0.0, 1.0}
    assert not images.requires_grad
    assert torch.equal(images, network.sample(4))
    assert not torch.equal(images, network.sample(4, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("cached", [True, False])
def test_sampling_is_in_eval_mode_and_restores_the_mode(cached, monkeypatch):
    image_size(monkeypatch, 6, 5)
    for network, what in (
        (PixelCNN(dropout=0.3, **SMALL), 4),
        (ConditionalPixelCNN(dropout=0.3, **SMALL), [1, 2]),
    ):
        first = network.sample(what, cached=cached)
        assert network.training and torch.equal(first, network.sample(what, cached=cached))
        assert torch.equal(first, network.eval().sample(what, cached=cached)) and not network.training
    network.train()
    with pytest.raises(RuntimeError):
        network.sample([1, 2], cached=cached, given=torch.zeros(2, 1, 3, 4))  # too narrow
    assert network.training


@pytest.mark.parametrize("dtype", [torch.double, torch.half, torch.bfloat16])
@pytest.mark.parametrize("cached", [True, False])
def test_networks_of_other_types_can_be_sampled(dtype, cached, monkeypatch):
    image_size(monkeypatch, 6, 5)
    for network, what in ((PixelCNN(**SMALL), 2), (ConditionalPixelCNN(**SMALL), [3, 8])):
        images = network.to(dtype).sample(what, cached=cached)
        assert (
            images.dtype is dtype and images.shape == (2, 1, 6, 5) and set(images.unique().tolist()) == {0, 1}
        )


def test_labels_are_a_list_with_one_class_per_image(monkeypatch):
    image_size(monkeypatch, 3, 3)
    network = build(ConditionalPixelCNN)
    for wrong in (3, torch.tensor(3), [[3]]):
        with pytest.raises(ValueError, match=r"\[3\]"):
            network.sample(wrong)
    expected = network.sample(torch.tensor([3, 4]))
    for labels in ([3, 4], (3, 4), torch.tensor([3, 4], dtype=torch.uint8)):
        assert torch.equal(network.sample(labels), expected)
    assert network.sample([]).shape == build(PixelCNN).sample(0).shape == (0, 1, 3, 3)


def test_samples_follow_the_probabilities(monkeypatch):
    """A network whose logits are a constant draws independent pixels with that probability."""
    image_size(monkeypatch, 14, 14)
    mean = constant_network(0.2).sample(256).mean().item()
    assert mean == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / (256 * 196)))


def test_a_copy_and_channels_last_draw_the_same(monkeypatch):
    image_size(monkeypatch, 6, 5)
    network = build(PixelCNN)
    changed = copy.deepcopy(network).to(memory_format=torch.channels_last)
    assert torch.equal(network.sample(3), changed.sample(3))
