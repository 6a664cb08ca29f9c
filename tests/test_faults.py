"""What goes wrong around a run, produced for real: kills, full disks, damaged files, odd flags.

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

import pytest
import torch

from tests import children
from tests.children import FLAGS, STEPS
from tests.conftest import ROOT
from tests.test_runs import assert_refused
from utils import ablation, plotting, runs

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


def content(folder, name):
    return torch.load(folder / name, weights_only=True)


def same(first, second):
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_same_run(first, second):
    """The same weights, optimisers, random state and losses, and nothing half-written beside them."""
    ours, theirs = content(first, "checkpoint.pt"), content(second, "checkpoint.pt")
    for key in ("tracked", "random", "history", "snapshots"):
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


@pytest.mark.skipif(not runs.resource, reason="the system has no limit of a file's size")
@pytest.mark.parametrize("name, number", WRITES)
def test_file_too_large_for_the_system(name, number, start, whole, tmp_path):
    hook = partial(children.limit_files, name, number)
    assert_write_fails(name, number, hook, "File too large", tmp_path, start, whole)


@pytest.mark.parametrize("name", STEPS)
def test_read_only_folder_is_said_before_the_training(name, disk, call_step, small_steps):
    (disk / "trained").mkdir()
    flags = [*FLAGS[name], "--dry-run", "--batch-size", 8, "--out-dir"]
    assert call_step(STEPS[name], *flags, disk / "trained").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for more in ([disk], [disk / "new"], [disk / "trained", "--resume"], [disk / "trained", "--sample-only"]):
        done = call_step(STEPS[name], *flags, *more)
        assert_refused(done, "--out-dir")
        assert "Read-only file system" in done.stderr and "epoch" not in done.stdout


# ---------------------------------------------------------------------------------------------------------
# Files to be read


def trained_folder(call_step, folder, name="vae"):
    flags = [*FLAGS[name], "--dry-run", "--batch-size", 4, "--out-dir", folder]
    assert call_step(STEPS[name], *flags).returncode == 0
    return flags


def fill_with_nan(value):
    """The same nested value with every floating tensor NaN."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, torch.nan) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: fill_with_nan(each) for key, each in value.items()}
    return [*map(fill_with_nan, value)] if isinstance(value, list) else value


@pytest.mark.parametrize("name", STEPS)
def test_checkpoints_and_models_of_nan_or_of_another_network(name, call_step, small_steps, tmp_path):
    flags = trained_folder(call_step, tmp_path, name)
    good = {file: content(tmp_path, file) for file in ("checkpoint.pt", "model.pt")}
    torch.save(fill_with_nan(good["checkpoint.pt"]), tmp_path / "checkpoint.pt")
    assert_refused(call_step(STEPS[name], *flags, "--resume"), "not finite")
    torch.save(fill_with_nan(good["model.pt"]), tmp_path / "model.pt")
    assert_refused(call_step(STEPS[name], *flags, "--sample-only"), "not finite")

    # Weights of other shapes than the network's, and those of another one.
    tracked = {
        key: {inner: value[:1] if isinstance(value, torch.Tensor) and value.dim() else value
              for inner, value in state.items()}
        for key, state in good["checkpoint.pt"]["tracked"].items()
    }  # fmt: skip
    torch.save({**good["checkpoint.pt"], "tracked": tracked}, tmp_path / "checkpoint.pt")
    assert_refused(call_step(STEPS[name], *flags, "--resume"), "does not fit")
    other = {"weight": torch.zeros(3)}
    torch.save({**good["model.pt"], "weights": other}, tmp_path / "model.pt")
    assert_refused(call_step(STEPS[name], *flags, "--sample-only"), "train anew")


def test_damage_at_random_places_is_seen(tmp_path):
    """Bytes changed, cut off, put in or taken out: refused, unless what is read is what was written."""
    path, chance = tmp_path / "checkpoint.pt", random.Random(0)
    saved = {"step": "a", "weights": {"w": torch.randn(20, 5)}, "position": [1, 2]}
    runs.save_tensors(path, saved)
    good, refused = path.read_bytes(), 0
    for _ in range(400):
        at, length = chance.randrange(len(good)), chance.choice([1, 1, 3, 50])
        kind = chance.choice(["change", "cut", "insert", "remove"])
        end = at if kind == "insert" else len(good) if kind == "cut" else at + length
        put = chance.randbytes(length) if kind in ("change", "insert") else b""
        path.write_bytes(good[:at] + put + good[end:])
        try:
            assert same(runs.load_tensors(path, ("a",), "checkpoint"), saved)
        except runs.UserError:
            refused += 1
    assert refused > 300


# ---------------------------------------------------------------------------------------------------------
# The command line

ANYTHING = ["", "-1", "nan", "inf", "1e999", "0x10", "ten", "1.5", "--", "é", "9" * 30]


def numbers(least, *more):
    """Valid and invalid values of a flag that takes a whole number."""
    return [str(least), str(least + 3), *more], [str(least - 1), *(each for each in ANYTHING)]


VALUES = {
    "--epochs": numbers(1, "1000"),
    "--batch-size": numbers(1, "64", str(2**63 - 1)),
    "--seed": numbers(0, str(2**63 - 1)),
    "--minutes": (["0.001", "5", "1e300"], ["0", "0.0", "-1", "nan", "inf", "ten", ""]),
    "--device": (["auto", "cpu"], ["tpu", "", "CPU"]),
    "--held-out": ([None], ["yes"]),
}
OWN_VALUES = {
    "gan": {"--d-freq": numbers(1, "2", "1000")},
    "pixelcnn": {
        "--digit": (list("0379"), ["10", "-1", "three", ""]),
        "--binarize": (["threshold", "stochastic"], ["maybe", "", "none"]),
    },
    "vae": {
        "--kl-coeff": (["0", "0.5", "1", "1e-30"], ["-1", "nan", "inf", "much", ""]),
        "--latent-dim": numbers(2, "20"),
        "--bound-samples": numbers(1, "500"),
    },
}
OWN_VALUES["conditional"] = OWN_VALUES["pixelcnn"]
# Of these at most one.
MODES = ["--ablation", "--resume", "--sample-only", "--list-variants"]


def draw_flags(name, chance):
    """A valid combination: pairs of a flag and its value, None for a flag without one."""
    values = {**VALUES, **OWN_VALUES[name], "--variant": ([*STEPS[name].VARIANTS], None)}
    pairs = [(flag, chance.choice(valid)) for flag, (valid, _) in values.items() if chance.random() < 0.4]
    chance.shuffle(pairs)
    if {"--epochs", "--minutes"} <= {flag for flag, _ in pairs}:
        excluded = chance.choice(["--epochs", "--minutes"])
        pairs = [pair for pair in pairs if pair[0] != excluded]
    return pairs


def spell(pairs, chance):
    """The pairs as the command line has them: in one argument or in two."""
    arguments = []
    for flag, value in pairs:
        arguments += [flag] if value is None else chance.choice([[flag, value], [f"{flag}={value}"]])
    return arguments


class Accepted(Exception):
    """The command line was accepted, and the run would start."""


@pytest.mark.parametrize("name", STEPS)
def test_valid_flags_are_accepted_and_invalid_ones_refused(name, call_step, monkeypatch, capsys, tmp_path):
    """200 random combinations of each; one invalid value anywhere in a valid one is refused in one line."""
    chance, module = random.Random(name), STEPS[name]

    def accept(*_, **__):
        raise Accepted

    monkeypatch.setattr(runs, "Run", accept)
    monkeypatch.setattr(ablation, "run_all", accept)
    invalid = {flag: wrong for flag, (_, wrong) in {**VALUES, **OWN_VALUES[name]}.items()}
    invalid |= {"--variant": ["nonsense", ""], "--seeds": numbers(1)[1], "--nonsense": [None, "1"]}
    for _ in range(200):
        pairs = draw_flags(name, chance)
        more = chance.choice(
            [[], [("--dry-run", None)], [("--seeds", "2")], [(chance.choice(MODES[:3]), None)]]
        )
        valid = [*FLAGS[name], *spell([*pairs, *more], chance)]
        with pytest.raises(Accepted):
            call_step(module, *valid)
        flag = chance.choice([*invalid])
        kept = [pair for pair in pairs if pair[0] != flag]
        value = chance.choice(invalid[flag])
        wrong = flag if value is None else f"{flag}={value}"
        at = chance.randint(0, len(kept))
        arguments = [*spell(kept[:at], chance), wrong, *spell(kept[at:], chance)]
        done = call_step(module, *FLAGS[name], *arguments, "--out-dir", tmp_path / "out")
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_random_flags_dry_run(name, start, tmp_path):
    """Five random combinations of each: a run, the same resumed, and its samples, all with exit code 0."""
    chance = random.Random(f"{name} for real")
    for index in range(5):
        arguments = spell(draw_flags(name, chance), chance)
        for mode in ([], ["--resume"], ["--sample-only"]):
            flags = [*arguments, "--out-dir", tmp_path / str(index), *mode]
            done = start(children.train, name, flags, children.draw_nothing).end()
            assert done.returncode == 0, (flags, done.stderr)
            assert not done.stderr or "comparison" in done.stdout, (flags, done.stderr)


# ---------------------------------------------------------------------------------------------------------
# Platforms and memory


@pytest.mark.parametrize("name", STEPS)
def test_nothing_that_other_systems_lack(name, call_step, small_steps, monkeypatch, tmp_path):
    """No fork, no process, no display, no file locks or limits, no libc, no affinity: as on Windows."""

    def refuse(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.delattr(os, "fork", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(runs, "fcntl", None)
    monkeypatch.setattr(runs, "resource", None)
    monkeypatch.setattr(runs.ctypes, "CDLL", refuse_library)
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    trained_folder(call_step, tmp_path, name)
    assert plotting.plt.get_fignums() == [], "every figure is closed"
    assert plotting.matplotlib.get_backend().lower() == "agg"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["peak_memory"]["value"] is None


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
def test_memory_does_not_grow_over_20_epochs(name, start, tmp_path):
    """Batches of 300 images: one kept from each epoch would be 14 MiB after fifteen epochs."""
    length = partial(children.set_length, 20)
    watch = partial(children.watch_memory, tmp_path / "memory.json")
    flags = ["--epochs", 20, "--batch-size", 300, "--out-dir", tmp_path / "run"]
    done = start(children.train, name, flags, length, watch).end()
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "memory.json").read_text())
    resident = seen["resident"]
    print(f"{name}: {resident[-16]:.0f} MiB after 5 epochs, {resident[-1]:.0f} MiB after 20")
    assert resident[-1] - resident[-16] < 8 and seen["figures"] == []
