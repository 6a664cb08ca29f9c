"""Our extras of step 2: options of the architecture, positions, state_dicts with a mask, likelihoods."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.AR import ConditionalPixelCNN, MaskedConv2d, PixelCNN
from tests import textbook
from tests.conftest import ROOT
from utils import pixelcnn_results
from utils.options import read_options

SMALL = dict(num_blocks=2, channels=5, head_channels=7, first_kernel_size=5)
ARCHITECTURES = [
    dict(),
    dict(block="plain", activation="relu", positional=False, channels=12),
    dict(block="gated", dropout=0.5),
    dict(first_kernel_size=27, activation="gelu"),
    dict(kernel_size=3, num_blocks=3, activation="silu"),
    dict(kernel_size=5, num_blocks=0),
    dict(kernel_size=1, first_kernel_size=1),
    dict(pointwise=False),
    dict(pointwise=False, block="gated"),
]


def build(network_class, **architecture):
    """Build a small network in double precision whose positions differ, as they do after training."""
    network = network_class(**{**SMALL, **architecture}).double().eval()
    if network.position is not None:
        nn.init.normal_(network.position)
    return network


def constant_network(p):
    """Build a network that predicts white with probability p for every pixel."""
    network = PixelCNN(**SMALL)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(network.head[-1].bias, math.log(p / (1 - p)))
    return network


def test_a_state_dict_with_the_mask_loads_like_one_without():
    layer = MaskedConv2d("B", 2, 3, 3)
    mask = layer.mask.clone()
    saved = textbook.MaskedConv2d("A", 2, 3, 3).state_dict()
    assert "mask" in saved and "mask" not in layer.state_dict()
    layer.load_state_dict(saved)
    assert torch.equal(layer.weight, saved["weight"]) and torch.equal(layer.mask, mask)
    layer.load_state_dict(MaskedConv2d("A", 2, 3, 3).state_dict())

    networks = [ConditionalPixelCNN(**SMALL) for _ in range(2)]
    saved = networks[0].state_dict()
    saved |= {name: torch.ones_like(mask) for name, mask in networks[0].named_buffers()}
    assert sum(name.endswith("mask") for name in saved) == 7
    networks[1].load_state_dict(saved)
    assert all(map(torch.equal, networks[0].parameters(), networks[1].parameters()))
    with pytest.raises(RuntimeError, match="Unexpected"):
        layer.load_state_dict({**layer.state_dict(), "musk": mask})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("conditional", [False, True])
def test_every_pixel_depends_on_earlier_pixels_alone(architecture, conditional):
    """The Jacobian of the logits is zero on and above the diagonal, for every pixel."""
    height, width = 8, 7
    network = build(ConditionalPixelCNN if conditional else PixelCNN, **architecture)
    y = [F.one_hot(torch.tensor([4]), 10)] if conditional else []
    x = torch.rand(1, 1, height, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, *y), x)
    jacobian = jacobian.reshape(height * width, -1)
    assert torch.equal(jacobian.triu(), torch.zeros_like(jacobian))
    if architecture.get("kernel_size") != 1:
        # A rectifier may happen to be shut at one pixel, not at all of them.
        assert (jacobian.diagonal(-1)[: width - 1] != 0).any()


def test_positions_of_other_sizes():
    """Smaller images use the first positions, larger ones repeat the last."""
    network = build(PixelCNN)
    vectors = network.position_vectors(30, 20)
    assert torch.equal(vectors[:, :28], network.position[:, :, :20])
    assert torch.equal(vectors[:, 29], network.position[:, 27, :20])
    assert network(torch.rand(2, 1, 30, 31, dtype=torch.float64)).shape == (2, 1, 30, 31)


def test_the_defaults_are_those_of_the_reported_runs():
    defaults = {name: each.default for name, each in read_options(PixelCNN).items()}
    for step, conditional in (("step2_pixelcnn", False), ("step2_conditional_pixelcnn", True)):
        reported = torch.load(ROOT / "results" / step / "model.pt", weights_only=True)["network"]
        assert reported == {"conditional": conditional, **defaults}


@pytest.mark.parametrize("wrong", [dict(activation="softmax"), dict(block="bottleneck")])
def test_other_choices_are_refused(wrong):
    """torch.nn.functional has softmax, but it mixes features; and any other block would be a residual one."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConditionalPixelCNN(**wrong)


def test_receptive_field_and_its_blind_spot():
    """One 3 x 3 layer of each type sees what the masks show; the rest is the blind spot."""
    network = build(PixelCNN, num_blocks=1, first_kernel_size=3, kernel_size=3, activation="gelu").float()
    x = torch.rand(8, 1, 28, 28)
    labels = torch.zeros(8).long()
    seen = pixelcnn_results.receptive_field(network, x, labels, (10, 10)) > 0
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[10, 8:10] = True  # one step to the left by each layer
    expected[9, 8:12] = True  # up and at most one to the right, then one to the left at will
    expected[8, 8:13] = True
    assert torch.equal(seen, expected)


def test_nll_by_hand_and_its_mean_over_a_short_last_batch():
    """A constant probability p gives -k log p - (784 - k) log(1 - p) for an image of k white pixels."""
    network, labels = constant_network(0.2), torch.zeros(5, dtype=torch.long)
    white = 100 * torch.arange(5)
    images = 255 * (torch.arange(784) < white[:, None]).view(5, 1, 28, 28).to(torch.uint8)
    expected = -(white * math.log(0.2) + (784 - white) * math.log(0.8)).mean().item()
    nll = pixelcnn_results.evaluate(network, images, labels, "threshold")
    assert nll == pytest.approx(expected, rel=1e-5)
    in_batches = pixelcnn_results.pixel_nll(network, images / 255, labels, batch_size=2)
    assert in_batches.shape == (5, 1, 28, 28)
    assert in_batches.sum().item() / 5 == pytest.approx(expected, rel=1e-5)
    assert pixelcnn_results.bits_per_pixel(784 * math.log(2)) == pytest.approx(1)
