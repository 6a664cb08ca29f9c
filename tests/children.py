"""Functions for the processes that the tests start. The module imports everything that they need.

A test gives a process the step, its flags and hooks. Hooks are functions that are called first and change how the
run goes on.
"""

import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import sys
import time
import warnings
from io import FileIO
from pathlib import Path

import torch
from matplotlib.figure import Figure

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from models import AR
from utils import cli, files, machine, metrics, vae_results
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


def run_script(path, flags):
    """Run a step script as `python path flags` does."""
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def train(name, flags, *hooks):
    """Make a dry run of one of STEPS with a small network, after the hooks have been called."""
    for hook in hooks:
        hook()
    sys.exit(STEPS[name].main(["--dry-run", *FLAGS[name], *map(str, flags)]))


# ---------------------------------------------------------------------------------------------------------
# Hooks: how long it takes


def set_length(epochs, batches=runs.DRY_RUN_BATCHES):
    cli.DRY_RUN_EPOCHS, runs.DRY_RUN_BATCHES = epochs, batches


def black_images(network, shape, *_):
    """Draw nothing in place of `models.ar_sampler.draw_images`."""
    return torch.zeros(shape)


@functools.cache
def few_images(data_dir, dataset="MNIST", device="cpu", held_out=False):
    """Load 200 training and 200 test images of MNIST in place of `utils.data.load_data`, whatever the data set."""
    return tuple(
        tuple(each[:200] for each in part) for part in load_data(data_dir, "MNIST", device, held_out)
    )


def judge_nothing(run, *_):
    """Return black samples and a made-up metric in place of `utils.metrics.judge_sampler`."""
    results = (
        dict(frechet_distance=files.metric(1.0, "unit", "formula")) if run.args.dataset == "MNIST" else {}
    )
    return torch.zeros(10, 1, 28, 28), results


def draw_nothing(setting=setattr):
    """Leave out what takes most of the time of a short run: figures, samples of step 2, their metrics, most images."""
    setting(cli, "load_data", few_images)
    setting(Run, "draw", lambda self, name, *_, **__: machine.say(f"drawing {name}"))
    setting(AR, "draw_images", black_images)
    setting(metrics, "judge_sampler", judge_nothing)
    setting(vae_results, "FINE_SIDE", 5)


def join_as(rank, port):
    """Be one of two processes, by the environment that torchrun gives them."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2"
    )
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))


# ---------------------------------------------------------------------------------------------------------
# Hooks: what goes wrong


def interrupt(batch, times=1, rank=None, number=signal.SIGINT, setting=setattr):
    """Send the signal in the batch of this number, counted over the epochs, to the process of this rank or to all."""
    if rank != os.environ.get("RANK"):
        return
    record, seen = Run.record, []

    def interrupting(self, *args, **losses):
        seen.append(None)
        if len(seen) == batch:
            for _ in range(times):
                signal.raise_signal(number)
        return record(self, *args, **losses)

    setting(Run, "record", interrupting)


def wait_for(path):
    """Wait in the first batch for this file, and say so by a file called waiting beside it."""
    record = Run.record

    def waiting(self, *args, **losses):
        (path.parent / "waiting").touch()
        while not path.exists():
            time.sleep(0.01)
        return record(self, *args, **losses)

    Run.record = waiting


def print_into_full_device():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def print_into_closed_pipe():
    """Print into a pipe that nobody reads, as after `| head -n 1`."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(writing)
    os.close(reading)


def be_nobody():
    """Give up the administrator's rights, to whom every folder is open (capset(2), version 3)."""
    if os.geteuid() == 0:
        header, no_rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, no_rights) == 0


def before_write(name, number, action):
    """Call `action(file)` when the file of this name is opened for its write of this number, while it is empty."""
    seen = []

    def opening(path, mode="r", **more):
        file = open(path, mode, **more) if mode != "wb" else _File(path, "wb")
        if mode == "wb" and path.name == f"{name}.tmp":
            seen.append(None)
            if len(seen) == number:
                action(file)
        return file

    files.open = opening


class _File(FileIO):
    """A file that calls `self.half_way(self)` when half of what is written to it is there."""

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


def interrupt_in_write(number):
    """Ctrl-C twice while half of the checkpoint has been written."""

    def aim(file):
        def half_way():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        file.half_way = half_way

    before_write("checkpoint.pt", number, aim)


def fill_disk(folder, name, number):
    """Fill the disk of this folder when the file is about to be written. One page of a large file still fits."""
    free = 4096 if name.endswith((".pt", ".png")) else 0

    def fill(_):
        with open(Path(folder) / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                filler.truncate(filler.tell() - free)

    before_write(name, number, fill)


def limit_files(name, number):
    """Let the system refuse files beyond 500 bytes from when this file is about to be written."""
    import resource

    def limit(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    before_write(name, number, limit)


# ---------------------------------------------------------------------------------------------------------
# Hooks: what is watched


def watch_memory(path):
    """Write the resident memory after each epoch, in MiB, and the number of figures at the end, to a JSON file.

    Freed memory goes back to the system. Otherwise a growing heap would be hidden by what was freed before.
    """
    machine.keep_freed_memory = lambda: None
    print_epoch, resident = Run.print_epoch, []

    def watching(self, *args, **values):
        print_epoch(self, *args, **values)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    Run.print_epoch = watching
    exit_code = cli.exit_code

    def watched(*args):
        code = exit_code(*args)
        gc.collect()
        figures = sum(isinstance(each, Figure) for each in gc.get_objects())
        Path(path).write_text(json.dumps({"resident": resident, "figures": figures}))
        return code

    cli.exit_code = watched
