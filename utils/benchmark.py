"""What the bundle's speed rests on, measured against the usual way: `python -m utils.benchmark`.

Each pair is timed in turn, several rounds, and the ratio of the medians is what counts: seconds depend on
the machine and on what else it does.
"""

import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from models.GAN import Discriminator, Generator, train_discriminator, train_generator
from models.VAE import VAE_model
from utils.data import batches, load_mnist, to_symmetric, to_unit
from utils.runs import ROOT, hardware, run_main

ROUNDS = 3
SHARE = 10  # a tenth of an epoch is timed each round
NUM_SAMPLES = 64


def gan_step():
    """One update of both of step 1's default networks, as a function of a batch in [-1, 1]."""
    options = step1.DEFAULTS
    generator = Generator(options["dim_z"], options["g_channels"])
    discriminator = Discriminator(options["d_channels"], options["dropout"])
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=options["g_learning_rate"])
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=options["d_learning_rate"])
    criterion = nn.BCEWithLogitsLoss()

    def step(x):
        fake_images = generator(torch.randn(len(x), generator.dim_z))
        train_discriminator(discriminator, d_optimizer, x, fake_images, criterion, x.device)
        train_generator(generator, g_optimizer, discriminator(fake_images), criterion, x.device)

    return step


def vae_step():
    """One update of step 3's default network, as a function of a batch in [0, 1]."""
    options = step3.DEFAULTS
    model = VAE_model(step3.NUM_PIXELS, [*options["hidden_dims"], 2 * options["latent_dim"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])

    def step(x):
        loss = step3.loss_func(model, x, options["kl_coeff"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def time_epochs(name, step, batch_size, convert, transform, images, labels):
    """Print the time of an epoch fed by `utils.data.batches` and by per-image transforms, and their ratio."""
    count = len(images) // SHARE

    def ours():
        for x, _ in batches(images[:count], labels[:count], batch_size, torch.Generator()):
            step(convert(x))

    subset = torch.utils.data.Subset(MNIST(ROOT / "data", train=True, transform=transform), range(count))

    def usual():
        for x, _ in DataLoader(subset, batch_size, shuffle=True):
            step(x)

    seconds = interleave(ours, usual)
    print(
        f"{name}, batch {batch_size}: epoch {SHARE * seconds[0]:.1f} s, "
        f"per-image transforms {SHARE * seconds[1]:.1f} s, ratio {seconds[1] / seconds[0]:.1f}"
    )


def time_sampling():
    """Print the time of drawing images with and without the cache, their ratio, and whether they are equal."""
    network = step2.load_model(ROOT / "results" / step2.STEP / "model.pt")
    network.sample(1)
    seconds, images = [], []
    for cached in (True, False):
        started = time.perf_counter()
        images.append(network.sample(NUM_SAMPLES, cached=cached))
        seconds.append(time.perf_counter() - started)
    equal = "equal" if torch.equal(*images) else "DIFFERENT"
    print(
        f"step 2, {NUM_SAMPLES} samples: cached {seconds[0]:.2f} s, one forward pass a pixel {seconds[1]:.1f} s, "
        f"ratio {seconds[1] / seconds[0]:.0f}, images {equal}"
    )


def interleave(*functions):
    """Median seconds of each, called in turn after one round of warm-up."""
    seconds = [[] for _ in functions]
    for round_ in range(ROUNDS + 1):
        for function, taken in zip(functions, seconds):
            started = time.perf_counter()
            function()
            if round_:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def main():
    torch.manual_seed(0)
    (images, labels), _ = load_mnist(ROOT / "data")
    print(hardware(torch.device("cpu")))
    symmetric = Compose([ToTensor(), Normalize(0.5, 0.5)])
    time_epochs("step 1", gan_step(), 128, to_symmetric, symmetric, images, labels)
    time_epochs("step 3", vae_step(), 256, to_unit, ToTensor(), images, labels)
    time_sampling()


if __name__ == "__main__":
    run_main(main)
