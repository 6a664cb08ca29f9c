"""Our extras of step 2: the cached sampler draws what the plain loop draws, which draws where it cannot."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import AR, ar_sampler
from models.AR import ConditionalPixelCNN, PixelCNN
from models.ar_sampler import SlowSampling, can_cache
from tests import textbook
from tests.test_ar import ARCHITECTURES, SMALL, build, constant_network


def image_size(monkeypatch, height, width):
    """Let networks draw smaller images."""
    monkeypatch.setattr(AR, "IMAGE_SHAPE", (1, height, width))


@pytest.fixture(autouse=True)
def _small_images_and_no_slow_sampling(monkeypatch):
    """Let a test fail whose sampling falls back to the plain loop, unless it says so."""
    image_size(monkeypatch, 7, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowSampling)
        yield


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


def test_cached_sampling_of_the_default_network(monkeypatch):
    """In single precision, as users call it, on parts of images."""
    image_size(monkeypatch, 4, 16)
    assert_cached_draws_what_plain_draws(ConditionalPixelCNN(), torch.tensor([7, 0]))


class Normalised(PixelCNN):
    """With a normalisation whose input has to be an image."""

    def __init__(self, **architecture):
        super().__init__(**architecture)
        self.activation = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())


class PlainHead(PixelCNN):
    """With unmasked 1 x 1 layers, which need no mask."""

    def __init__(self, **architecture):
        super().__init__(**architecture)
        self.head = nn.ModuleList([nn.Conv2d(5, 5, 1), nn.Conv2d(5, 1, 1)])


@pytest.mark.parametrize("network_class", [Normalised, PlainHead])
def test_networks_that_a_reader_may_try_can_be_sampled(network_class):
    network = build(network_class, head_channels=5, pointwise=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    nn.init.normal_(network.head[-1].weight, std=3)
    assert_cached_draws_what_plain_draws(network, 2)


@pytest.mark.parametrize("same", [False, True])
def test_textbook_layers_in_place_of_ours_are_cached(same, monkeypatch):
    """They have none of our attributes, a mask of shape (1, 1, k, k), and perhaps padding="same"."""
    for theirs in (textbook.MaskedConv2d, textbook.ConditionalMaskedConv2d):

        def layer(*sizes, padding, of=theirs):
            made = of(*sizes, padding="same" if same else padding)
            made.mask = made.mask[:1, :1]
            return made

        monkeypatch.setattr(AR, theirs.__name__, layer)
    for network_class, what in ((PixelCNN, 3), (ConditionalPixelCNN, [0, 3, 6])):
        network = build(network_class, block="gated")
        assert isinstance(network.first, textbook.MaskedConv2d)
        assert_cached_draws_what_plain_draws(network, what)


class Unmasked(PixelCNN):
    """With a 3 x 3 layer that sees later pixels."""

    def __init__(self, **architecture):
        super().__init__(**architecture)
        self.blocks[1][0] = nn.Conv2d(5, 5, 3, padding=1)


class OpenMask(PixelCNN):
    """With a mask that shows one later pixel."""

    def __init__(self, **architecture):
        super().__init__(**architecture)
        self.blocks[0][0].mask[2, 1, -1, 0] = 1


class Shifted(PixelCNN):
    """With features that are moved down by a row in `logits`, as gated PixelCNNs do."""

    def logits(self, x, convolve, position):
        def shift_last(layer, h):
            return convolve(layer, F.pad(h, (0, 0, 1, 0))[:, :, :-1] if layer is self.head[0] else h)

        return super().logits(x, shift_last, position)


class Dilated(PixelCNN):
    def masked_layer(self, mask_type, in_channels, out_channels, kernel_size):
        layer = super().masked_layer(mask_type, in_channels, out_channels, kernel_size)
        more = dict(padding=kernel_size - 1, dilation=2)
        layer.forward = lambda x: F.conv2d(x, layer.weight * layer.mask, layer.bias, **more)
        return layer


@pytest.mark.parametrize("network_class", [Unmasked, OpenMask, Shifted, Dilated])
def test_the_plain_loop_draws_what_the_cache_cannot(network_class):
    network = build(network_class, head_channels=5)
    nn.init.normal_(network.head[-1].weight, std=3)
    assert not can_cache(network, (8, 1, 7, 6)) and can_cache(build(PixelCNN), (8, 1, 7, 6))
    for given in (None, torch.ones(3, 1, 2, 6)):
        with pytest.warns(SlowSampling, match="because") as warned:
            images = network.sample(3, given=given)
        assert len(warned) == 1
        assert torch.equal(images, network.sample(3, cached=False, given=given))


def test_a_mistake_in_the_network_keeps_its_traceback():
    network = PixelCNN(**SMALL).train()
    network.blocks[1][0].forward = lambda x: [1, 2][3]
    with pytest.raises(IndexError), pytest.warns(SlowSampling):
        network.sample(2)
    assert network.training


@pytest.mark.parametrize("cached", [True, False])
def test_images_do_not_depend_on_how_many_are_drawn_at_once(cached, monkeypatch):
    labels = torch.arange(7)
    network = build(ConditionalPixelCNN)
    whole = network.sample(labels, cached=cached)
    monkeypatch.setattr(ar_sampler, "CHUNK", 3)
    assert torch.equal(network.sample(labels, cached=cached), whole)
    assert torch.equal(network.sample(labels, cached=cached, given=whole[:, :, :2]), whole)


@pytest.mark.parametrize("cached", [True, False])
def test_completion_keeps_the_given_rows_and_draws_the_rest(cached):
    network = build(PixelCNN)
    nn.init.normal_(network.head[-1].weight, std=3)  # so that the rows above matter
    whole = network.sample(3, cached=cached)
    # Completing the upper rows of a sample with the same random numbers gives that sample again.
    assert torch.equal(network.sample(3, cached=cached, given=whole[:, :, :5]), whole)
    given = 1 - whole[:, :, :5]
    completed = network.sample(3, cached=cached, given=given)
    assert torch.equal(completed[:, :, :5], given)
    assert not torch.equal(completed[:, :, 5:], whole[:, :, 5:])


@pytest.mark.parametrize("cached", [True, False])
def test_sampling_is_in_eval_mode_and_restores_the_mode(cached):
    network = PixelCNN(dropout=0.3, **SMALL)
    first = network.sample(4, cached=cached)
    assert network.training and torch.equal(first, network.sample(4, cached=cached))
    assert torch.equal(first, network.eval().sample(4, cached=cached)) and not network.training


@pytest.mark.parametrize("dtype", [torch.double, torch.half, torch.bfloat16])
@pytest.mark.parametrize("cached", [True, False])
def test_networks_of_other_types_can_be_sampled(dtype, cached):
    for network, what in ((PixelCNN(**SMALL), 2), (ConditionalPixelCNN(**SMALL), [3, 8])):
        images = network.to(dtype).sample(what, cached=cached)
        assert images.dtype is dtype and images.shape == (2, 1, 7, 6)
        assert set(images.unique().tolist()) == {0, 1}


def test_samples_follow_the_probabilities(monkeypatch):
    """A network whose logits are a constant draws independent pixels with that probability."""
    image_size(monkeypatch, 14, 14)
    mean = constant_network(0.2).sample(256).mean().item()
    assert mean == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / (256 * 196)))
