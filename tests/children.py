"""Functions for the processes that the tests start. The module imports everything that they need.

A test gives a process the step, its flags and hooks: functions that are called first and change how it goes on.
"""

import functools
import os
import signal
import sys
import warnings
from io import FileIO
from pathlib import Path

import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from models import AR, ar_sampler
from utils import cli, files, gan_results, machine, metrics, vae_results
from utils import run as runs
from utils.data import load_data
from utils.run import Run

STEPS = {"gan": step1, "pixelcnn": step2, "conditional": step2, "vae": step3}
SMALL = dict(num_blocks=1, channels=4, first_kernel_size=5, kernel_size=3, head_channels=4)
_small = "--num-blocks 1 --channels 4 --first-kernel-size 5 --kernel-size 3 --head-channels 4".split()
FLAGS = {
    "gan": ["--g-channels", "8", "--d-channels", "8"],
    "pixelcnn": _small,
    "conditional": [*_small, "--conditional", "--digit", "7", "--binarize", "stochastic"],
    "vae": ["--hidden-dims", "8"],
}


def call(folder, function, arguments):
    """Call the function in this folder; what it prints goes into the files stdout and stderr there."""
    os.chdir(folder)
    warnings.simplefilter("ignore")
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))
    function(*arguments)


def train(name, flags, *hooks):
    """Make a dry run of one of STEPS with a small network, after the hooks have been called."""
    for hook in hooks:
        hook()
    sys.exit(STEPS[name].main(["--dry-run", *FLAGS[name], *map(str, flags)]))


def ablate(name, flags):
    """Start the several runs of one of STEPS."""
    sys.exit(STEPS[name].main([*map(str, flags)]))


# Hooks: how long it takes


def set_length(epochs, batches=runs.DRY_RUN_BATCHES):
    cli.DRY_RUN_EPOCHS, runs.DRY_RUN_BATCHES = epochs, batches


def black_images(network, shape, *_):
    """Draw nothing in place of `models.ar_sampler.draw_images`."""
    return torch.zeros(shape)


@functools.cache
def few_images(data_dir, dataset="MNIST", device="cpu", held_out=False):
    """Load 200 training and 200 test images of MNIST in place of `utils.data.load_data`, whatever the data set."""
    sets = load_data(data_dir, "MNIST", device, held_out)
    return tuple((images[:200], labels[:200]) for images, labels in sets)


def judge_nothing(run, *_):
    """Return black samples and a made-up metric in place of `utils.metrics.judge_sampler`."""
    made_up = dict(frechet_distance=files.metric(1.0, "unit", "formula"))
    return torch.zeros(10, 1, 28, 28), made_up if run.args.dataset == "MNIST" else {}


def log_a_weight(run, generator, *_):
    """Add a row to quality.csv in place of `utils.gan_results.log_quality`."""
    run.log("quality", epoch=run.epochs_done, weight=next(generator.parameters()).flatten()[0].item())


def draw_nothing(setting=setattr):
    """Leave out what takes most of the time of a short run: figures, samples of step 2, their metrics, most images."""
    setting(cli, "load_data", few_images)
    setting(Run, "draw", lambda self, name, *_, **__: machine.say(f"drawing {name}"))
    setting(AR, "draw_images", black_images)
    setting(ar_sampler, "can_cache", lambda *_: True)
    setting(metrics, "judge_sampler", judge_nothing)
    setting(metrics, "judge_binary", lambda *_: {})
    setting(gan_results, "log_quality", log_a_weight)
    setting(vae_results, "plane_gaps", lambda _, x: torch.ones(2, len(x)))


def join_as(rank, port):
    """Be one of two processes, by the environment that torchrun gives them."""
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")


# Hooks: what goes wrong


def in_batch(number, action, setting=setattr):
    """Call `action()` in the batch of this number, counted over the epochs of this process."""
    batches, seen = Run.batches, []

    def counted(self, *tensors, **options):
        for batch in batches(self, *tensors, **options):
            seen.append(None)
            if len(seen) == number:
                action()
            yield batch

    setting(Run, "batches", counted)


def interrupt(batch, times=1, rank=None, number=signal.SIGINT, setting=setattr):
    """Send the signal in the batch of this number to the process of this rank, or to all."""
    if rank == os.environ.get("RANK"):
        in_batch(batch, lambda: [signal.raise_signal(number) for _ in range(times)], setting)


def interrupt_evaluation(epoch, number=signal.SIGINT, setting=setattr):
    """Send the signal in the evaluation after this epoch."""
    print_epoch = Run.print_epoch

    def interrupted(self, *values):
        if self.epochs_done == epoch:
            signal.raise_signal(number)
        print_epoch(self, *values)

    setting(Run, "print_epoch", interrupted)


def ignore_hang_up():
    """Ignore SIGHUP, as nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def keep_open(name):
    """Let no file of this name be replaced, as if a spreadsheet held it on Windows."""
    replace = os.replace

    def replacing(source, target):
        if Path(target).name == name:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    os.replace = replacing


def before_write(name, number, action):
    """Call `action(file)` when the file of this name is opened for its write of this number, before it changes."""
    seen = []

    def opening(path, mode="r", **more):
        if mode != "wb" or path.name.removesuffix(".tmp") != name:
            return open(path, mode, **more)
        file = _File(path, mode)
        seen.append(None)
        if len(seen) == number:
            action(file)
        return file

    files.open = opening


class _File(FileIO):
    """A file that calls `self.half_way()` when half of what is written to it is there."""

    half_way = None

    def write(self, content):
        if self.half_way:
            super().write(content[: len(content) // 2])
            self.half_way()
        while content:
            content = content[super().write(content) :]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(number, stage):
    """Die in the checkpoint's write of this number: "opened", "half", "whole" or just after it took its place."""

    def aim(file):
        if stage == "opened":
            die()
        elif stage == "half":
            file.half_way = die
        else:
            replace = os.replace

            def replacing(source, target):
                if stage == "replaced":
                    replace(source, target)
                die()

            os.replace = replacing

    before_write("checkpoint.pt", number, aim)


def fill_disk(folder, name, number):
    """Fill the disk of this folder when the file is about to be written. One page of a large file still fits."""
    free = 4096 if name.endswith(".pt") else 0

    def fill(_):
        with open(Path(folder) / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                filler.truncate(filler.tell() - free)

    before_write(name, number, fill)
