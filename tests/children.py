"""What the processes that the tests start do; importing it imports what every one of them needs.

A test gives a process the step, its flags and hooks, functions that are called first and change how it goes on.
"""

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

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from models.AR import PixelCNN
from utils import plotting, runs
from utils.data import load_mnist

STEPS = {"gan": step1, "pixelcnn": step2, "conditional": step2, "vae": step3}
FLAGS = {"gan": [], "pixelcnn": [], "conditional": ["--conditional"], "vae": []}
SMALL = dict(num_layers=1, channels=4, first_kernel_size=5, kernel_size=3, head_channels=4)


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


def print_sum(data_dir):
    """Load the data and print the sum of the training pixels."""
    (images, _), _ = load_mnist(data_dir)
    print(images.sum().item())


def train(name, flags, *hooks):
    """A dry run of one of STEPS, of step 2 with a small network, after the hooks have been called."""
    step2.DEFAULTS.update(SMALL)
    for hook in hooks:
        hook()
    module = STEPS[name]
    sys.argv = [module.__file__, "--dry-run", *FLAGS[name], *map(str, flags)]
    runs.run_main(module.main)


# ---------------------------------------------------------------------------------------------------------
# Hooks: how long it takes


def set_length(epochs, batches=runs.DRY_RUN_BATCHES):
    runs.DRY_RUN_EPOCHS, runs.DRY_RUN_BATCHES = epochs, batches


def draw_nothing():
    """Leave out the figures and the samples of step 2, which take most of the time of a short run."""
    plotting.save = lambda figure, *_, **__: plotting.plt.close(figure)
    PixelCNN._draw = lambda self, num_samples, *_: torch.zeros(num_samples, 1, 28, 28)


def join_as(rank, port):
    """Be one of two processes, by the environment that torchrun gives them."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2"
    )
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))


# ---------------------------------------------------------------------------------------------------------
# Hooks: what goes wrong


def interrupt(batch, times=1, rank=None):
    """Ctrl-C in the batch of this number, counted over the epochs, in the process of this rank or in every one."""
    if rank != os.environ.get("RANK"):
        return
    add, seen = runs.Run.add, []

    def interrupting(self, *args, **losses):
        seen.append(None)
        if len(seen) == batch:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return add(self, *args, **losses)

    runs.Run.add = interrupting


def wait_for(path):
    """Wait in the first batch for this file, and say so by a file called waiting beside it."""
    add = runs.Run.add

    def waiting(self, *args, **losses):
        (path.parent / "waiting").touch()
        while not path.exists():
            time.sleep(0.01)
        return add(self, *args, **losses)

    runs.Run.add = waiting


def before_write(name, number, action):
    """Call `action(file)` when the file of this name is opened for its write of this number, before anything is in it."""
    seen = []

    def opening(path, mode="r", **more):
        file = open(path, mode, **more) if mode != "wb" else _File(path, "wb")
        if mode == "wb" and path.name == f"{name}.tmp":
            seen.append(None)
            if len(seen) == number:
                action(file)
        return file

    runs.open = opening


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
    """Fill the disk of this folder when the file is about to be written, but for a page of a large file."""
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
    """Write the resident memory after each epoch, in MiB, and the number of open figures, to a JSON file.

    Freed memory goes back to the system, where a growing heap is not hidden by what was freed before.
    """
    runs.keep_freed_memory = lambda: None
    say, resident = runs.Run.say, []

    def watching(self, *args, **values):
        say(self, *args, **values)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    runs.Run.say = watching
    run_main = runs.run_main

    def watched(main):
        run_main(main)
        content = {"resident": resident, "figures": plotting.plt.get_fignums()}
        Path(path).write_text(json.dumps(content))

    runs.run_main = watched
