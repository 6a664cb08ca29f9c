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


def timed(function, *arguments, **options):
    """Call a function; return the seconds that it took, and its result."""
    started = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - started, result


def compare_samplers(network, num_samples):
    """Return an entry for metrics.json. Both samplers must draw equal images."""
    seconds, images = timed(network.sample, num_samples, cached=True)
    usual_seconds, usual_images = timed(network.sample, num_samples, cached=False)
    if not torch.equal(images, usual_images):
        raise files.UserError(f"the two samplers drew different images of {num_samples}")
    with torch.no_grad():
        one_pass, _ = timed(network, images)
    what = f"step 2, {num_samples} samples, equal images: one forward pass a pixel / cached"
    machine.say(f"{what}: {usual_seconds:.3g} s / {seconds:.3g} s = {usual_seconds / seconds:.3g}")
    times = dict(usual_seconds=usual_seconds, seconds=seconds, one_pass_seconds=one_pass)
    hardware = machine.hardware(torch.device("cpu"))
    return files.metric(
        usual_seconds / seconds, "ratio", what, num_samples=num_samples, hardware=hardware, **times
    )


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
