"""Our extras of all networks: `sample`, refused inputs, other precisions."""

import pytest
import torch
from torch.nn import functional as F

from models.AR import ConditionalPixelCNN, PixelCNN
from models.classifier import Classifier
from models.GAN import Discriminator, Generator
from models.VAE import VAE_model
from tests.test_ar import SMALL
from utils.likelihoods import importance_bounds, plane_log_likelihood

IMAGES = torch.zeros(2, 1, 28, 28)
Y = F.one_hot(torch.tensor([3, 8]), 10)


@pytest.mark.parametrize(
    "use, words",
    [
        (lambda: Discriminator()(IMAGES.byte()), r"x takes floats \(N, 784\), not torch.uint8 \(2, 784\)"),
        (lambda: Generator(5)(torch.zeros(2, 4)), r"z takes floats \(N, 5\)"),
        (lambda: ConditionalPixelCNN(**SMALL)(IMAGES[0], Y), r"x takes .*\(1, 28, 28\)"),
        (lambda: ConditionalPixelCNN(**SMALL)(IMAGES, Y[:, :9]), r"y takes floats \(N, 10\), not .*\(2, 9\)"),
        (lambda: PixelCNN(**SMALL).sample(2, given=IMAGES + 0.5), r"given takes .* in \{0, 1\} .*0.5"),
        (lambda: ConditionalPixelCNN(**SMALL).sample([3, 12]), r"labels takes .* 0 to 9, .*not \{12\}"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(use, words):
    with pytest.raises(ValueError, match=words) as error:
        use()
    assert "\n" not in str(error.value)


def uses():
    """Return networks with a function that gives their outputs for inputs in a dtype, and samples where they draw."""
    x, z = torch.rand(2, 1, 28, 28), torch.randn(2, 5)
    pixelcnn = dict(SMALL, block="gated")
    return [
        (Generator(5, [8]), lambda net, dtype: [net(z.to(dtype)), net.sample(2)]),
        (Discriminator([8]), lambda net, dtype: [net(x.to(dtype))]),
        (PixelCNN(**pixelcnn), lambda net, dtype: [net(x.to(dtype)), net.sample(2)]),
        (
            ConditionalPixelCNN(**pixelcnn),
            lambda net, dtype: [net(x.to(dtype), Y.to(dtype)), net.sample([1, 2])],
        ),
        (
            VAE_model(784, [8, 4]),
            lambda net, dtype: [*net.encode(x.to(dtype)), net.decode(z[:, :2].to(dtype)), net.sample(2)],
        ),
        (Classifier((2, 2)), lambda net, dtype: [net(x.to(dtype))]),
    ]


@pytest.mark.parametrize("index", range(6))
def test_inputs_of_any_precision_and_double_as_the_default(index):
    """Inputs are brought to the dtype of the weights, and random numbers stay those of single precision."""
    network, use = uses()[index]
    network.eval()
    with torch.no_grad():
        expected = use(network, torch.float32)
        for dtype in (torch.double, torch.half, torch.bfloat16):
            for got, wanted in zip(use(network, dtype), expected):
                assert got.dtype is wanted.dtype and torch.allclose(got, wanted, atol=0.03)
        torch.set_default_dtype(torch.double)
        try:
            double, _ = uses()[index]
            double.load_state_dict(network.state_dict())
            outputs = use(double.eval(), torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(each.dtype is torch.double for each in outputs)
    assert all(torch.allclose(a.float(), b, atol=1e-5) for a, b in zip(outputs, expected))


@pytest.mark.parametrize("build", [Generator, lambda: PixelCNN(**SMALL), lambda: VAE_model(784, [16, 4])])
def test_sampling_is_repeatable_and_leaves_the_global_state(build):
    network, state = build().eval(), torch.get_rng_state()
    first, noise = network.sample(6), torch.Generator().manual_seed(5)
    assert torch.equal(state, torch.get_rng_state()) and not first.requires_grad
    assert first.shape == (6, 1, 28, 28) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, network.sample(6))
    other = network.sample(6, noise)
    assert not torch.equal(first, other)
    assert torch.equal(other, network.sample(6, noise.manual_seed(5)))


def test_likelihoods_in_double_precision():
    model, x = VAE_model(6, [5, 4]), (torch.rand(3, 6) > 0.5).float()
    estimates = [importance_bounds(model, x, 20), plane_log_likelihood(model, x, 0.5)]
    model, x = model.double(), x.double()
    in_double = [importance_bounds(model, x, 20), plane_log_likelihood(model, x, 0.5)]
    for estimate, expected in zip(estimates, in_double):
        assert expected.dtype is torch.double and torch.allclose(estimate.double(), expected, atol=1e-4)
