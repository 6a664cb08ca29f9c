"""Step 1: interface, losses worked out by hand, what an optimiser step may and may not touch."""

import csv
import inspect
import math

import pytest
import torch
from torch import nn

import hw2_step1_main as step1
from models.GAN import Discriminator, Generator, train_discriminator, train_generator

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


def test_label_smoothing_is_one_sided():
    discriminator = Discriminator().eval()
    for parameter in discriminator.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.0)
    x = torch.rand(4, 784)
    nn.init.constant_(discriminator.layers[-1].bias, 2.0)
    probability = 1 / (1 + math.exp(-2.0))
    d_loss, *_, d_loss_fake = train_discriminator(
        discriminator, optimizer, x, x, CRITERION, torch.device("cpu"), real_label=0.9
    )
    expected = -0.9 * math.log(probability) - 0.1 * math.log(1 - probability)
    assert (d_loss - d_loss_fake).item() == pytest.approx(expected, rel=1e-5)
    assert d_loss_fake.item() == pytest.approx(-math.log(1 - probability), rel=1e-5)


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
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert discriminator(generator(z)).mean() > outputs.mean()


def test_defaults_are_those_of_the_reported_run():
    defaults = {
        name: parameter.default
        for network in (Generator, Discriminator)
        for name, parameter in inspect.signature(network.__init__).parameters.items()
    }
    assert defaults["dim_z"] == step1.DEFAULTS["dim_z"] and defaults["dropout"] == step1.DEFAULTS["dropout"]
    assert (
        inspect.signature(Generator.__init__).parameters["channels"].default == step1.DEFAULTS["g_channels"]
    )
    assert (
        inspect.signature(Discriminator.__init__).parameters["channels"].default
        == step1.DEFAULTS["d_channels"]
    )


def test_knobs_of_the_training_loop():
    knobs = {"batch_size", "dim_z", "num_epochs", "d_learning_rate", "g_learning_rate", "d_freq"}
    assert knobs <= set(inspect.signature(step1.train_main_loop).parameters)
    assert callable(step1.monitor_images) and callable(step1.monitor_losses)


@pytest.mark.parametrize("d_freq", [1, 2, 5])
def test_generator_is_updated_once_in_d_freq_iterations_across_epochs(d_freq, call_step, tmp_path):
    done = call_step(step1, "--dry-run", "--d-freq", d_freq, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert [int(row["iteration"]) for row in rows] == list(range(1, 7))
    updated = [int(row["iteration"]) for row in rows if row["g_loss"]]
    assert updated == [iteration for iteration in range(1, 7) if iteration % d_freq == 0]


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
