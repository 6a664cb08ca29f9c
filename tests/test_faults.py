"""Faults around a run, produced for real: kills, full and read-only disks, systems that lack something.

The long ones are marked slow: `python -m pytest -m slow` runs them.
"""

import json
import multiprocessing.process
import os
import random
import re
import shutil
import signal
import subprocess
import time
import warnings
from functools import partial
from importlib.util import find_spec

import pytest

from tests import children
from tests.children import FLAGS, STEPS
from tests.conftest import ROOT, assert_refused, content, same
from utils import files, machine

KILLS = 50
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


def assert_same_run(first, second):
    """The same weights, optimisers, random state and losses, and nothing half-written beside them."""
    ours, theirs = content(first, "checkpoint.pt"), content(second, "checkpoint.pt")
    for key in ("tracked", "random", "tables", "snapshots"):
        assert same(ours[key], theirs[key]), key
    assert same(content(first, "model.pt"), content(second, "model.pt"))
    assert (first / "losses.csv").read_bytes() == (second / "losses.csv").read_bytes()
    assert not list(first.glob("*.tmp")) + list(second.glob("*.tmp"))


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


# ---------------------------------------------------------------------------------------------------------
# Stopped


def kill_and_resume(start, whole, name, folder, *hooks, after=None):
    """Kill a run and resume it; returns whether there was time to kill it, and whether a checkpoint was there.

    Args:
        hooks: that kill it from within, or
        after: seconds until it is killed from outside.
    """
    flags = ["--batch-size", 8, "--out-dir", folder]
    child = start(children.train, name, flags, *SHORT, *hooks)
    if after is not None:
        time.sleep(after)
        child.process.kill()
    killed = child.end()
    assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
    checkpoint = folder / "checkpoint.pt"
    existed = checkpoint.exists()
    said = [int(epoch) for epoch in re.findall(r"^epoch (\d+)/", killed.stdout, re.M)]
    if existed:
        # An epoch's line is printed just before its checkpoint is written.
        assert content(folder, "checkpoint.pt")["position"][0] >= max(said, default=0) - 1
        resumed = start(children.train, name, [*flags, "--resume"], *SHORT).end()
    else:
        assert max(said, default=0) == 0
        assert_refused(start(children.train, name, [*flags, "--resume"], *SHORT).end(), "no checkpoint")
        resumed = start(children.train, name, flags, *SHORT).end()
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(folder, whole(name)[0])
    return killed.returncode != 0, existed


@pytest.mark.parametrize("name, number, stage", [("vae", 3, "half"), ("gan", 2, "whole")])
def test_killed_while_the_checkpoint_is_written(name, number, stage, start, whole, tmp_path):
    aimed = partial(children.kill_in_write, number, stage)
    assert kill_and_resume(start, whole, name, tmp_path, aimed) == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_killed_at_random_moments(name, start, whole, tmp_path):
    """A quarter of KILLS for each network, two in five of them aimed at the checkpoint's write."""
    chance = random.Random(name)
    share = KILLS // len(STEPS) + (list(STEPS).index(name) < KILLS % len(STEPS))
    kills = early = 0
    for attempt in range(4 * share):
        folder = tmp_path / str(attempt)
        if attempt % 5 < 2:
            stage = chance.choice(["opened", "half", "whole", "replaced"])
            aimed = partial(children.kill_in_write, chance.randint(1, EPOCHS + 1), stage)
            killed, existed = kill_and_resume(start, whole, name, folder, aimed)
        else:
            after = chance.uniform(0, whole(name)[1])
            killed, existed = kill_and_resume(start, whole, name, folder, after=after)
        kills, early = kills + killed, early + (killed and not existed)
        if kills == share:
            break
    print(f"{name}: {kills} kills, {early} of them before the first checkpoint")
    assert kills == share


@pytest.mark.parametrize("hook", [partial(children.interrupt, 7, 2), partial(children.interrupt_in_write, 4)])
def test_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint(hook, start, whole, tmp_path):
    """In the middle of a batch, and with half of a checkpoint written: the one before is kept."""
    flags = ["--batch-size", 8, "--out-dir", tmp_path]
    done = start(children.train, "vae", flags, *SHORT, hook).end()
    assert done.returncode == 130 and "Traceback" not in done.stderr
    epoch = {7: 1, 4: 2}[hook.args[0]]
    assert content(tmp_path, "checkpoint.pt")["position"][:2] == (epoch, 0)
    assert not list(tmp_path.glob("*.tmp"))
    assert start(children.train, "vae", [*flags, "--resume"], *SHORT).end().returncode == 0
    assert_same_run(tmp_path, whole("vae")[0])


def test_two_processes_into_one_folder(start, whole, tmp_path):
    """The second is refused while the first trains, which then ends as if it had been alone."""
    flags = ["--batch-size", 8, "--out-dir", tmp_path]
    first = start(children.train, "vae", flags, *SHORT, partial(children.wait_for, tmp_path / "go on"))
    while not (tmp_path / "waiting").exists():
        assert first.process.is_alive()
        time.sleep(0.01)
    for more in ([], ["--resume"]):
        second = start(children.train, "vae", [*flags, *more], *SHORT).end()
        assert_refused(second, "another run writes into")
    (tmp_path / "go on").touch()
    assert first.end().returncode == 0
    assert_same_run(tmp_path, whole("vae")[0])


# ---------------------------------------------------------------------------------------------------------
# The disk

WRITES = [
    ("checkpoint.pt", 3),
    ("losses.csv", EPOCHS + 1),
    ("model.pt", 1),
    ("metrics.json", 1),
    ("loss.png", 1),
]


def assert_write_fails(name, number, hook, reason, folder, start, whole):
    """The run says in one line what could not be written and why; a resumed one, with room, ends as ever."""
    flags = ["--batch-size", 8, "--out-dir", folder]
    length = SHORT[:1] if name.endswith(".png") else SHORT
    done = start(children.train, "gan", flags, *length, hook).end()
    assert_refused(done, name)
    assert reason in done.stderr
    epochs = number - 2 if name == "checkpoint.pt" else EPOCHS
    assert content(folder, "checkpoint.pt")["position"][:2] == (epochs, 0)
    assert not list(folder.glob("*.tmp"))
    (folder / "filler").unlink(missing_ok=True)
    assert start(children.train, "gan", [*flags, "--resume"], *SHORT).end().returncode == 0
    assert_same_run(folder, whole("gan")[0])


@pytest.mark.parametrize("name, number", WRITES)
def test_full_disk(name, number, disk, start, whole):
    hook = partial(children.fill_disk, disk, name, number)
    assert_write_fails(name, number, hook, "No space left", disk, start, whole)


@pytest.mark.skipif(not find_spec("resource"), reason="the system has no limit of a file's size")
@pytest.mark.parametrize("name, number", WRITES)
def test_file_too_large_for_the_system(name, number, start, whole, tmp_path):
    hook = partial(children.limit_files, name, number)
    assert_write_fails(name, number, hook, "File too large", tmp_path, start, whole)


@pytest.mark.parametrize("name", STEPS)
def test_read_only_folder_is_said_before_the_training(name, disk, call_step, bare_steps):
    (disk / "trained").mkdir()
    flags = [*FLAGS[name], "--dry-run", "--batch-size", 8, "--out-dir"]
    assert call_step(STEPS[name], *flags, disk / "trained").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for more in ([disk], [disk / "new"], [disk / "trained", "--resume"]):
        done = call_step(STEPS[name], *flags, *more)
        assert_refused(done, "--out-dir", "Read-only file system")
        assert "epoch 1" not in done.stdout


def test_samples_into_a_read_only_folder(disk, call_step, trained):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk, disk / "new"):
        flags = ["--sample-only", "--model", trained["gan"] / "model.pt", "--out-dir", folder]
        assert_refused(call_step(STEPS["gan"], *flags), "--out-dir", "Read-only file system")


# ---------------------------------------------------------------------------------------------------------
# Platforms and memory


@pytest.mark.parametrize("name", STEPS)
def test_nothing_that_other_systems_lack(name, call_step, bare_steps, monkeypatch, tmp_path):
    """No fork, no process, no display, no file locks, no libc, no affinity: as on Windows."""

    def refuse(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.delattr(os, "fork", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(machine.ctypes, "CDLL", refuse_library)
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    flags = [*FLAGS[name], "--dry-run", "--batch-size", 4, "--out-dir", tmp_path]
    done = call_step(STEPS[name], *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.json").exists()


def refuse_library(_):
    raise OSError("no such library")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("[mu]*/*.py")), ids=lambda p: p.name
)
def test_sources_compile_without_a_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(path.read_text(encoding="utf-8"), path, "exec")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not say")
@pytest.mark.parametrize("name", STEPS)
def test_memory_does_not_grow_over_40_epochs(name, start, tmp_path):
    """With batches of 300 images. One batch kept from each epoch would be 23 MiB after 25 epochs."""
    length = partial(children.set_length, 40)
    watch = partial(children.watch_memory, tmp_path / "memory.json")
    flags = ["--epochs", 40, "--batch-size", 300, "--out-dir", tmp_path / "run"]
    done = start(children.train, name, flags, length, watch).end()
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "memory.json").read_text())
    early, late = max(seen["resident"][8:13]), min(seen["resident"][-5:])
    print(f"{name}: {early:.0f} MiB after 10 epochs, {late:.0f} MiB after 40")
    assert late - early < 10 and seen["figures"] == 0
