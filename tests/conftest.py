"""Paths and fixtures that several tests share."""

import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# A shell starts background jobs with this signal ignored, and then tests of Ctrl-C would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Bit-for-bit equality is promised on the CPU. This has to be set before torch looks for a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Small networks gain nothing from threads, and more threads than cores make everything slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import AR  # noqa: E402
from tests import children  # noqa: E402  (found through the line above)
from utils import ablation, cli  # noqa: E402

TIMEOUT = 300  # seconds after which a process is taken to hang


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# What several tests compare


def assert_refused(done, *expected):
    """Check that a command ended with exit code 2 and one line that holds the `expected` words."""
    assert done.returncode == 2, done.stderr
    assert all(words in done.stderr for words in expected), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def flags_of(name, folder, *more):
    """Return the flags with which the fixture `trained` trains a step, for another folder."""
    return [*children.FLAGS[name], "--dry-run", "--batch-size", "16", "--out-dir", str(folder), *more]


def documented_files(name):
    """Return the names of the files that the step script says a run writes."""
    _, _, text = children.STEPS[name].__doc__.partition("Writes into")
    text = text.partition("and after --ablation")[0]
    if name == "pixelcnn":
        text = text.partition("and with --conditional")[0]
    lines = [line for line in text.splitlines() if "--ablation" not in line]
    return {*re.findall(r"\b\w+\.(?:png|gif|csv|json|npz|pt)\b", "\n".join(lines))}


def content(folder, name):
    return torch.load(folder / name, weights_only=True)


def position(folder):
    """Return how many whole epochs, and batches of the next one, the checkpoint of a run has."""
    state = content(folder, "checkpoint.pt")["state"]
    return state["_epoch"], state["_batch"]


def same(first, second):
    """Tell whether two nested values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def results(folder):
    """Return metrics.json without what depends on the time."""
    entries = json.loads((folder / "metrics.json").read_text())
    return {name: entries[name] for name in entries.keys() - {"wall_time", "speed", "sampling_time"}}


def assert_same_run(first, second):
    """Check that two finished runs have the same weights, tables, metrics and optimisers, bit for bit."""
    assert same(content(first, "model.pt"), content(second, "model.pt"))
    ours, theirs = content(first, "checkpoint.pt"), content(second, "checkpoint.pt")
    for key in ("modules", "random", "state"):
        assert same(ours[key], theirs[key]), key
    assert {each.name for each in first.glob("*.csv")} == {each.name for each in second.glob("*.csv")}
    for path in first.glob("*.csv"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert results(first) == results(second)
    assert not [*first.glob("*.tmp"), *second.glob("*.tmp")]


# Three ways to run a step: an interpreter of its own, a copy of a prepared process, and this process


class Child:
    """A process under way that calls a function of the tests; `end()` waits for it."""

    def __init__(self, context, folder, function, arguments):
        self.streams = folder / "stdout", folder / "stderr"
        self.process = context.Process(target=children.call, args=(folder, function, arguments))
        self.process.start()

    def end(self):
        """Wait for the process; return it with its exit code, minus the signal's number if one killed it."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "the process hangs"
        printed = [path.read_text() if path.exists() else "" for path in self.streams]
        return subprocess.CompletedProcess([], self.process.exitcode, *printed)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Return a function that starts a function as a process, in a folder of its own; it returns the `Child`.

    Where the system can, it copies a process that has imported the packages, which saves seconds.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["tests.children"])

    def start(function, *arguments):
        return Child(context, tmp_path_factory.mktemp("child"), function, arguments)

    return start


@pytest.fixture
def call_step(capsys):
    """Return a function that calls a step's main in this process; it returns what a finished process would."""

    def call(module, *flags):
        flags = [*map(str, flags)]
        code = module.main(flags)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess([module.__file__, *flags], code, printed.out, printed.err)

    return call


@pytest.fixture
def edit(monkeypatch, tmp_path):
    """Return a function that imports a copy of a script, as a student would edit it: pairs of old and new text."""

    def edit(path, *replacements):
        text = Path(path).read_text()
        for old, new in replacements:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        copy = tmp_path / f"edited_{Path(path).name}"
        copy.write_text(text)
        spec = importlib.util.spec_from_file_location(copy.stem, copy)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, copy.stem, module)
        spec.loader.exec_module(module)
        return module

    return edit


class Process:
    """What `subprocess.Popen` would give for a process that has ended: run(command) is its exit code and its errors."""

    def __init__(self, run, command, **_):
        self.returncode, self.errors = run(command)

    def communicate(self):
        return None, self.errors

    wait = terminate = communicate


@pytest.fixture
def processes_here(monkeypatch):
    """Return a function that lets an ablation call run(command) in place of each process."""

    def replace(run):
        popen = SimpleNamespace(Popen=partial(Process, run), DEVNULL=None, PIPE=None)
        monkeypatch.setattr(ablation, "subprocess", popen)
        monkeypatch.setattr(ablation, "num_workers", lambda device: 1)

    return replace


@pytest.fixture
def call_here(processes_here):
    """Let an ablation call the main of each of its runs in this process; return the list of commands."""
    commands = []

    def run(command):
        commands.append(command)
        return importlib.import_module(Path(command[1]).stem).main(command[2:]), b""

    processes_here(run)
    return commands


@pytest.fixture
def folder_of(monkeypatch):
    """Return a function that gives the folder in which a command would write, without running it."""

    def stop(*arguments):
        raise LookupError(next(each for each in arguments if isinstance(each, Path)))

    monkeypatch.setattr(cli, "Run", stop)
    monkeypatch.setattr(ablation, "run_all", stop)

    def folder(module, *flags):
        with pytest.raises(LookupError) as stopped:
            module.main([*map(str, flags)])
        return stopped.value.args[0]

    return folder


# Shorter runs


@pytest.fixture
def bare_steps(monkeypatch):
    """Leave out the figures and the metrics of samples; give step 2 a small network by default."""
    for name, value in children.SMALL.items():
        monkeypatch.setitem(AR.PixelCNN.__init__.__kwdefaults__, name, value)
    children.draw_nothing(monkeypatch.setattr)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return the folders of dry runs without figures, one for each of `children.STEPS`, with batches of 16 images.

    Several tests share them, so they must stay as they are: copy one to change it.
    """
    folders = {name: tmp_path_factory.mktemp(name) for name in children.STEPS}
    with pytest.MonkeyPatch.context() as patch:
        children.draw_nothing(patch.setattr)
        for name, folder in folders.items():
            assert children.STEPS[name].main(flags_of(name, folder)) == 0
    return folders
