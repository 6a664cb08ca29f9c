"""Paths and fixtures that several tests share."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

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


# ---------------------------------------------------------------------------------------------------------
# What several tests compare


def assert_refused(done, *expected):
    """Check that a command ended with exit code 2 and one line that holds the `expected` words."""
    assert done.returncode == 2, done.stderr
    assert all(words in done.stderr for words in expected), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def flags_of(name, folder, *more):
    """Return the flags with which the fixture `trained` trains a step, for another folder."""
    return [*children.FLAGS[name], "--dry-run", "--batch-size", "16", "--out-dir", str(folder), *more]


def content(folder, name):
    return torch.load(folder / name, weights_only=True)


def same(first, second):
    """Tell whether two nested values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_same_training(first, second):
    """Check that two folders hold the same weights and losses, bit for bit."""
    assert same(content(first, "model.pt"), content(second, "model.pt"))
    assert (first / "losses.csv").read_bytes() == (second / "losses.csv").read_bytes()


# ---------------------------------------------------------------------------------------------------------
# Three ways to run a step: an interpreter of its own, a copy of a prepared process, and this process


@pytest.fixture(scope="session")
def run_script():
    """Return a function that runs a step script as a user does; it returns the finished process."""

    def run(script, *flags, cwd="/", stdout=subprocess.PIPE, **variables):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, flags)],
            cwd=cwd,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "", **variables},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run


class Child:
    """A process under way that calls a function of the tests; `end()` waits for it."""

    def __init__(self, context, folder, function, arguments):
        self.folder = folder
        self.process = context.Process(target=children.call, args=(folder, function, arguments))
        self.process.start()

    def printed(self, stream="stdout"):
        path = self.folder / stream
        return path.read_text() if path.exists() else ""

    def end(self):
        """Wait for the process; return it with its exit code, minus the signal's number if one killed it."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "the process hangs"
        return subprocess.CompletedProcess(
            self.folder, self.process.exitcode, self.printed(), self.printed("stderr")
        )


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Return a function that starts a function as a process, in a folder of its own; it returns the `Child`.

    Where the system can, the process is a copy of one that has only imported the packages. That saves the seconds
    that importing torch takes.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["tests.children"])

    def start(function, *arguments):
        return Child(context, tmp_path_factory.mktemp("child"), function, arguments)

    return start


@pytest.fixture(scope="session")
def run_step(start):
    """Return a function that runs a step script as a process, from another folder; it returns the finished process."""

    def run(script, *flags):
        return start(children.run_script, str(ROOT / script), [*map(str, flags)]).end()

    return run


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
def call_here(monkeypatch):
    """Let an ablation call the main of each of its runs in this process, one at a time; return the list of commands."""
    commands, turn = [], threading.Lock()

    def run(command, **_):
        commands.append(command)
        with turn:
            code = importlib.import_module(Path(command[1]).stem).main(command[2:])
        return subprocess.CompletedProcess(command, code, "", "")

    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    return commands


class Accepted(Exception):
    """The command line was accepted, and the run would start in this folder."""


@pytest.fixture
def folder_of(monkeypatch):
    """Return a function that gives the folder in which a command would write, without running it."""

    def run(_step, _args, _options, folder, *_):
        raise Accepted(folder)

    def run_all(_script, folder, *_, **__):
        raise Accepted(folder)

    monkeypatch.setattr(cli, "Run", run)
    monkeypatch.setattr(ablation, "run_all", run_all)

    def folder(module, *flags):
        with pytest.raises(Accepted) as accepted:
            module.main([*map(str, flags)])
        return accepted.value.args[0]

    return folder


# ---------------------------------------------------------------------------------------------------------
# Shorter runs


@pytest.fixture
def small_steps(monkeypatch):
    """Give step 2 a small network by default, which draws black images at once."""
    for name, value in children.SMALL.items():
        monkeypatch.setitem(AR.PixelCNN.__init__.__kwdefaults__, name, value)
    monkeypatch.setattr(AR, "draw_images", children.black_images)


@pytest.fixture
def bare_steps(small_steps, monkeypatch):
    """Leave out the figures of all steps, and the metrics of their samples, as well."""
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
