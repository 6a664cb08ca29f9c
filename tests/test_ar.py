"""Step 2's networks: masks, causality, labels in every layer, refused arguments, likelihoods."""

import inspect
import itertools
import math
from typing import get_type_hints

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.AR import ConditionalMaskedConv2d, ConditionalPixelCNN, MaskedConv2d, PixelCNN
from tests.conftest import ROOT
from utils import pixelcnn_results
from utils.data import binarize

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


def test_masks_of_a_3x3_kernel():
    above, right_of_centre_and_below = [1, 1, 1], [0, 0, 0]
    for mask_type, row in (("A", [1, 0, 0]), ("B", [1, 1, 0])):
        mask = MaskedConv2d(mask_type, 2, 3, 3).mask
        expected = torch.tensor([above, row, right_of_centre_and_below]).float()
        assert torch.equal(mask, expected.expand(3, 2, 3, 3))


def test_mask_is_a_buffer_and_unknown_types_are_refused():
    layer = MaskedConv2d("A", 1, 1, 3)
    assert isinstance(layer, nn.Conv2d) and "mask" in dict(layer.named_buffers())
    for wrong in ("C", "a", "", None):
        with pytest.raises(ValueError, match="mask_type"):
            MaskedConv2d(wrong, 1, 1, 3)


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("kernel_size", [1, 3, 4, 7, (3, 5)])
def test_output_is_that_of_the_masked_weight(mask_type, kernel_size):
    for stride, padding, bias in itertools.product([1, 2], [0, 1, (3, 2)], [True, False]):
        layer = MaskedConv2d(mask_type, 3, 4, kernel_size, stride, padding, bias)
        x = torch.randn(2, 3, 11, 9)
        expected = F.conv2d(x, layer.weight * layer.mask, layer.bias, stride, padding)
        assert torch.allclose(layer(x), expected, atol=1e-5)


class HandoutMaskedConv2d(nn.Conv2d):
    """The handout's layer, whose state_dict holds the mask."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))


def test_a_state_dict_with_the_mask_loads_like_one_without():
    layer = MaskedConv2d("B", 2, 3, 3)
    mask = layer.mask.clone()
    saved = HandoutMaskedConv2d(2, 3, 3).state_dict()
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
    jacobian = jacobian.reshape(height * width, height * width)
    assert torch.equal(jacobian.triu(), torch.zeros_like(jacobian))
    if architecture.get("kernel_size") != 1:
        # A rectifier may happen to be shut at one pixel, not at all of them.
        assert (jacobian.diagonal(-1)[: width - 1] != 0).any()


def test_default_network_is_causal_at_every_pixel():
    """Changing a pixel of a 28 x 28 image changes no logit up to it: 784 perturbations of the default network."""
    network = PixelCNN().eval()
    x = torch.rand(1, 1, 28, 28)
    seen = []
    with torch.no_grad():
        logits = network(x)
        for pixels in torch.arange(784).split(112):
            changed = x.flatten().repeat(len(pixels), 1)
            changed[torch.arange(len(pixels)), pixels] += 1
            difference = (network(changed.view(-1, 1, 28, 28)) - logits).flatten(1).abs()
            assert difference[torch.arange(784)[None] <= pixels[:, None]].max() < 1e-4
            in_row = (pixels + 1) % 28 != 0
            seen.append(difference[in_row, pixels[in_row] + 1] > 1e-7)
    # The next pixel of the row sees the change, unless units happen to be shut.
    assert torch.cat(seen).float().mean() > 0.9


def test_conditional_layer_adds_v_y():
    layer = ConditionalMaskedConv2d("B", 2, 3, 3, num_classes=4, padding=1)
    assert layer.class_emb.bias is None
    labels = torch.tensor([0, 1, 2, 3, 1])
    x, y = torch.randn(5, 2, 6, 6), F.one_hot(labels, 4)
    plain = F.conv2d(x, layer.weight * layer.mask, layer.bias, padding=1)
    expected = plain + layer.class_emb.weight[:, labels].T[:, :, None, None]
    for one_hot in (y.float(), y, y.bool(), y.double()):  # cast to the weight's type
        assert torch.allclose(layer(x, one_hot), expected, atol=1e-5)


def test_signatures():
    plain = ["self", "mask_type", "in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"]
    assert list(inspect.signature(MaskedConv2d.__init__).parameters) == plain
    conditional = plain[:5] + ["num_classes"] + plain[5:]
    assert list(inspect.signature(ConditionalMaskedConv2d.__init__).parameters) == conditional


def test_label_reaches_every_masked_layer():
    network = ConditionalPixelCNN(10, **SMALL)
    masked = [module for module in network.modules() if isinstance(module, MaskedConv2d)]
    assert all(isinstance(module, ConditionalMaskedConv2d) for module in masked)
    y = F.one_hot(torch.tensor([1, 8]), 10)
    network(torch.rand(2, 1, 28, 28), y).square().sum().backward()
    assert len(masked) == 2 * len(network.blocks) + 3
    for module in masked:
        assert (module.class_emb.weight.grad[:, [1, 8]] != 0).any()
        assert (module.class_emb.weight.grad[:, [0, 2, 3, 4, 5, 6, 7, 9]] == 0).all()


def test_positions_of_other_sizes():
    """Smaller images use the first positions, larger ones repeat the last."""
    network = build(PixelCNN)
    vectors = network.position_vectors(30, 20)
    assert torch.equal(vectors[:, :28], network.position[:, :, :20])
    assert torch.equal(vectors[:, 29], network.position[:, 27, :20])
    assert network(torch.rand(2, 1, 30, 31, dtype=torch.float64)).shape == (2, 1, 30, 31)


# ---------------------------------------------------------------------------------------------------------
# The signature is the configuration


def test_every_argument_has_a_help_and_the_defaults_are_those_of_the_reported_run():
    parameters = list(inspect.signature(PixelCNN.__init__).parameters.values())[1:]
    hints = get_type_hints(PixelCNN.__init__, include_extras=True)
    for each in parameters:
        assert each.kind is inspect.Parameter.KEYWORD_ONLY
        (words,) = hints[each.name].__metadata__
        assert 3 <= len(words.split()) <= 12
    for step, conditional in (("step2_pixelcnn", False), ("step2_conditional_pixelcnn", True)):
        reported = torch.load(ROOT / "results" / step / "model.pt", weights_only=True)["network"]
        assert reported == {"conditional": conditional, **{each.name: each.default for each in parameters}}


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_blocks=-1),
        dict(channels=0),
        dict(head_channels=0),
        dict(first_kernel_size=4),
        dict(first_kernel_size=-1),
        dict(kernel_size=6),
        dict(kernel_size=0),
        dict(activation="no_such"),
        dict(activation="softmax"),  # torch.nn.functional has it, but it mixes features
        dict(block="bottleneck"),
        dict(dropout=1.0),
        dict(dropout=-0.1),
        dict(dropout=math.nan),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(wrong):
    for network_class in (PixelCNN, ConditionalPixelCNN):
        with pytest.raises(ValueError) as error:
            network_class(**wrong)
        assert next(iter(wrong)) in str(error.value) and "\n" not in str(error.value)


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes"):
        ConditionalPixelCNN(0)


# ---------------------------------------------------------------------------------------------------------
# Likelihoods


def test_receptive_field_and_its_blind_spot():
    """One 3 x 3 layer of each type sees what the masks show; the rest is the blind spot."""
    network = build(PixelCNN, num_blocks=1, first_kernel_size=3, kernel_size=3, activation="gelu").float()
    x = torch.rand(8, 1, 28, 28)
    labels = torch.zeros(8).long()
    seen = pixelcnn_results.receptive_field(network, x, labels, (10, 10), batch_size=3) > 0
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[10, 8:10] = True  # one step to the left by each layer
    expected[9, 8:12] = True  # up and at most one to the right, then one to the left at will
    expected[8, 8:13] = True
    assert torch.equal(seen, expected)


def test_label_log_likelihoods():
    network = build(ConditionalPixelCNN).float()
    x = (torch.rand(4, 1, 28, 28) > 0.8).float()
    table = pixelcnn_results.label_log_likelihoods(network, x)
    assert table.shape == (4, 10)
    for label in (0, 3, 9):
        y = F.one_hot(torch.full((4,), label), 10)
        expected = torch.distributions.Bernoulli(logits=network(x, y)).log_prob(x).flatten(1).sum(1)
        assert torch.allclose(table[:, label], expected, rtol=1e-4)


def test_nll_by_hand_and_its_mean_over_a_short_last_batch():
    """A constant probability p gives -k log p - (784 - k) log(1 - p) for an image of k white pixels."""
    network = constant_network(0.2)
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    for index in range(5):
        images[index].view(-1)[: 100 * index] = 255
    white = [100 * index for index in range(5)]
    expected = sum(-k * math.log(0.2) - (784 - k) * math.log(0.8) for k in white) / 5
    labels = torch.zeros(5, dtype=torch.long)
    nll = pixelcnn_results.evaluate(network, images, labels, "threshold")
    assert nll == pytest.approx(expected, rel=1e-5)
    x = binarize(images, "threshold")
    in_batches = pixelcnn_results.pixel_nll(network, x, labels, batch_size=2)
    assert in_batches.shape == (5, 1, 28, 28)
    assert in_batches.sum().item() / 5 == pytest.approx(expected, rel=1e-5)
    assert pixelcnn_results.bits_per_pixel(784 * math.log(2)) == pytest.approx(1)


def test_cross_entropy_is_the_negative_log_likelihood():
    """Minus the logarithm of the product of the pixels' probabilities, which are p and 1 - p."""
    network = build(PixelCNN)
    x = (torch.rand(3, 1, 28, 28) > 0.5).double()
    logits = network(x)
    p = 1 / (1 + (-logits).exp())
    likelihood = torch.where(x == 1, p, 1 - p).flatten(1).prod(1)
    assert likelihood.min() > 0
    assert torch.allclose(nn.BCEWithLogitsLoss()(logits, x) * 784, -likelihood.log().mean(), rtol=1e-9)
