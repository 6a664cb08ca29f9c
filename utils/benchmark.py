"""Measure what makes the bundle fast against the usual way: `python -m utils.benchmark`.

It writes the ratios of seconds, which depend less on the machine than seconds, into results/benchmark/metrics.json.
"""

import statistics
import sys
import time
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

import hw2_step2_main as step2
from models.AR import MaskedConv2d, PixelCNN
from utils import files, machine
from utils.cli import exit_code
from utils.data import batches, binarize, load_data, to_unit
from utils.hyperparameters import defaults
from utils.muon import Muon

CPU = torch.device("cpu")
ROUNDS = 3
FRACTION = 10  # a tenth of an epoch is timed in each round
STEPS = 10
NUMS_SAMPLES = (1, 64, 256)


class FullKernelConv2d(MaskedConv2d):
    """The masked convolution as it is usually written, which multiplies by the zeros of the mask."""

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class FullKernelPixelCNN(PixelCNN):
    """Step 2's network of such layers."""

    def masked_layer(self, mask_type, in_channels, out_channels, kernel_size):
        return FullKernelConv2d(mask_type, in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def compare_feeding(images, labels, batch_size=128):
    """Compare an epoch of batches of one tensor with an epoch of torchvision's per-image transforms."""
    count = len(images) // FRACTION
    digits = Subset(MNIST(files.ROOT / "data", train=True, transform=ToTensor()), range(count))
    usual = DataLoader(digits, batch_size, shuffle=True)
    ours = batches(images[:count], labels[:count], batch_size=batch_size, generator=torch.Generator())
    seconds = interleave(lambda: [len(x) for x, _ in usual], lambda: [len(to_unit(x)) for x, _ in ours])
    seconds = [FRACTION * each for each in seconds]
    return ratio("an epoch's batches: per-image transforms / one tensor", *seconds, batch_size=batch_size)


def compare_training_steps(images, precision):
    """Compare a training step of step 2 with full kernels and with the rows that the mask leaves."""
    options = defaults(step2.train)
    x = binarize(images[: options["batch_size"]], "threshold")

    def take_steps(network, optimizer):
        for _ in range(STEPS):
            with machine.autocast(CPU, precision):
                logits = network(x)
            loss = F.binary_cross_entropy_with_logits(logits.float(), x, reduction="sum") / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    networks = FullKernelPixelCNN(), PixelCNN().to(memory_format=torch.channels_last)
    rates = options["muon_rate"], options["learning_rate"]
    ways = [partial(take_steps, each, Muon(*step2.split_parameters(each), *rates)) for each in networks]
    seconds = [each / STEPS for each in interleave(*ways)]
    what = f"step 2, a training step in {precision}: full kernels / rows that the mask leaves, channels last"
    return ratio(what, *seconds, batch_size=len(x))


def compare_samplers(num_samples):
    """Compare sampling with one forward pass for each pixel and with the cache, which must draw equal images."""
    network = step2.load_model(files.ROOT / "results" / step2.STEP / "model.pt")
    network.sample(1)
    seconds, images = timed(network.sample, num_samples, cached=True)
    usual_seconds, usual_images = timed(network.sample, num_samples, cached=False)
    if not torch.equal(images, usual_images):
        raise files.UserError(f"the two samplers drew different images of {num_samples}")
    with torch.no_grad():
        one_pass, _ = timed(network, images)
    what = f"step 2, {num_samples} samples, equal images: one forward pass a pixel / cached"
    return ratio(what, usual_seconds, seconds, num_samples=num_samples, one_pass_seconds=one_pass)


def ratio(what, usual_seconds, seconds, **protocol):
    """Print a ratio of seconds, and return it as an entry for metrics.json."""
    value = usual_seconds / seconds
    machine.say(f"{what}: {usual_seconds:.3g} s / {seconds:.3g} s = {value:.3g} {protocol}")
    protocol |= dict(usual_seconds=usual_seconds, seconds=seconds, hardware=machine.hardware(CPU))
    return files.metric(value, "ratio", what, **protocol)


def timed(function, *arguments, **options):
    """Call a function; return the seconds that it took, and its result."""
    started = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - started, result


def interleave(*functions):
    """Return the median seconds of each function, called in turn after a round of warm-up."""
    rounds = [[timed(function)[0] for function in functions] for _ in range(ROUNDS + 1)]
    return [statistics.median(seconds) for seconds in zip(*rounds[1:])]


def measure():
    """Measure everything and write metrics.json."""
    torch.manual_seed(0)
    (images, labels), _ = load_data(files.ROOT / "data")
    machine.say(machine.hardware(CPU))
    entries = {"feeding": compare_feeding(images, labels)}
    for precision in ["float32", "bfloat16"] if machine.has_bfloat16_units(CPU) else ["float32"]:
        entries[f"full_kernels_{precision}"] = compare_training_steps(images, precision)
    entries |= {f"sampling_{count}": compare_samplers(count) for count in NUMS_SAMPLES}
    folder = files.ROOT / "results" / "benchmark"
    files.make_folder(folder)
    files.write_json(folder / "metrics.json", entries)


if __name__ == "__main__":
    sys.exit(exit_code(measure, "benchmark.py"))
