"""The handout's own training loops and calls, argument for argument; tests/assignment checks the parts themselves."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hw2_step1_main as step1
import hw2_step3_main as step3
from models.AR import ConditionalPixelCNN, MaskedConv2d, PixelCNN
from models.GAN import Discriminator, Generator, train_discriminator, train_generator
from models.VAE import VAE_model

CRITERION = nn.BCEWithLogitsLoss()
DEVICE = torch.device("cpu")
SIZE = 28
NUM_IMAGES, BATCH_SIZE = 40, 16  # so that the last batch is short


@pytest.fixture
def loader():
    """Return batches of images in [0, 1] and labels. Images are black for the labels 0 to 4, and white for 5 to 9."""
    labels = torch.arange(NUM_IMAGES) % 10
    images = (labels > 4).float().view(-1, 1, 1, 1).repeat(1, 1, SIZE, SIZE)
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE, shuffle=True)


def test_gan(loader):
    dim_z, d_freq = 100, 2
    discriminator, generator = Discriminator().to(DEVICE), Generator(dim_z).to(DEVICE)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4)
    parameters = [*discriminator.parameters(), *generator.parameters()]
    before, iteration, g_losses = [each.clone() for each in parameters], 0, []
    for epoch in range(2):
        for images, _ in loader:
            images = (images * 2 - 1).to(DEVICE)
            noise = torch.randn(images.shape[0], dim_z).to(DEVICE)
            fake_images = generator(noise)
            d_loss, outputs_real, outputs_fake, d_loss_fake = train_discriminator(
                discriminator, d_optimizer, images, fake_images, CRITERION, DEVICE
            )
            iteration += 1
            if iteration % d_freq == 0:
                g_loss, g_loss_fake = train_generator(
                    generator, g_optimizer, discriminator(fake_images), CRITERION, DEVICE
                )
                g_losses.append((g_loss.item(), g_loss_fake.item()))
            assert outputs_real.shape == outputs_fake.shape == (len(images), 1)
            assert 0 < d_loss_fake.item() < d_loss.item() < 10
    assert len(g_losses) == 3 and all(0 < loss < 10 for pair in g_losses for loss in pair)
    assert not any(map(torch.equal, before, parameters))


@pytest.mark.parametrize("channels", [[32], (16, 16, 16, 16)])
def test_networks_of_the_gan_have_any_number_of_layers(channels):
    images, discriminator = Generator(10, channels)(torch.randn(3, 10)), Discriminator(channels).eval()
    assert images.shape == (3, 784) and discriminator(images).shape == (3, 1)
    assert torch.equal(discriminator(images), discriminator(images.view(3, 1, 28, 28)))


def test_the_discriminators_step_clears_what_the_generators_step_left():
    discriminator, generator = Discriminator(), Generator()
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    for parameter in discriminator.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    fake_images = generator(torch.randn(8, 100))
    train_discriminator(discriminator, optimizer, torch.rand(8, 784), fake_images, CRITERION, DEVICE)
    assert all(parameter.abs().max() < 10 for parameter in discriminator.parameters())
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_names_of_the_first_step_script():
    knobs = {"batch_size", "dim_z", "num_epochs", "d_learning_rate", "g_learning_rate", "d_freq"}
    assert knobs <= step1.train_main_loop.__kwdefaults__.keys()
    assert callable(step1.monitor_images) and callable(step1.monitor_losses)


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("kernel_size", [1, 3, 4, 7, (3, 5)])
def test_output_is_that_of_the_masked_weight(mask_type, kernel_size):
    for stride, padding in [(1, 0), (1, 1), (1, (3, 2)), (1, "valid"), (1, "same"), (2, 0), (2, (3, 2))]:
        layer = MaskedConv2d(mask_type, 3, 4, kernel_size, stride, padding, bias=stride == 1)
        x = torch.randn(2, 3, 11, 9)
        expected = F.conv2d(x, layer.weight * layer.mask, layer.bias, stride, padding)
        assert torch.allclose(layer(x), expected, atol=1e-5)


def one_hot(labels):
    return F.one_hot(torch.as_tensor(labels), num_classes=10).float().to(DEVICE)


@pytest.mark.parametrize("conditional", [False, True])
def test_pixelcnns_train_and_draw(conditional, loader):
    """The handout draws with a forward pass for each pixel, in images of any height and width."""
    model, losses = ConditionalPixelCNN(num_classes=10) if conditional else PixelCNN(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for x, labels in loader:
        x = (x > 0.5).float().to(DEVICE)
        logits = model(x, one_hot(labels)) if conditional else model(x)
        assert logits.shape == x.shape
        loss = CRITERION(logits, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    samples, y = torch.zeros(2, 1, 5, 4), [one_hot([3, 7])] if conditional else []
    model.eval()
    with torch.no_grad():
        for i, j in itertools.product(range(5), range(4)):
            samples[:, :, i, j] = torch.bernoulli(torch.sigmoid(model(samples, *y)[:, :, i, j]))
    assert set(samples.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("flat", [False, True])
def test_vae(flat, loader):
    model = VAE_model(784, [256, 128, 64, 4], 784).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    epoch_losses = []
    for epoch in range(8):
        running_loss = 0.0
        for x, _ in loader:
            x = (x.view(-1, 784) if flat else x).to(DEVICE)
            loss = step3.loss_func(model, x, 0.5)
            assert loss.shape == ()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item() * len(x)
        epoch_losses.append(running_loss / NUM_IMAGES)
    assert epoch_losses[0] == pytest.approx(784 * math.log(2), rel=0.05)
    assert epoch_losses[-1] < epoch_losses[0]
    outputs, (mean, logvar) = model(x), model.encode(x)
    assert set(outputs) == {"imgs", "z", "mean", "logvar"} and torch.equal(mean, outputs["mean"])
    assert model.decode(model.reparameterize(mean, logvar)).shape == outputs["imgs"].shape == (len(x), 784)


@pytest.mark.parametrize("hidden_dims, z_size", [([16, 4], 2), ([32, 16, 8, 10], 5), ([32] * 5 + [2], 1)])
def test_vae_of_any_number_of_layers(hidden_dims, z_size):
    model = VAE_model(input_dim=784, hidden_dims=hidden_dims, decode_dim=-1)
    assert model.z_size == z_size
    encoder = [*zip([784, *hidden_dims], hidden_dims)]
    decoder = [(b, a) for a, b in encoder[-2::-1]]
    layers = [each for each in model.modules() if isinstance(each, nn.Linear)]
    widths = [(each.in_features, each.out_features) for each in layers]
    assert widths == [*encoder, (z_size, hidden_dims[-2]), *decoder]
    imgs = model(torch.rand(2, 784))["imgs"]
    assert imgs.shape == (2, 784) and 0 <= imgs.min() and imgs.max() <= 1
    assert VAE_model(10, [8, 6], decode_dim=5).decode(torch.zeros(1, 3)).shape == (1, 5)


def test_latent_images(monkeypatch, tmp_path):
    """The handout's call works, and a path may be a text."""
    monkeypatch.chdir(tmp_path)
    model = VAE_model(784, [16, 4])
    step3.plot_latent_images(model, n=8, device=DEVICE)
    step3.plot_latent_images(model, str(tmp_path / "plane.png"))
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")
