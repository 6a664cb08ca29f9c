"""Step 2: masks, causality of every pixel, labels in every layer, sampling with and without the cache."""

import inspect
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hw2_step2_main as step2
from models.AR import ConditionalMaskedConv2d, ConditionalPixelCNN, MaskedConv2d, PixelCNN

SMALL = dict(num_layers=2, channels=5, head_channels=7)
ARCHITECTURES = [
    dict(),
    dict(residual=False),
    dict(kernel_size=3, num_layers=3),
    dict(kernel_size=5, num_layers=0),
    dict(kernel_size=1),
]


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("conditional", [False, True])
def test_every_pixel_depends_on_earlier_pixels_alone(architecture, conditional):
    """The Jacobian of the logits is zero on and above the diagonal, for every pixel."""
    height, width = 9, 8
    if conditional:
        network = ConditionalPixelCNN(**{**SMALL, **architecture}).double()
        y = F.one_hot(torch.tensor([4]), 10).double()
    else:
        network = PixelCNN(**{**SMALL, **architecture}).double()
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


def test_cached_sampling_of_the_default_network_in_single_precision():
    network = PixelCNN(num_layers=3).eval()
    assert torch.equal(network.sample(2), network.sample(2, cached=False))


def test_signatures():
    plain = ["self", "mask_type", "in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"]
    assert list(inspect.signature(MaskedConv2d.__init__).parameters) == plain
    conditional = plain[:5] + ["num_classes"] + plain[5:]
    assert list(inspect.signature(ConditionalMaskedConv2d.__init__).parameters) == conditional


def test_label_reaches_every_masked_layer():
    network = ConditionalPixelCNN()
    masked = [module for module in network.modules() if isinstance(module, MaskedConv2d)]
    assert all(isinstance(module, ConditionalMaskedConv2d) for module in masked)
    y = F.one_hot(torch.tensor([1, 8]), 10).float()
    network(torch.rand(2, 1, 28, 28), y).square().sum().backward()
    assert len(masked) == len(network.layers) + 3
    for module in masked:
        assert (module.class_emb.weight.grad[:, [1, 8]] != 0).any()
        assert (module.class_emb.weight.grad[:, [0, 2, 3, 4, 5, 6, 7, 9]] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_cached_sampling_draws_what_the_plain_loop_draws(architecture, num_samples):
    # In double precision the order of a sum can change no comparison of a probability and a random number.
    plain = PixelCNN(**{**SMALL, **architecture}).double().eval()
    conditional = ConditionalPixelCNN(**{**SMALL, **architecture}).double().eval()
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
    nll = step2.evaluate(network, images, torch.zeros(5, dtype=torch.long), "threshold", batch_size=2)
    assert nll == pytest.approx(expected, rel=1e-5)
    assert step2.bits_per_pixel(784 * math.log(2)) == pytest.approx(1)


def test_cross_entropy_is_the_negative_log_likelihood():
    network = PixelCNN(**SMALL).eval()
    x = (torch.rand(3, 1, 28, 28) > 0.5).float()
    logits = network(x)
    likelihood = torch.distributions.Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(nn.BCEWithLogitsLoss()(logits, x) * 784, -likelihood.mean(), rtol=1e-5)
