"""Paths and small pieces that several tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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
