"""Faults around a run, produced for real: kills, full and read-only disks, streams and systems that lack something.

The long ones are marked slow: `python -m pytest -m slow` runs them.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import children
from tests.children import FLAGS, STEPS
from tests.conftest import ROOT, TIMEOUT, assert_refused, assert_same_run, flags_of, position
from utils import files, machine

STOPS = 5  # of each network by each signal, at random moments
EPOCHS, BATCHES = 6, 4
SHORT = (partial(children.set_length, EPOCHS, BATCHES), children.draw_nothing)


@pytest.fixture
def disk(tmp_path):
    """A folder that is a disk of 16 MB of its own; `mount` again with other options to change it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes a Linux system and its administrator")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Folder and seconds of the uninterrupted short run of each of STEPS, made when first asked for."""
    made = {}

    def run(name):
        if name not in made:
            folder, started = tmp_path_factory.mktemp(name), time.perf_counter()
            done = start(children.train, name, ["--batch-size", 8, "--out-dir", folder], *SHORT).end()
            assert done.returncode == 0, done.stderr
            made[name] = folder, time.perf_counter() - started
        return made[name]

    return run


# Stopped


def stop_and_resume(start, whole, name, folder, *hooks, after=None, number=signal.SIGKILL):
    """Stop a run by hooks, or by a signal some seconds after its first checkpoint; then resume it to the right end.

    Returns whether there was time to stop it, and whether a checkpoint was there.
    """
    flags = ["--batch-size", 8, "--out-dir", folder]
    child = start(children.train, name, flags, *SHORT, *hooks)
    if after is not None:
        while child.process.exitcode is None and not (folder / "checkpoint.pt").exists():
            time.sleep(0.002)
        time.sleep(after)
        if child.process.exitcode is None:
            os.kill(child.process.pid, number)
    stopped = child.end()
    early = -number  # before the run catches signals
    assert stopped.returncode in (0, 128 + number, early), stopped.stderr
    existed = (folder / "checkpoint.pt").exists()
    said = max([int(epoch) for epoch in re.findall(r"^epoch (\d+)/", stopped.stdout, re.M)], default=0)
    if existed:
        epoch, batch = position(folder)
        assert epoch + batch / BATCHES >= said, "the checkpoint of an epoch is older than its line"
    else:
        assert said == 0
        assert_refused(start(children.train, name, [*flags, "--resume"], *SHORT).end(), "no checkpoint")
    more = ["--resume"] if existed else []
    resumed = start(children.train, name, [*flags, *more], *SHORT).end()
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(folder, whole(name)[0])
    return stopped.returncode != 0, existed


@pytest.mark.parametrize("name, number, stage", [("vae", 3, "half"), ("gan", 4, "opened")])
def test_killed_while_the_checkpoint_is_written(name, number, stage, start, whole, tmp_path):
    """With "opened" the CSV files have rows that the checkpoint does not know of."""
    aimed = partial(children.kill_in_write, number, stage)
    assert stop_and_resume(start, whole, name, tmp_path, aimed) == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", STEPS)
def test_stopped_at_random_moments(name, number, start, whole, tmp_path):
    """Two in five kills come in the checkpoint's write."""
    chance = random.Random(f"{name} {number}")
    stops = early = 0
    for attempt in range(4 * STOPS):
        folder = tmp_path / str(attempt)
        if number == signal.SIGKILL and attempt % 5 < 2:
            stage = chance.choice(["opened", "half", "whole", "replaced"])
            aimed = partial(children.kill_in_write, chance.randint(1, EPOCHS + 1), stage)
            stopped, existed = stop_and_resume(start, whole, name, folder, aimed)
        else:
            after = chance.uniform(0, whole(name)[1] / 4)
            stopped, existed = stop_and_resume(start, whole, name, folder, after=after, number=number)
        stops, early = stops + stopped, early + (stopped and not existed)
        if stops == STOPS:
            break
    print(f"{name}, signal {number}: {stops} stops, {early} of them before the first checkpoint")
    assert stops == STOPS


def test_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint(start, whole, tmp_path):
    flags = ["--batch-size", 8, "--out-dir", tmp_path]
    done = start(children.train, "vae", flags, *SHORT, partial(children.interrupt, 7, 2)).end()
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert position(tmp_path) == (0, BATCHES)
    assert start(children.train, "vae", [*flags, "--resume"], *SHORT).end().returncode == 0
    assert_same_run(tmp_path, whole("vae")[0])


def test_a_second_run_into_the_same_folder_is_refused(call_step, bare_steps, tmp_path):
    with files.lock(tmp_path):
        for more in ([], ["--resume"], ["--restart"]):
            done = call_step(STEPS["vae"], *flags_of("vae", tmp_path, *more))
            assert_refused(done, "another run writes into", str(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# Files that cannot be written


@pytest.mark.parametrize("name, number", [("checkpoint.pt", 3), ("losses.csv", 1), ("model.pt", 1)])
def test_full_disk(name, number, disk, start, whole):
    """The run says what could not be written and why; a resumed one, with room, ends as ever."""
    flags = ["--batch-size", 8, "--out-dir", disk]
    hook = partial(children.fill_disk, disk, name, number)
    done = start(children.train, "gan", flags, *SHORT, hook).end()
    assert done.returncode == 2 and name in done.stderr and "No space left" in done.stderr
    assert "Traceback" not in done.stderr and not list(disk.glob("*.tmp"))
    (disk / "filler").unlink()
    assert start(children.train, "gan", [*flags, "--resume"], *SHORT).end().returncode == 0
    assert_same_run(disk, whole("gan")[0])


@pytest.mark.parametrize("name", ["losses.csv", "epochs.csv"])
def test_a_file_that_another_program_holds(name, start, whole, tmp_path):
    """The run warns once and trains on. The line at the end says that --resume writes the file."""
    flags = ["--batch-size", 8, "--out-dir", tmp_path]
    done = start(children.train, "gan", flags, *SHORT, partial(children.keep_open, name)).end()
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert done.returncode == 2 and len(warnings) == 1 and name in warnings[0], done.stderr
    assert (tmp_path / "metrics.json").exists() and "--resume" in done.stderr.splitlines()[-1]
    assert not (tmp_path / name).exists()
    assert start(children.train, "gan", [*flags, "--resume"], *SHORT).end().returncode == 0
    assert_same_run(tmp_path, whole("gan")[0])


def test_a_folder_that_is_removed_while_the_run_writes(start, whole, tmp_path):
    """It is made again, with every file."""
    folder = tmp_path / "run"
    remove = partial(children.in_batch, 6, partial(shutil.rmtree, folder))
    done = start(children.train, "gan", ["--batch-size", 8, "--out-dir", folder], *SHORT, remove).end()
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert_same_run(folder, whole("gan")[0])
    assert (folder / "config.json").exists()


def test_read_only_folder_is_said_before_the_training(disk, call_step, bare_steps):
    (disk / "trained").mkdir()
    flags = [*FLAGS["vae"], "--dry-run", "--batch-size", 8, "--out-dir"]
    assert call_step(STEPS["vae"], *flags, disk / "trained").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for more in ([disk], [disk / "new"], [disk / "trained", "--resume"]):
        done = call_step(STEPS["vae"], *flags, *more)
        assert_refused(done, "--out-dir", "Read-only file system")
        assert "epoch 1" not in done.stdout


def test_samples_that_cannot_be_written(disk, call_step, trained):
    """They are all that --sample-only is for, so the exit code tells it."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    flags = ["--sample-only", "--model", trained["gan"] / "model.pt", "--out-dir", disk]
    done = call_step(STEPS["gan"], *flags)
    assert done.returncode == 2 and "Read-only file system" in done.stderr
    assert "samples.png could not be written" in done.stderr.splitlines()[-1]


# Streams and platforms

TRAIN = "import sys; from tests import children; children.train('vae', sys.argv[1:], children.draw_nothing)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no such device")
@pytest.mark.parametrize("streams", ["2>&-", "<&- >&-", ">/dev/full 2>&1"])
def test_a_run_trains_on_without_its_streams(streams, tmp_path):
    """As a service that has none, and with a log on a full disk."""
    command = f'exec "$0" -c "$1" --out-dir "$2" {streams}'
    # Jupyter names a backend that matplotlib refuses without a package.
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    words = ["sh", "-c", command, sys.executable, TRAIN, tmp_path]
    subprocess.run(words, cwd=ROOT, env=environment, timeout=TIMEOUT, check=True)
    assert (tmp_path / "metrics.json").exists() and torch.load(tmp_path / "model.pt", weights_only=True)


def test_nothing_that_other_systems_lack(call_step, bare_steps, monkeypatch, tmp_path):
    """No process, no display, no file locks, no libc, no affinity, few signals: as on Windows."""

    def refuse(*_, **__):
        raise OSError("no such library, and no process")

    for owner, name in ((os, "fork"), (os, "sched_getaffinity"), (signal, "SIGHUP"), (signal, "SIGUSR1")):
        monkeypatch.delattr(owner, name, raising=False)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(machine.ctypes, "CDLL", refuse)
    monkeypatch.setattr(files, "fcntl", None)
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    done = call_step(STEPS["vae"], *flags_of("vae", tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.json").exists()
