"""Paths and small pieces that several tests share."""

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

from utils import runs  # noqa: E402  (found through the line above)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run_step():
    """Run a step script as a process of its own, from another folder; returns the finished process."""

    def run(script, *flags, cwd="/", **kwargs):
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": ""}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **kwargs
        )

    return run


@pytest.fixture
def call_step(monkeypatch, capsys):
    """Call a step's main() in this process, which is quicker where only its end matters."""

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        code = 0
        try:
            runs.run_main(module.main)
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, printed.out, printed.err)

    return call
