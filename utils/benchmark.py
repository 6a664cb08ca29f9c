"""Measure what makes the bundle fast against the usual way: `python -m utils.benchmark`.

The two ways are timed in turn, over several rounds. Compare the ratios: seconds depend on the machine and on what
else it does. All results go into results/benchmark/metrics.json.
"""

import statistics
import sys
import time

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
    usual = Subset(MNIST(files.ROOT / "data", train=True, transform=ToTensor()), range(count))

    def feed_usual():
        for _ in DataLoader(usual, batch_size, shuffle=True):
            pass

    def feed_ours():
        for x, _ in batches(
            images[:count], labels[:count], batch_size=batch_size, generator=torch.Generator()
        ):
            to_unit(x)

    seconds = [FRACTION * each for each in interleave(feed_usual, feed_ours)]
    return ratio("an epoch's batches: per-image transforms / one tensor", *seconds, batch_size=batch_size)


def compare_training_steps(images, precision):
    """Compare a training step of step 2 with full kernels and with the rows that the mask leaves."""
    options = defaults(step2.train)
    x = binarize(images[: options["batch_size"]], "threshold")
    device = torch.device("cpu")

    def steps(network):
        optimizer = Muon(*step2.split_parameters(network), options["muon_rate"], options["learning_rate"])

        def work():
            for _ in range(STEPS):
                with machine.autocast(device, precision):
                    logits = network(x)
                loss = F.binary_cross_entropy_with_logits(logits.float(), x, reduction="sum") / len(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return work

    ours = PixelCNN().to(memory_format=torch.channels_last)
    seconds = [each / STEPS for each in interleave(steps(FullKernelPixelCNN()), steps(ours))]
    what = f"step 2, a training step in {precision}: full kernels / rows that the mask leaves, channels last"
    return ratio(what, *seconds, batch_size=len(x))


def compare_samplers(num_samples):
    """Compare sampling with one forward pass for each pixel and with the cache.

    Raises:
        UserError: the two have drawn different images.
    """
    network = step2.load_model(files.ROOT / "results" / step2.STEP / "model.pt")
    network.sample(1)
    seconds, images = {}, {}
    for cached in (True, False):
        started = time.perf_counter()
        images[cached] = network.sample(num_samples, cached=cached)
        seconds[cached] = time.perf_counter() - started
    if not torch.equal(images[True], images[False]):
        raise files.UserError(f"the two samplers drew different images of {num_samples}")
    with torch.no_grad():
        started = time.perf_counter()
        network(images[True])
        protocol = dict(num_samples=num_samples, one_pass_seconds=time.perf_counter() - started)
    what = f"step 2, {num_samples} samples, equal images: one forward pass a pixel / cached"
    return ratio(what, seconds[False], seconds[True], **protocol)


def ratio(what, usual_seconds, seconds, **protocol):
    """Print a ratio of seconds, and return it as an entry for metrics.json."""
    value = usual_seconds / seconds
    machine.say(f"{what}: {usual_seconds:.3g} s / {seconds:.3g} s = {value:.3g} {protocol}")
    return files.metric(value, "ratio", what, usual_seconds=usual_seconds, seconds=seconds, **protocol)


def interleave(*functions):
    """Return the median seconds of each function, called in turn after a round of warm-up."""
    seconds = [[] for _ in functions]
    for round_ in range(ROUNDS + 1):
        for function, taken in zip(functions, seconds):
            started = time.perf_counter()
            function()
            if round_:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def measure():
    """Measure everything and write metrics.json."""
    torch.manual_seed(0)
    (images, labels), _ = load_data(files.ROOT / "data")
    hardware = machine.hardware(torch.device("cpu"))
    machine.say(hardware)
    entries = {"feeding": compare_feeding(images, labels)}
    fast = ["bfloat16"] if machine.has_bfloat16_units(torch.device("cpu")) else []
    for precision in ["float32", *fast]:
        entries[f"full_kernels_{precision}"] = compare_training_steps(images, precision)
    entries |= {f"sampling_{count}": compare_samplers(count) for count in NUMS_SAMPLES}
    folder = files.ROOT / "results" / "benchmark"
    files.make_folder(folder)
    entries = {name: entry | dict(hardware=hardware) for name, entry in entries.items()}
    files.write_json(folder / "metrics.json", entries)


if __name__ == "__main__":
    sys.exit(exit_code(measure, "benchmark.py"))
