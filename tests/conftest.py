"""Paths and small pieces that several tests share."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

# Bit-for-bit equality is promised on the CPU. This has to be set before torch looks for a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import children  # noqa: E402  (found through the line above)
from utils import runs  # noqa: E402

TIMEOUT = 300  # seconds after which a process is taken to hang


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run_script():
    """Run a step script as a user does, with an interpreter of its own; returns the finished process."""

    def run(script, *flags, cwd="/"):
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": ""}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT
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
        """Wait for the process; returns it with its exit code, minus the signal's number if one killed it."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "the process hangs"
        return subprocess.CompletedProcess(
            self.folder, self.process.exitcode, self.printed(), self.printed("stderr")
        )


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start a function as a process of its own, in a folder of its own; returns the `Child`.

    Where the system can, the process is a copy of one that has only imported the packages, which saves the
    seconds that importing torch takes.
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
    """Run a step script as a process of its own, from another folder; returns the finished process."""

    def run(script, *flags):
        return start(children.run_script, str(ROOT / script), [*map(str, flags)]).end()

    return run


@pytest.fixture
def call_step(monkeypatch, capsys):
    """Call a step's main() in this process, which is quicker where only its end matters."""

    def call(module, *flags):
        locks, lock = [], runs.lock

        def remember(folder):
            locks.append(lock(folder))
            return locks[-1]

        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
            patch.setattr(runs, "lock", remember)
            try:
                runs.run_main(module.main)
            except SystemExit as end:
                code = end.code or 0
            finally:
                for file in locks:  # as the end of a process does
                    file.close()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess([module.__file__, *flags], code, printed.out, printed.err)

    return call


@pytest.fixture
def small_steps(monkeypatch):
    """Step 2 with a small network and without samples, for dry runs in this process."""
    for key, value in children.SMALL.items():
        monkeypatch.setitem(children.step2.DEFAULTS, key, value)
    monkeypatch.setattr(children.PixelCNN, "_draw", lambda self, number, *_: torch.zeros(number, 1, 28, 28))
