"""The handout's training loops: its calls of `models/` and of the step scripts, argument for argument, still work."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hw2_step3_main as step3
from models.AR import ConditionalMaskedConv2d, ConditionalPixelCNN, MaskedConv2d, PixelCNN
from models.GAN import Discriminator, Generator, train_discriminator, train_generator
from models.VAE import VAE_model

DEVICE = torch.device("cpu")
SIZE = 28
NUM_IMAGES, BATCH_SIZE = 40, 16  # so that the last batch is short


@pytest.fixture
def loader():
    """Return batches of images in [0, 1] and labels. Images are black for the labels 0 to 4, and white for 5 to 9."""
    labels = torch.arange(NUM_IMAGES) % 10
    images = (labels > 4).float().view(-1, 1, 1, 1).repeat(1, 1, SIZE, SIZE)
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE, shuffle=True)


def weights(network):
    return [parameter.clone() for parameter in network.parameters()]


def changed(network, before):
    return all(not torch.equal(a, b) for a, b in zip(network.parameters(), before))


# ---------------------------------------------------------------------------------------------------------
# Step 1


def test_gan(loader):
    dim_z, d_freq = 100, 2
    discriminator, generator = Discriminator().to(DEVICE), Generator(dim_z).to(DEVICE)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4)
    criterion = nn.BCEWithLogitsLoss()
    before, iteration, g_losses = (weights(discriminator), weights(generator)), 0, []
    for epoch in range(2):
        for images, _ in loader:
            images = (images * 2 - 1).to(DEVICE)
            noise = torch.randn(images.shape[0], dim_z).to(DEVICE)
            fake_images = generator(noise)
            d_loss, outputs_real, outputs_fake, d_loss_fake = train_discriminator(
                discriminator, d_optimizer, images, fake_images, criterion, DEVICE
            )
            iteration += 1
            if iteration % d_freq == 0:
                g_loss, g_loss_fake = train_generator(
                    generator, g_optimizer, discriminator(fake_images), criterion, DEVICE
                )
                g_losses.append((g_loss.item(), g_loss_fake.item()))
            assert outputs_real.shape == outputs_fake.shape == (len(images), 1)
            assert 0 < d_loss_fake.item() < d_loss.item() < 10
    assert len(g_losses) == 3 and all(0 < loss < 10 for pair in g_losses for loss in pair)
    assert changed(discriminator, before[0]) and changed(generator, before[1])


@pytest.mark.parametrize("channels", [[256, 128, 64], [32], (16, 16, 16, 16)])
def test_gan_networks_by_position(channels):
    images = Generator(10, channels[::-1])(torch.randn(3, 10))
    assert images.shape == (3, 784) and Discriminator(channels)(images).shape == (3, 1)


# ---------------------------------------------------------------------------------------------------------
# Step 2


def test_masked_layers_by_position_and_by_name():
    x, y = torch.rand(2, 3, 9, 9), F.one_hot(torch.tensor([1, 4]), 10)
    assert MaskedConv2d("A", 3, 8, 7, 2, 3, False)(x).shape == (2, 8, 5, 5)
    named = dict(kernel_size=7, stride=2, padding=3, bias=False)
    assert MaskedConv2d(mask_type="B", in_channels=3, out_channels=8, **named)(x).shape == (2, 8, 5, 5)
    assert ConditionalMaskedConv2d("B", 3, 8, 7, 10, 2, 3, False)(x, y.float()).shape == (2, 8, 5, 5)
    named |= dict(num_classes=10)
    layer = ConditionalMaskedConv2d(mask_type="B", in_channels=3, out_channels=8, **named)
    assert layer(x, y).shape == (2, 8, 5, 5)  # integers, as F.one_hot returns them


def test_masked_layers_in_a_network_of_ones_own(loader):
    """A student's own stack trains, in `nn.Sequential` and with other layers between ours."""
    layers = [MaskedConv2d("A", 1, 8, 7, padding=3), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [MaskedConv2d("B", 8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)]
    losses = train_pixelcnn(nn.Sequential(*layers), loader, lambda x, _: (x,), epochs=5, learning_rate=1e-2)
    assert losses[-1] < losses[0]


def train_pixelcnn(model, loader, arguments, epochs=1, learning_rate=1e-3):
    """Train as the handout does; return the loss of each batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    criterion, losses = nn.BCEWithLogitsLoss(), []
    model.train()
    for _ in range(epochs):
        for x, labels in loader:
            x = (x > 0.5).float().to(DEVICE)
            logits = model(*arguments(x, labels))
            assert logits.shape == x.shape
            loss = criterion(logits, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def draw(model, shape, *y):
    """Draw images as the handout does, with a forward pass for each pixel."""
    samples = torch.zeros(shape)
    model.eval()
    with torch.no_grad():
        for i in range(shape[2]):
            for j in range(shape[3]):
                probabilities = torch.sigmoid(model(samples, *y)[:, :, i, j])
                samples[:, :, i, j] = torch.bernoulli(probabilities)
    return samples


def test_pixelcnn(loader):
    model = PixelCNN().to(DEVICE)
    losses = train_pixelcnn(model, loader, lambda x, _: (x,))
    assert losses[-1] < losses[0]
    assert set(draw(model, (2, 1, 5, 4)).unique().tolist()) <= {0.0, 1.0}  # any height and width


def test_conditional_pixelcnn(loader):
    """With one-hot labels, it learns the images of each."""
    model = ConditionalPixelCNN(num_classes=10, num_blocks=1, channels=8, kernel_size=3, head_channels=8)

    def arguments(x, labels):
        return x, F.one_hot(labels, num_classes=10).float().to(DEVICE)

    losses = train_pixelcnn(model, loader, arguments, epochs=10, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    y = F.one_hot(torch.tensor([0, 9]), num_classes=10).float()
    black, white = draw(model, (2, 1, 6, 6), y)
    assert black.mean() < 0.2 and white.mean() > 0.8


def test_conditional_pixelcnn_by_default():
    model = ConditionalPixelCNN(10)
    x, y = torch.zeros(2, 1, SIZE, SIZE), F.one_hot(torch.tensor([3, 7]), num_classes=10).float()
    assert model(x, y).shape == (2, 1, SIZE, SIZE)


# ---------------------------------------------------------------------------------------------------------
# Step 3


@pytest.mark.parametrize("flat", [False, True])
def test_vae(flat, loader):
    model = VAE_model(784, [256, 128, 64, 4], 784).to(DEVICE)
    assert model.z_size == 2
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
    assert (
        epoch_losses[0] == pytest.approx(784 * math.log(2), rel=0.05) and epoch_losses[-1] < epoch_losses[0]
    )
    outputs = model(x)
    assert list(outputs) == ["imgs", "z", "mean", "logvar"]
    assert outputs["imgs"].shape == (len(x), 784) and outputs["z"].shape == (len(x), 2)
    mean, logvar = model.encode(x)
    assert torch.equal(mean, outputs["mean"]) and torch.equal(logvar, outputs["logvar"])
    assert model.decode(model.reparameterize(mean, logvar)).shape == (len(x), 784)


@pytest.mark.parametrize("hidden_dims, z_size", [([16, 4], 2), ([32, 16, 8, 10], 5), ([32] * 5 + [2], 1)])
def test_vae_of_any_number_of_layers(hidden_dims, z_size):
    model = VAE_model(input_dim=784, hidden_dims=hidden_dims, decode_dim=-1)
    assert model.z_size == hidden_dims[-1] // 2 == z_size
    assert model(torch.rand(2, 784))["imgs"].shape == (2, 784)


def test_latent_images(monkeypatch, tmp_path):
    """The handout's call works, and a path may be a text."""
    monkeypatch.chdir(tmp_path)
    model = VAE_model(784, [16, 4])
    step3.plot_latent_images(model, n=8, device=DEVICE)
    step3.plot_latent_images(model, str(tmp_path / "plane.png"))
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")
