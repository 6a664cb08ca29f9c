"""Step 2: masks, causality of every pixel, labels in every layer, sampling with and without the cache."""

import inspect
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hw2_step2_main as step2
from models import AR
from models.AR import ConditionalMaskedConv2d, ConditionalPixelCNN, MaskedConv2d, PixelCNN
from utils.data import binarize

SMALL = dict(num_layers=2, channels=5, head_channels=7, first_kernel_size=5)
ARCHITECTURES = [
    dict(),
    dict(block="plain", activation="relu", positional=False),
    dict(block="bottleneck", channels=6),
    dict(block="depthwise"),
    dict(block="gated", dropout=0.5, normalised=True),
    dict(first_kernel_size=27, activation="gelu"),
    dict(kernel_size=3, num_layers=3),
    dict(kernel_size=5, num_layers=0),
    dict(kernel_size=1, first_kernel_size=1),
]


def build(network_class, **architecture):
    """A small network in double precision whose positions differ, as they do after training."""
    network = network_class(**{**SMALL, **architecture}).double().eval()
    if network.position is not None:
        nn.init.normal_(network.position)
    return network


def test_masks_of_a_3x3_kernel():
    above, right_of_centre_and_below = [1, 1, 1], [0, 0, 0]
    a = MaskedConv2d("A", 2, 3, 3).mask
    b = MaskedConv2d("B", 2, 3, 3).mask
    assert a.shape == b.shape == (3, 2, 3, 3)
    assert torch.equal(
        a, torch.tensor([above, [1, 0, 0], right_of_centre_and_below]).expand(3, 2, 3, 3).float()
    )
    assert torch.equal(
        b, torch.tensor([above, [1, 1, 0], right_of_centre_and_below]).expand(3, 2, 3, 3).float()
    )


def test_mask_is_a_buffer_and_unknown_types_are_refused():
    layer = MaskedConv2d("A", 1, 1, 3)
    assert isinstance(layer, nn.Conv2d) and "mask" in dict(layer.named_buffers())
    for wrong in ("C", "a", "", None):
        with pytest.raises(ValueError, match="mask_type"):
            MaskedConv2d(wrong, 1, 1, 3)


@pytest.mark.parametrize(
    "mask_type, kernel_size, stride, padding, bias",
    list(itertools.product("AB", [1, 3, 7], [1, 2], [0, 1, 3], [True, False])),
)
def test_output_is_that_of_the_masked_weight(mask_type, kernel_size, stride, padding, bias):
    layer = MaskedConv2d(mask_type, 3, 4, kernel_size, stride, padding, bias)
    x = torch.randn(2, 3, 11, 9)
    expected = F.conv2d(x, layer.weight * layer.mask, layer.bias, stride, padding)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_channels(groups):
    layer = MaskedConv2d("B", 4, 8, 5, padding=2, groups=groups)
    x = torch.randn(2, 4, 6, 7)
    expected = F.conv2d(x, layer.weight * layer.mask, layer.bias, padding=2, groups=groups)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("conditional", [False, True])
def test_every_pixel_depends_on_earlier_pixels_alone(architecture, conditional):
    """The Jacobian of the logits is zero on and above the diagonal, for every pixel."""
    height, width = 9, 8
    if conditional:
        network = build(ConditionalPixelCNN, **architecture)
        y = F.one_hot(torch.tensor([4]), 10).double()
    else:
        network = build(PixelCNN, **architecture)
    x = torch.rand(1, 1, height, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, y) if conditional else network(x), x)
    jacobian = jacobian.reshape(height * width, height * width)
    assert torch.equal(jacobian.triu(), torch.zeros_like(jacobian))
    if architecture.get("kernel_size") != 1:
        # A rectifier may happen to be shut at one pixel, not at all of them.
        assert (jacobian.diagonal(-1)[: width - 1] != 0).any()


def test_default_network_is_causal_at_every_pixel():
    """Changing a pixel of a 28 x 28 image changes no logit up to it: 784 perturbations of the default network."""
    network = PixelCNN().eval()
    x = torch.rand(1, 1, 28, 28)
    with torch.no_grad():
        logits = network(x).flatten()
        for start in range(0, 784, 112):
            pixels = torch.arange(start, start + 112)
            changed = x.flatten().repeat(112, 1)
            changed[torch.arange(112), pixels] += 1
            difference = (network(changed.view(-1, 1, 28, 28)).flatten(1) - logits).abs()
            earlier = torch.arange(784)[None] <= pixels[:, None]
            assert difference[earlier].max() < 1e-4
            within = pixels[(pixels + 1) % 28 != 0] - start
            # The next pixel of the row sees the change, unless rectifiers happen to be shut.
            assert (difference[within, pixels[within] + 1] > 1e-7).float().mean() > 0.9


def test_conditional_layer_adds_v_y():
    layer = ConditionalMaskedConv2d("B", 2, 3, 3, num_classes=4, padding=1)
    assert layer.class_emb.bias is None
    x, y = torch.randn(5, 2, 6, 6), F.one_hot(torch.tensor([0, 1, 2, 3, 1]), 4).float()
    plain = F.conv2d(x, layer.weight * layer.mask, layer.bias, padding=1)
    v = layer.class_emb.weight[:, [0, 1, 2, 3, 1]].T
    assert torch.allclose(layer(x, y), plain + v[:, :, None, None], atol=1e-5)


def test_defaults_are_those_of_the_reported_run():
    parameters = inspect.signature(PixelCNN.__init__).parameters
    assert {key: parameters[key].default for key in step2.ARCHITECTURE} == step2.ARCHITECTURE


def test_unknown_blocks_are_refused():
    with pytest.raises(ValueError, match="block"):
        PixelCNN(block="dense")


def test_signatures():
    plain = ["self", "mask_type", "in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"]
    assert list(inspect.signature(MaskedConv2d.__init__).parameters) == [*plain, "groups"]
    conditional = plain[:5] + ["num_classes"] + plain[5:]
    assert list(inspect.signature(ConditionalMaskedConv2d.__init__).parameters) == [*conditional, "groups"]


def test_label_reaches_every_masked_layer():
    network = ConditionalPixelCNN()
    masked = [module for module in network.modules() if isinstance(module, MaskedConv2d)]
    assert all(isinstance(module, ConditionalMaskedConv2d) for module in masked)
    y = F.one_hot(torch.tensor([1, 8]), 10).float()
    network(torch.rand(2, 1, 28, 28), y).square().sum().backward()
    assert len(masked) == len(network.blocks) + 3
    for module in masked:
        assert (module.class_emb.weight.grad[:, [1, 8]] != 0).any()
        assert (module.class_emb.weight.grad[:, [0, 2, 3, 4, 5, 6, 7, 9]] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_cached_sampling_draws_what_the_plain_loop_draws(architecture, num_samples, monkeypatch):
    # Higher and wider than the largest kernel reaches from its centre, smaller than it is whole.
    monkeypatch.setattr(AR, "IMAGE_SHAPE", (1, 16, 15))
    # In double precision the order of a sum can change no comparison of a probability and a random number.
    plain, conditional = (build(each, **architecture) for each in (PixelCNN, ConditionalPixelCNN))
    labels = torch.arange(num_samples) * 3
    for seed in (0, 1):
        noise = torch.Generator()
        assert torch.equal(
            plain.sample(num_samples, noise.manual_seed(seed)),
            plain.sample(num_samples, noise.manual_seed(seed), cached=False),
        )
        assert torch.equal(
            conditional.sample(labels, noise.manual_seed(seed)),
            conditional.sample(labels, noise.manual_seed(seed), cached=False),
        )


@pytest.mark.parametrize("size, conditional", [("default", False), ("default", True), ("large", True)])
def test_cached_sampling_of_both_sizes(size, conditional, monkeypatch):
    """The named sizes, single precision, as users call them, but for the large network's smaller images."""
    if size == "large":
        monkeypatch.setattr(AR, "IMAGE_SHAPE", (1, 9, 16))
    changes = step2.VARIANTS["large"][1] if size == "large" else {}
    sizes = {key: changes.get(key, value) for key, value in step2.ARCHITECTURE.items()}
    network = step2.build_network(conditional, **sizes).eval()
    what = torch.tensor([7]) if conditional else 1
    assert torch.equal(network.sample(what), network.sample(what, cached=False))


@pytest.mark.parametrize("cached", [True, False])
def test_completion_keeps_the_given_rows_and_draws_the_rest(cached, monkeypatch):
    monkeypatch.setattr(AR, "IMAGE_SHAPE", (1, 22, 15))
    network = build(PixelCNN)
    nn.init.normal_(network.head[-1].weight, std=3)  # so that the rows above matter
    whole = network.sample(3, cached=cached)
    # Completing the upper rows of a sample with the same random numbers gives that sample again.
    assert torch.equal(network.sample(3, cached=cached, given=whole[:, :, :11]), whole)
    given = 1 - whole[:, :, :11]
    completed = network.sample(3, cached=cached, given=given)
    assert torch.equal(completed[:, :, :11], given) and not torch.equal(
        completed[:, :, 11:], whole[:, :, 11:]
    )
    conditional = build(ConditionalPixelCNN)
    drawn = conditional.sample(torch.tensor([1, 2]), cached=cached)
    assert torch.equal(conditional.sample(torch.tensor([1, 2]), cached=cached, given=drawn[:, :, :1]), drawn)


def test_positions_of_other_sizes():
    """Smaller images use the first positions, larger ones repeat the last."""
    network = build(PixelCNN)
    offset = network._offset(30, 20)
    assert torch.equal(offset[:, :28], network.position[:, :, :20])
    assert torch.equal(offset[:, 29], network.position[:, 27, :20])
    assert network(torch.rand(2, 1, 30, 31, dtype=torch.float64)).shape == (2, 1, 30, 31)


def test_receptive_field_and_its_blind_spot():
    """A 3 x 3 layer of each type and 1 x 1 layers see what the masks say; what is right of it above is blind."""
    network = build(PixelCNN, num_layers=1, first_kernel_size=3, kernel_size=3, activation="gelu").float()
    x = torch.rand(8, 1, 28, 28)
    seen = step2.receptive_field(network, x, torch.zeros(8).long(), (10, 10), batch_size=3) > 0
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[10, 8:10] = True  # one step to the left by each layer
    expected[9, 8:12] = True  # up and at most one to the right, then one to the left at will
    expected[8, 8:13] = True
    assert torch.equal(seen, expected)


def test_label_log_likelihoods_and_pixel_nll():
    network = build(ConditionalPixelCNN).float()
    x = (torch.rand(4, 1, 28, 28) > 0.8).float()
    table = step2.label_log_likelihoods(network, x)
    assert table.shape == (4, 10)
    for label in range(10):
        y = F.one_hot(torch.full((4,), label), 10).float()
        expected = torch.distributions.Bernoulli(logits=network(x, y)).log_prob(x).flatten(1).sum(1)
        assert torch.allclose(table[:, label], expected, rtol=1e-4)


def test_sampling_is_repeatable_and_leaves_the_global_state():
    network = PixelCNN(**SMALL).eval()
    state = torch.get_rng_state()
    images = network.sample(4)
    assert torch.equal(state, torch.get_rng_state())
    assert images.shape == (4, 1, 28, 28) and set(images.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(images, network.sample(4))
    assert not torch.equal(images, network.sample(4, torch.Generator().manual_seed(1)))


def test_samples_follow_the_probabilities():
    """A network whose logits are a constant draws independent pixels with that probability."""
    network = PixelCNN(**SMALL)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(network.head[-1].bias, math.log(0.2 / 0.8))
    share = network.sample(64).mean().item()
    assert share == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / (64 * 784)))


def test_nll_by_hand_and_its_mean_over_a_short_last_batch():
    """A constant probability p gives -k log p - (784 - k) log(1 - p) for an image of k white pixels."""
    network = PixelCNN(**SMALL)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(network.head[-1].bias, math.log(0.2 / 0.8))
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    for index in range(5):
        images[index].view(-1)[: 100 * index] = 255
    white = [100 * index for index in range(5)]
    expected = sum(-k * math.log(0.2) - (784 - k) * math.log(0.8) for k in white) / 5
    labels = torch.zeros(5, dtype=torch.long)
    assert step2.evaluate(network, images, labels, "threshold") == pytest.approx(expected, rel=1e-5)
    in_batches = step2.pixel_nll(network, binarize(images, "threshold"), labels, batch_size=2)
    assert in_batches.shape == (5, 1, 28, 28)
    assert in_batches.sum().item() / 5 == pytest.approx(expected, rel=1e-5)
    assert step2.bits_per_pixel(784 * math.log(2)) == pytest.approx(1)


def test_cross_entropy_is_the_negative_log_likelihood():
    """Minus the logarithm of the product of the pixels' probabilities, which are p and 1 - p."""
    network = PixelCNN(**SMALL).double().eval()
    x = (torch.rand(3, 1, 28, 28) > 0.5).double()
    logits = network(x)
    p = 1 / (1 + (-logits).exp())
    likelihood = torch.where(x == 1, p, 1 - p).flatten(1).prod(1)
    assert likelihood.min() > 0
    assert torch.allclose(nn.BCEWithLogitsLoss()(logits, x) * 784, -likelihood.log().mean(), rtol=1e-9)


@pytest.mark.parametrize("variant", [None, "average"])
def test_the_average_of_the_weights_is_what_is_kept(variant, call_step, small_steps, tmp_path):
    """In model.pt: the average where a variant asks for it, the last weights otherwise."""
    flags = ["--variant", variant] if variant else []
    assert call_step(step2, "--dry-run", "--out-dir", tmp_path, *flags).returncode == 0
    folder = tmp_path / "variants" / variant if variant else tmp_path
    last = torch.load(folder / "checkpoint.pt", weights_only=True)["tracked"]["network"]
    kept = torch.load(folder / "model.pt", weights_only=True)["weights"]
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], last[name]) for name in kept) == (variant is None)
