"""Step 1: interface, losses worked out by hand, what an optimiser step may and may not touch."""

import copy
import csv
import inspect
import json
import math

import pytest
import torch
from torch import nn

import hw2_step1_main as step1
from models.GAN import Discriminator, Generator, gradient_penalty, train_discriminator, train_generator
from tests import children
from utils.hyperparameters import defaults

CRITERION = nn.BCEWithLogitsLoss()


def linear_widths(network):
    return [
        (layer.in_features, layer.out_features) for layer in network.modules() if isinstance(layer, nn.Linear)
    ]


def test_default_networks_are_the_assignments():
    assert linear_widths(Generator()) == [(100, 64), (64, 128), (128, 256), (256, 784)]
    assert linear_widths(Discriminator()) == [(784, 256), (256, 128), (128, 64), (64, 1)]
    kinds = {type(module) for module in Generator().modules()}
    assert nn.LeakyReLU in kinds and nn.Dropout not in kinds
    assert sum(isinstance(module, nn.Dropout) for module in Discriminator().modules()) == 3
    for network in (Generator(), Discriminator()):
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@pytest.mark.parametrize("channels", [[32], [16, 32, 64, 128]])
def test_as_many_hidden_layers_as_channels(channels):
    assert len(linear_widths(Generator(dim_z=10, channels=channels))) == len(channels) + 1
    assert len(linear_widths(Discriminator(channels=channels))) == len(channels) + 1


def test_shapes_and_ranges():
    images = Generator(dim_z=7)(100 * torch.randn(5, 7))
    assert images.shape == (5, 784) and images.min() >= -1 and images.max() <= 1
    discriminator = Discriminator().eval()
    x = torch.randn(3, 1, 28, 28)
    assert discriminator(x).shape == (3, 1)
    assert torch.equal(discriminator(x), discriminator(x.flatten(1)))


def test_discriminator_gives_logits():
    discriminator = Discriminator()
    discriminator.layers[-1].bias.data.fill_(-50.0)
    assert discriminator(torch.zeros(2, 784)).max() < -10


def test_discriminator_loss_by_hand():
    """With all weights zero, the logit is the last bias, so every loss has a closed form."""
    discriminator = Discriminator().eval()
    for parameter in discriminator.parameters():
        nn.init.zeros_(parameter)
    bias = 0.7
    nn.init.constant_(discriminator.layers[-1].bias, bias)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    real, fake = torch.rand(4, 1, 28, 28), torch.rand(6, 784)
    d_loss, outputs_real, outputs_fake, d_loss_fake = train_discriminator(
        discriminator, optimizer, real, fake, CRITERION, torch.device("cpu")
    )
    probability = 1 / (1 + math.exp(-bias))
    assert d_loss_fake.item() == pytest.approx(-math.log(1 - probability), rel=1e-5)
    assert d_loss.item() == pytest.approx(-math.log(probability) - math.log(1 - probability), rel=1e-5)
    assert outputs_real.shape == (4, 1) and outputs_fake.shape == (6, 1)
    # d(-log s(b) - log(1 - s(b))) / db = 2 s(b) - 1: exactly one step of SGD was taken.
    assert discriminator.layers[-1].bias.item() == pytest.approx(bias - 0.1 * (2 * probability - 1), rel=1e-5)


class Weights(nn.Module):
    """A linear discriminator w x, or a generator whose logits are its weights."""

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return x @ self.w[:, None]


def softplus(x):
    return math.log(1 + math.exp(x))


def test_relativistic_discriminator_by_hand():
    """L = 2 mean log(1 + e^-t), t = w (x - G(z)), and dL/dw = -2 mean (x - G(z)) s(-t)."""
    real, fake, w = torch.randn(5, 3), torch.randn(5, 3), [0.5, -0.3, 0.8]
    discriminator = Weights(*w)
    d_loss, outputs_real, outputs_fake, d_loss_fake = train_discriminator(
        discriminator,
        torch.optim.SGD(discriminator.parameters(), lr=0.1),
        real,
        fake,
        CRITERION,
        "cpu",
        relativistic=True,
    )
    margins = [sum(a * b for a, b in zip(w, row)) for row in (real - fake).tolist()]
    assert (outputs_real - outputs_fake)[:, 0].tolist() == pytest.approx(margins, rel=1e-4)
    mean = sum(softplus(-margin) for margin in margins) / 5
    assert d_loss.item() == pytest.approx(2 * mean, rel=1e-5)
    assert d_loss_fake.item() == pytest.approx(mean, rel=1e-5)
    for j, weight in enumerate(w):
        slopes = [-2 * row[j] / (1 + math.exp(m)) for row, m in zip((real - fake).tolist(), margins)]
        assert discriminator.w[j].item() == pytest.approx(weight - 0.1 * sum(slopes) / 5, rel=1e-4)


def test_penalty_of_a_linear_discriminator():
    """R1 + R2 = |w|^2 / 2 + |w|^2 / 2, whatever the images, and a step of SGD follows its gradient, 2 w."""
    w, sizes = [0.6, -0.8, 2.0], [4, 6]
    x = torch.randn(10, 3, requires_grad=True)
    assert gradient_penalty(x, Weights(*w)(x), sizes).item() == pytest.approx(0.36 + 0.64 + 4.0)
    steps = []
    for penalty in (0.0, 0.25):
        discriminator = Weights(*w)
        optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
        d_loss, *_ = train_discriminator(
            discriminator, optimizer, x[:4].detach(), x[4:].detach(), CRITERION, "cpu", penalty=penalty
        )
        steps.append((d_loss, discriminator.w.detach()))
    assert torch.equal(steps[0][0], steps[1][0])
    assert (steps[0][1] - steps[1][1]).tolist() == pytest.approx(
        [0.1 * 0.25 * 2 * each for each in w], rel=1e-4
    )


def test_penalty_by_finite_differences():
    """Halves of different sizes, each with its own mean, of a network that is not linear."""
    discriminator, sizes, h = Discriminator(channels=[8]).double().eval(), [1, 3], 1e-6
    x = torch.randn(4, 784, dtype=torch.double)
    shifts = h * torch.eye(784, dtype=torch.double)
    with torch.no_grad():
        slopes = [(discriminator(each + shifts) - discriminator(each - shifts)) / (2 * h) for each in x]
    squares = [each.square().sum().item() for each in slopes]
    x.requires_grad_()
    penalty = gradient_penalty(x, discriminator(x), sizes).item()
    assert penalty == pytest.approx(squares[0] / 2 + sum(squares[1:]) / 3 / 2, rel=1e-5)


@pytest.mark.parametrize(
    "flags, loss, slope",
    [
        ({}, lambda t: softplus(-t), lambda t: -1 / (1 + math.exp(t))),
        ({"saturating": True}, lambda t: -softplus(t), lambda t: -1 / (1 + math.exp(-t))),
    ],
)
@pytest.mark.parametrize("real", [None, [0.3, -0.9, 1.1]])
def test_generator_losses_by_hand(flags, loss, slope, real):
    """Value and gradient at logits t, or t - t_real in the relativistic loss."""
    logits = [-2.0, 0.5, 3.0]
    generator = Weights(*logits)
    outputs_real = None if real is None else torch.tensor(real)[:, None].requires_grad_()
    g_loss, g_loss_fake = train_generator(
        generator,
        torch.optim.SGD(generator.parameters(), lr=0.3),
        generator(torch.eye(3)),
        CRITERION,
        "cpu",
        outputs_real=outputs_real,
        **flags,
    )
    ts = [t - r for t, r in zip(logits, real or [0.0] * 3)]
    assert g_loss.item() == pytest.approx(sum(map(loss, ts)) / 3, rel=1e-5)
    assert g_loss_fake.item() == pytest.approx(sum(map(softplus, ts)) / 3, rel=1e-5)
    expected = [logit - 0.3 * slope(t) / 3 for logit, t in zip(logits, ts)]
    assert generator.w.tolist() == pytest.approx(expected, rel=1e-5)


def test_saturating_gradient_vanishes_where_the_discriminator_is_sure():
    steps = []
    for saturating in (True, False):
        generator = Weights(-20.0)
        optimizer = torch.optim.SGD(generator.parameters(), lr=1.0)
        train_generator(generator, optimizer, generator(torch.eye(1)), CRITERION, "cpu", saturating)
        steps.append(generator.w.item() + 20)
    assert abs(steps[0]) < 1e-5 and steps[1] == pytest.approx(1, rel=1e-5)


def test_discriminator_step_leaves_the_generator_alone():
    generator, discriminator = Generator(), Discriminator()
    optimizer = torch.optim.Adam(discriminator.parameters())
    fake = generator(torch.randn(8, 100))
    train_discriminator(
        discriminator, optimizer, torch.rand(8, 1, 28, 28), fake, CRITERION, torch.device("cpu")
    )
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_generator_step():
    generator, discriminator = Generator(), Discriminator().eval()
    before = [parameter.clone() for parameter in [*generator.parameters(), *discriminator.parameters()]]
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    z = torch.randn(64, 100)
    outputs = discriminator(generator(z))
    probability = outputs.detach().sigmoid()
    g_loss, g_loss_fake = train_generator(generator, optimizer, outputs, CRITERION, torch.device("cpu"))
    assert g_loss.item() == pytest.approx(-probability.log().mean().item(), rel=1e-5)
    assert g_loss_fake.item() == pytest.approx(-(1 - probability).log().mean().item(), rel=1e-5)
    count = len(list(generator.parameters()))
    after = [*generator.parameters(), *discriminator.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(after[:count], before[:count]))
    assert all(torch.equal(a, b) for a, b in zip(after[count:], before[count:]))
    assert discriminator(generator(z)).mean() > outputs.mean()


def test_discriminator_step_does_not_see_the_generator_step_before_it():
    generator, discriminator = Generator(), Discriminator().eval()
    untouched = copy.deepcopy(discriminator)
    fake = generator(torch.randn(8, 100))
    g_optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    train_generator(generator, g_optimizer, discriminator(fake), CRITERION, "cpu")
    x = torch.rand(8, 784)
    for network in (discriminator, untouched):
        d_optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        train_discriminator(network, d_optimizer, x, fake, CRITERION, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(discriminator.parameters(), untouched.parameters()))


def test_defaults_are_those_of_the_networks():
    ours = defaults(step1.train_main_loop)
    generator, discriminator = (
        inspect.signature(network.__init__).parameters for network in (Generator, Discriminator)
    )
    assert ours["dropout"] == discriminator["dropout"].default
    assert generator["dim_z"].default == 100  # the handout's; the script has its own, which it passes on
    assert ours["g_channels"] == generator["channels"].default
    assert ours["d_channels"] == discriminator["channels"].default


def test_knobs_of_the_training_loop():
    knobs = {"batch_size", "dim_z", "num_epochs", "d_learning_rate", "g_learning_rate", "d_freq"}
    assert knobs <= defaults(step1.train_main_loop).keys()
    assert callable(step1.monitor_images) and callable(step1.monitor_losses)


@pytest.mark.parametrize("d_freq", [1, 2, 100])
def test_generator_is_updated_once_in_d_freq_iterations_across_epochs(
    d_freq, call_step, bare_steps, tmp_path
):
    flags = ["--dry-run", *children.FLAGS["gan"], "--batch-size", 16, "--d-freq", d_freq]
    done = call_step(step1, *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert [int(row["iteration"]) for row in rows] == list(range(1, 7))
    updated = [int(row["iteration"]) for row in rows if row["g_loss"]]
    assert updated == [iteration for iteration in range(1, 7) if iteration % d_freq == 0]
    assert ("g_loss" in json.loads((tmp_path / "metrics.json").read_text())) == bool(updated)


def test_sampling_is_repeatable_and_leaves_the_global_state():
    generator = Generator().eval()
    state = torch.get_rng_state()
    first = generator.sample(6)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (6, 1, 28, 28) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, generator.sample(6))
    noise = torch.Generator().manual_seed(5)
    assert not torch.equal(first, generator.sample(6, noise))
    assert torch.equal(generator.sample(6, noise.manual_seed(5)), generator.sample(6, noise.manual_seed(5)))
