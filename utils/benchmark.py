"""What the bundle's speed rests on, measured against the usual way: `python -m utils.benchmark`.

The two ways of feeding a training are timed in turn, several rounds; drawing images once each way, because
the plain loop takes minutes. The ratios are what counts: seconds depend on the machine and on what else it
does.
"""

import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from models.AR import MaskedConv2d, PixelCNN
from models.GAN import Discriminator, Generator, train_discriminator, train_generator
from models.VAE import VAE_model
from utils.data import batches, binarize, load_mnist, to_symmetric, to_unit
from utils.runs import ROOT, UserError, hardware, has_bfloat16_units, run_main

ROUNDS = 3
SHARE = 10  # a tenth of an epoch is timed each round
STEPS = 10
NUMS_SAMPLES = (1, 64, 256)


def gan_step():
    """One update of both of step 1's default networks and of the average, as a function of a batch in [-1, 1]."""
    options = step1.DEFAULTS
    generator = Generator(options["dim_z"], options["g_channels"])
    discriminator = Discriminator(options["d_channels"], options["dropout"])
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=options["g_learning_rate"])
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=options["d_learning_rate"])
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(options["ema_decay"]))
    criterion = nn.BCEWithLogitsLoss()

    def step(x):
        fake_images = generator(torch.randn(len(x), generator.dim_z))
        train_discriminator(discriminator, d_optimizer, x, fake_images, criterion, x.device)
        train_generator(generator, g_optimizer, discriminator(fake_images), criterion, x.device)
        averaged.update_parameters(generator)

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
    """Print the time of an epoch fed by `utils.data.batches` and by per-image transforms, and their ratio.

    Both are timed with the training step and without it, which is the feeding alone.
    """
    count = len(images) // SHARE
    subset = torch.utils.data.Subset(MNIST(ROOT / "data", train=True, transform=transform), range(count))

    def ours(step):
        for x, _ in batches(images[:count], labels[:count], batch_size, torch.Generator()):
            step(convert(x))

    def usual(step):
        for x, _ in DataLoader(subset, batch_size, shuffle=True):
            step(x)

    for what, work in (("epoch", step), ("feeding alone", lambda x: None)):
        seconds = [SHARE * each for each in interleave(lambda: ours(work), lambda: usual(work))]
        print(
            f"{name}, batch {batch_size}, {what}: {seconds[0]:.2f} s, with per-image transforms {seconds[1]:.2f} s, "
            f"ratio {seconds[1] / seconds[0]:.1f}"
        )


class FullKernelConv2d(MaskedConv2d):
    """The masked convolution as it is usually written: the zeros of the mask are multiplied like the rest."""

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


def time_pixelcnn(images):
    """Print the time of a training step of step 2's default network against two slower ways to compute it."""
    x = binarize(images[: step2.DEFAULTS["batch_size"]], "threshold")

    def steps(memory_format, bfloat16, **changes):
        network = PixelCNN(**step2.ARCHITECTURE, **changes).to(memory_format=memory_format)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)

        def work():
            for _ in range(STEPS):
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    logits = network(x)
                loss = F.binary_cross_entropy_with_logits(logits.float(), x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return work

    units = has_bfloat16_units(torch.device("cpu"))
    for bfloat16 in (True, False) if units else (False,):
        precision = "bfloat16" if bfloat16 else "single precision"
        ours, usual = interleave(
            steps(torch.channels_last, bfloat16),
            steps(torch.contiguous_format, bfloat16, conv=FullKernelConv2d),
        )
        print(
            f"step 2, training step, batch {len(x)}, {precision}: {1e3 * ours / STEPS:.0f} ms, with full kernels in "
            f"the default memory format {1e3 * usual / STEPS:.0f} ms, ratio {usual / ours:.1f}"
        )
    if units:
        bfloat16, single = interleave(*(steps(torch.channels_last, each) for each in (True, False)))
        print(
            f"step 2, training step, batch {len(x)}: bfloat16 {1e3 * bfloat16 / STEPS:.0f} ms, single precision "
            f"{1e3 * single / STEPS:.0f} ms, ratio {single / bfloat16:.1f}"
        )


def time_sampling():
    """Print the time of drawing images with and without the cache; whether they were equal every time.

    One forward pass is the limit: no sampler that computes every feature can do with less work.
    """
    network = step2.load_model(ROOT / "results" / step2.STEP / "model.pt")
    network.sample(1)
    all_equal = True
    for num_samples in NUMS_SAMPLES:
        seconds, images = [], []
        for cached in (True, False):
            started = time.perf_counter()
            images.append(network.sample(num_samples, cached=cached))
            seconds.append(time.perf_counter() - started)
        with torch.no_grad():
            started = time.perf_counter()
            network(images[0])
            seconds.append(time.perf_counter() - started)
        equal = torch.equal(*images)
        all_equal &= equal
        print(
            f"step 2, {num_samples} samples: cached {seconds[0]:.2f} s, one forward pass a pixel {seconds[1]:.1f} s, "
            f"ratio {seconds[1] / seconds[0]:.0f}, images {'equal' if equal else 'different'}; one forward pass of all "
            f"{seconds[2]:.3f} s"
        )
    return all_equal


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
    time_pixelcnn(images)
    if not time_sampling():
        raise UserError("the two samplers drew different images")


if __name__ == "__main__":
    run_main(main)
