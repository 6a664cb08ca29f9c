"""Step 2 trained by two processes of torchrun: what one process gives."""

import csv
import json
import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
from models.AR import PixelCNN
from tests import children
from tests.children import FLAGS
from tests.conftest import ROOT, TIMEOUT, assert_refused
from utils import parallel

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STOCHASTIC = ["--binarize", "stochastic", "--batch-size"]


def torchrun(*command):
    return subprocess.run(
        [*TORCHRUN, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def losses(folder):
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    return [float(row[key]) for row in rows for key in ("train_nll", "test_nll") if row[key]]


@pytest.fixture
def train_by_two(start):
    """Train by two processes that have the environment of torchrun's; returns both, ended."""

    def train(name, flags, *hooks):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        by_rank = [[partial(children.join_as, rank, port), *hooks] for rank in (0, 1)]
        return [process.end() for process in [start(children.train, name, flags, *each) for each in by_rank]]

    return train


def assert_equal_runs(two, one):
    assert json.loads((two / "config.json").read_text())["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


def test_two_processes_of_torchrun_give_what_one_gives(start, tmp_path):
    """Nothing but the first process prints, and there are no warnings. 7 images do not divide into two equal shares."""
    flags = [*STOCHASTIC, 7, "--out-dir"]
    done = torchrun("hw2_step2_main.py", "--dry-run", *FLAGS["pixelcnn"], *flags, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1 and done.stdout.count("results in") == 1
    assert "Warning" not in done.stderr, done.stderr
    assert (tmp_path / "two" / "samples.png").exists() and (tmp_path / "two" / "metrics.json").exists()
    one = start(children.train, "pixelcnn", [*flags, tmp_path / "one"], children.draw_nothing).end()
    assert one.returncode == 0, one.stderr
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("name, batch_size", [("pixelcnn", 8), ("conditional", 7), ("conditional", 1)])
def test_two_processes_give_what_one_gives(name, batch_size, train_by_two, start, tmp_path):
    """Of a batch of one image one process has none."""
    flags = [*STOCHASTIC, batch_size, "--out-dir"]
    first, second = train_by_two(name, [*flags, tmp_path / "two"], children.draw_nothing)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.count("epoch 2/2") == 1 and second.stdout == ""
    one = start(children.train, name, [*flags, tmp_path / "one"], children.draw_nothing).end()
    assert one.returncode == 0, one.stderr
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


def test_resume_of_two_processes(train_by_two, tmp_path):
    """A checkpoint in the second of two epochs, resumed: the losses of the run that was not interrupted."""
    flags = ["--batch-size", 8, "--out-dir"]
    whole = train_by_two("pixelcnn", [*flags, tmp_path / "whole"], children.draw_nothing)
    assert [each.returncode for each in whole] == [0, 0]
    cut = tmp_path / "cut"
    stopped = train_by_two("pixelcnn", [*flags, cut], partial(children.interrupt, 4, rank="1"))
    assert [each.returncode for each in stopped] == [130, 130], "both stop, whichever was interrupted"
    position = torch.load(cut / "checkpoint.pt", weights_only=True)["position"]
    assert position[:2] == (1, 1), "both stop after the batch in which one was interrupted"
    resumed = train_by_two("pixelcnn", [*flags, cut, "--resume"], children.draw_nothing)
    assert [each.returncode for each in resumed] == [0, 0]
    assert losses(cut) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize(
    "module, flags", [(step1, ["--dry-run"]), (step2, ["--minutes", 1]), (step2, ["--ablation"])]
)
def test_what_is_not_for_several_processes_is_refused(module, flags, call_step, monkeypatch, tmp_path):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):  # as torchrun does
        monkeypatch.setenv(name, "1")
    done = call_step(module, *flags, "--out-dir", tmp_path / "out")
    assert_refused(done, "with python, not with torchrun")
    assert not (tmp_path / "out").exists()


def test_half_of_the_environment_of_torchrun_is_refused(call_step, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    done = call_step(step2, "--dry-run", "--out-dir", tmp_path / "out")
    assert_refused(done, "TORCHELASTIC_RUN_ID", "RANK")
    assert not (tmp_path / "out").exists()


def test_one_process_needs_no_torchrun():
    network, x = PixelCNN(num_blocks=1, channels=2), torch.rand(5)
    assert parallel.wrap(network) is network and parallel.is_first() and parallel.num_processes() == 1
    assert torch.equal(parallel.shard(x)[0], x) and parallel.total([3.0, 0.5]) == [3.0, 0.5]
