"""Step 2 trained by two processes of torchrun: their losses, signals and resumption, and what is refused."""

import importlib.util
import os
import socket
import subprocess
import sys
from functools import partial

import pytest

import hw2_step1_main as step1
import hw2_step2_main as step2
from tests import children
from tests.conftest import ROOT, TIMEOUT, assert_refused, position
from utils.files import read_csv, read_json

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPT = """import sys
from tests import children
children.train("pixelcnn", sys.argv[1:], children.draw_nothing)
"""


def losses(folder):
    rows = read_csv(folder / "losses.csv")
    return [row[key] for row in rows for key in ("train_nll", "test_nll") if row[key]]


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


@pytest.mark.parametrize("name, batch_size", [("pixelcnn", 8), ("conditional", 7)])
def test_two_processes_have_the_losses_of_one(name, batch_size, train_by_two, start, tmp_path):
    """Within 1 %, also if a batch does not divide into equal parts. Only the first process prints."""
    flags = ["--batch-size", batch_size, "--out-dir"]
    first, second = train_by_two(name, [*flags, tmp_path / "two"], children.draw_nothing)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.count("epoch 2/2") == 1 and second.stdout == ""
    one = start(children.train, name, [*flags, tmp_path / "one"], children.draw_nothing).end()
    assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    assert losses(tmp_path / "two")[1:] != losses(tmp_path / "two")[:-1]
    assert read_json(tmp_path / "two" / "config.json")["processes"] == 2


@pytest.mark.skipif(
    sys.version_info < (3, 10) and not importlib.util.find_spec("importlib_metadata"),
    reason="torchrun of this version needs importlib_metadata",
)
def test_two_processes_of_torchrun(tmp_path):
    """For real, and without a warning."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, script, "--batch-size", "7", "--out-dir", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1 and "Warning" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "metrics.json").exists()


def test_a_signal_to_one_of_two_processes_and_resume(train_by_two, tmp_path):
    """Both stop after the same batch. The resumed run has the losses of the one that was not interrupted."""
    flags = ["--batch-size", 8, "--out-dir"]
    whole = train_by_two("pixelcnn", [*flags, tmp_path / "whole"], children.draw_nothing)
    assert [each.returncode for each in whole] == [0, 0]
    cut = tmp_path / "cut"
    hooks = children.draw_nothing, partial(children.interrupt, 4, rank="1")
    stopped = train_by_two("pixelcnn", [*flags, cut], *hooks)
    assert [each.returncode for each in stopped] == [130, 130]
    assert position(cut) == (1, 1)
    resumed = train_by_two("pixelcnn", [*flags, cut, "--resume"], children.draw_nothing)
    assert [each.returncode for each in resumed] == [0, 0], resumed[0].stderr
    assert losses(cut) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize("epoch, expected", [(1, (1, 3)), (2, (2, 3))])
def test_a_signal_in_an_evaluation_stops_all_after_it(epoch, expected, train_by_two, tmp_path):
    """Also after the last epoch. No process is left waiting, and the evaluation is not repeated."""
    flags = ["--batch-size", 8, "--out-dir", tmp_path]
    hooks = children.draw_nothing, partial(children.interrupt_evaluation, epoch)
    for done in train_by_two("pixelcnn", flags, *hooks):
        assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    epochs, batches = position(tmp_path)
    assert (epochs + (batches > 0), batches) == expected
    resumed = train_by_two("pixelcnn", [*flags, "--resume"], children.draw_nothing)
    assert [each.returncode for each in resumed] == [0, 0], resumed[0].stderr
    assert len(losses(tmp_path)) == 5  # without the training images before the training


def test_a_batch_smaller_than_the_number_of_processes_is_refused(train_by_two, tmp_path):
    flags = ["--batch-size", 1, "--out-dir", tmp_path]
    for done in train_by_two("pixelcnn", flags, children.draw_nothing):
        assert_refused(done, "lower the number of processes")


@pytest.mark.parametrize("flags", [["--minutes", 1], ["--ablation"], ["--sample-only"], None])
def test_what_is_not_for_several_processes_is_refused(flags, call_step, monkeypatch, tmp_path):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):  # as torchrun does
        monkeypatch.setenv(name, "1")
    step = step2 if flags else step1
    done = call_step(step, *(flags or ["--dry-run"]), "--out-dir", tmp_path / "out")
    assert_refused(done, "with python, not with torchrun")
    assert not (tmp_path / "out").exists()
