"""What the bundle's speed rests on, measured against the usual way: `python -m utils.benchmark`.

The two ways of feeding a training are timed in turn, several rounds; drawing images once each way, because
the plain loop takes minutes. The ratios are what counts: seconds depend on the machine and on what else it
does. results/benchmark/metrics.json has them all.
"""

import statistics
import time
from itertools import cycle

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
from utils import runs
from utils.data import batches, binarize, load_mnist, to_symmetric, to_unit

ROUNDS = 3
SHARE = 10  # a tenth of an epoch is timed each round
STEPS = 10
NUMS_SAMPLES = (1, 64, 256)


def gan_step():
    """One update of both of step 1's default networks and of the average, as a function of a batch in [-1, 1]."""
    options = step1.DEFAULTS
    generator = Generator(options["dim_z"], options["g_channels"])
    discriminator = Discriminator(options["d_channels"], options["dropout"])
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=options["g_learning_rate"], fused=True)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=options["d_learning_rate"], fused=True)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(options["ema_decay"]))
    criterion = nn.BCEWithLogitsLoss()
    every = options["penalty_every"]
    penalties = cycle([options["penalty"] * every, *[0.0] * (every - 1)])

    def step(x):
        fake_images = generator(torch.randn(len(x), generator.dim_z))
        train_discriminator(
            discriminator, d_optimizer, x, fake_images, criterion, x.device, penalty=next(penalties)
        )
        train_generator(generator, g_optimizer, discriminator(fake_images), criterion, x.device)
        averaged.update_parameters(generator)

    return step


def vae_step():
    """One update of step 3's default network, as a function of a batch in [0, 1]."""
    options = step3.DEFAULTS
    model = VAE_model(step3.NUM_PIXELS, [*options["hidden_dims"], 2 * options["latent_dim"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"], fused=True)

    def step(x):
        loss = step3.loss_func(model, x, options["kl_coeff"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class FullKernelConv2d(MaskedConv2d):
    """The masked convolution as it is usually written: the zeros of the mask are multiplied like the rest."""

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


def compare_feeding(name, step, batch_size, convert, transform, images, labels):
    """An epoch fed by `utils.data.batches` against per-image transforms, with `step` and without it."""
    count = len(images) // SHARE
    subset = torch.utils.data.Subset(MNIST(runs.ROOT / "data", train=True, transform=transform), range(count))

    def ours(work):
        for x, _ in batches(images[:count], labels[:count], batch_size, torch.Generator()):
            work(convert(x))

    def usual(work):
        for x, _ in DataLoader(subset, batch_size, shuffle=True):
            work(x)

    return {
        f"{name}_{what}": ratio(
            f"{name}, {what}: per-image transforms / images in one tensor",
            *(SHARE * seconds for seconds in interleave(lambda: usual(work), lambda: ours(work))),
            batch_size=batch_size,
        )
        for what, work in (("epoch", step), ("feeding", lambda x: None))
    }


def compare_pixelcnn_steps(images):
    """A training step of step 2's default network against slower ways to compute it, and against depthwise blocks."""
    x = binarize(images[: step2.DEFAULTS["batch_size"]], "threshold")

    def steps(memory_format, bfloat16, **changes):
        network = PixelCNN(**{**step2.ARCHITECTURE, **changes}).to(memory_format=memory_format)
        optimizers = step2.make_optimizers(network, step2.DEFAULTS).values()
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(step2.DEFAULTS["ema_decay"]))

        def work():
            for _ in range(STEPS):
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    logits = network(x)
                loss = F.binary_cross_entropy_with_logits(logits.float(), x, reduction="sum") / len(x)
                network.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), step2.DEFAULTS["clip_norm"])
                for optimizer in optimizers:
                    optimizer.step()
                averaged.update_parameters(network)

        return work

    def compare(what, *works):
        seconds = (each / STEPS for each in interleave(*works))
        return ratio(f"step 2, training step: {what}", *seconds, batch_size=len(x))

    usual = dict(memory_format=torch.contiguous_format, conv=FullKernelConv2d)
    units = runs.has_bfloat16_units(torch.device("cpu"))
    entries = {
        "full_kernels": compare(
            "full kernels in the default memory format / rows that the mask leaves, single precision",
            steps(bfloat16=False, **usual),
            steps(torch.channels_last, bfloat16=False),
        ),
        "depthwise": compare(
            "the variant with depthwise blocks / the default",
            steps(torch.channels_last, units, **step2.VARIANTS["depthwise"][1]),
            steps(torch.channels_last, units),
        ),
    }
    if units:
        entries["full_kernels_bfloat16"] = compare(
            "full kernels in the default memory format / rows that the mask leaves, bfloat16",
            steps(bfloat16=True, **usual),
            steps(torch.channels_last, bfloat16=True),
        )
        entries["single_precision"] = compare(
            "single precision / bfloat16",
            *(steps(torch.channels_last, bfloat16) for bfloat16 in (False, True)),
        )
    return entries


def compare_samplers(num_samples):
    """Drawing with the cache against one forward pass a pixel, and against one of all pixels, which is the limit.

    Raises:
        UserError: the two have drawn different images.
    """
    network = step2.load_model(runs.ROOT / "results" / step2.STEP / "model.pt")
    network.sample(1)
    seconds, images = {}, {}
    for cached in (True, False):
        started = time.perf_counter()
        images[cached] = network.sample(num_samples, cached=cached)
        seconds[cached] = time.perf_counter() - started
    if not torch.equal(images[True], images[False]):
        raise runs.UserError(f"the two samplers drew different images of {num_samples}")
    with torch.no_grad():
        started = time.perf_counter()
        network(images[True])
        one_pass = time.perf_counter() - started
    return ratio(
        f"step 2, {num_samples} samples, equal images: one forward pass a pixel / cached",
        seconds[False],
        seconds[True],
        num_samples=num_samples,
        one_pass_seconds=one_pass,
    )


def ratio(what, usual_seconds, seconds, **protocol):
    """Print a ratio of seconds, and return it as an entry for metrics.json."""
    value = usual_seconds / seconds
    more = ", ".join(f"{name} {each:.3g}" for name, each in protocol.items())
    print(f"{what}: {usual_seconds:.3g} s / {seconds:.3g} s = {value:.3g} ({more})")
    return runs.metric(value, "ratio", what, usual_seconds=usual_seconds, seconds=seconds, **protocol)


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
    (images, labels), _ = load_mnist(runs.ROOT / "data")
    hardware = runs.hardware(torch.device("cpu"))
    print(hardware)
    symmetric = Compose([ToTensor(), Normalize(0.5, 0.5)])
    size = step1.DEFAULTS["batch_size"]
    entries = compare_feeding("step1", gan_step(), size, to_symmetric, symmetric, images, labels)
    size = step3.DEFAULTS["batch_size"]
    entries |= compare_feeding("step3", vae_step(), size, to_unit, ToTensor(), images, labels)
    entries |= compare_pixelcnn_steps(images)
    entries |= {f"sampling_{count}": compare_samplers(count) for count in NUMS_SAMPLES}
    folder = runs.ROOT / "results" / "benchmark"
    runs.make_folder(folder)
    runs.write_json(
        folder / "metrics.json", {name: entry | dict(hardware=hardware) for name, entry in entries.items()}
    )


if __name__ == "__main__":
    runs.run_main(main)
