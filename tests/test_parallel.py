"""Step 2 trained by two processes of torchrun: what one process gives."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
from models.AR import PixelCNN
from tests.conftest import ROOT
from utils import parallel

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(folder):
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    return [float(row[key]) for row in rows for key in ("train_nll", "test_nll") if row[key]]


# 7 does not divide into two equal shares; of a batch of one image one process has none.
@pytest.mark.parametrize("flags", [["--batch-size", 7], ["--conditional", "--batch-size", 1]])
def test_two_processes_give_what_one_gives(flags, run_step, tmp_path):
    flags = ["--dry-run", "--binarize", "stochastic", *flags, "--out-dir"]
    done = torchrun("hw2_step2_main.py", *flags, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1 and done.stdout.count("results in") == 1
    assert run_step("hw2_step2_main.py", *flags, tmp_path / "one").returncode == 0
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        path.name for path in (tmp_path / "one").iterdir()
    }
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_resume_of_two_processes(tmp_path):
    """A checkpoint after the first of two epochs, resumed: the losses of the run that was not interrupted."""
    flags = ["--dry-run", "--batch-size", 8, "--out-dir"]
    assert torchrun("hw2_step2_main.py", *flags, tmp_path / "whole").returncode == 0
    cut = tmp_path / "cut"
    interrupt = tmp_path / "interrupt.py"
    interrupt.write_text(
        "import os, runpy, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils import runs\n"
        "add = runs.Run.add\n"
        "def interrupting(self, *args, **losses):\n"
        "    if self.epoch == 1 and os.environ['RANK'] == '1':\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return add(self, *args, **losses)\n"
        "runs.Run.add = interrupting\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = torchrun(interrupt, ROOT / "hw2_step2_main.py", *flags, cut)
    assert done.returncode != 0
    position = torch.load(cut / "checkpoint.pt", weights_only=True)["position"]
    assert position[:2] == (1, 1), "both stop after the batch in which one was interrupted"
    assert torchrun("hw2_step2_main.py", *flags, cut, "--resume").returncode == 0
    assert losses(cut) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize(
    "module, flags", [(step1, ["--dry-run"]), (step2, ["--minutes", 1]), (step2, ["--ablation"])]
)
def test_what_is_not_for_several_processes_is_refused(module, flags, call_step, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # as torchrun does
    done = call_step(module, *flags, "--out-dir", tmp_path / "out")
    assert done.returncode == 2 and "with python, not with torchrun" in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_process_needs_no_torchrun():
    network, x = PixelCNN(num_layers=1, channels=2), torch.rand(5)
    assert parallel.wrap(network) is network and parallel.is_first() and parallel.num_processes() == 1
    assert torch.equal(parallel.share(x), x) and parallel.total(3) == 3
    assert parallel.mean(torch.tensor(2.0)) == 2.0
