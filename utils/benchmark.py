"""Time the cached sampler of step 2 against one forward pass for each pixel: `python -m utils.benchmark`.

It writes the ratios of seconds, which depend less on the machine than seconds, into results/benchmark/metrics.json.
"""

import sys
import time

import torch

import hw2_step2_main as step2
from utils import files, machine
from utils.cli import exit_code
from utils.flags import ArgumentParser

NUMS_SAMPLES = (1, 64, 256)


def timed_sample(network, num_samples, cached):
    """Return the seconds that a sampler takes, and its images."""
    started = time.perf_counter()
    images = network.sample(num_samples, cached=cached)
    return time.perf_counter() - started, images


def compare_samplers(network, num_samples):
    """Return an entry for metrics.json. Both samplers must draw equal images."""
    seconds, images = timed_sample(network, num_samples, cached=True)
    usual_seconds, usual_images = timed_sample(network, num_samples, cached=False)
    if not torch.equal(images, usual_images):
        raise files.UserError(f"the two samplers drew different images of {num_samples}")
    what = f"step 2, {num_samples} samples, equal images: one forward pass a pixel / cached"
    machine.say(f"{what}: {usual_seconds:.3g} s / {seconds:.3g} s = {usual_seconds / seconds:.3g}")
    more = dict(usual_seconds=usual_seconds, seconds=seconds, hardware=machine.hardware(torch.device("cpu")))
    return files.metric(usual_seconds / seconds, "ratio", what, num_samples=num_samples, **more)


def measure(argv=None):
    """Measure everything and write metrics.json. There are no flags but --help."""
    ArgumentParser(prog="python -m utils.benchmark", description=__doc__).parse_args(argv or [])
    network = step2.load_model(files.ROOT / "results" / step2.STEP / "model.pt")
    network.sample(1)  # a first call is slower
    entries = {f"sampling_{count}": compare_samplers(network, count) for count in NUMS_SAMPLES}
    folder = files.ROOT / "results" / "benchmark"
    files.make_folder(folder)
    files.write_json(folder / "metrics.json", entries)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: measure(sys.argv[1:]), "benchmark.py"))
