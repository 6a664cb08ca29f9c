"""A training run: its files, its samples, numbers that are not finite, and the helpers of the training loops."""

import math
from types import SimpleNamespace

import pytest
import torch

import hw2_step2_main as step2
import hw2_step3_main as step3
from tests import children
from tests.children import STEPS
from tests.conftest import ROOT, assert_refused, content, documented_files, flags_of, position, same
from utils import cli, files, machine, metrics
from utils.plotting import STYLE
from utils.run import Run

JUDGE = metrics.judge_sampler

# Files


@pytest.mark.parametrize("name", STEPS)
def test_dry_run_writes_every_file(name, call_step, trained, monkeypatch, tmp_path):
    """With every figure and metric, and the same training as without."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 60)
    monkeypatch.setattr(cli, "load_data", children.few_images)
    done = call_step(STEPS[name], *flags_of(name, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert same(content(tmp_path, "model.pt"), content(trained[name], "model.pt"))
    assert (tmp_path / "losses.csv").read_bytes() == (trained[name] / "losses.csv").read_bytes()
    assert files.read_csv(tmp_path / "losses.csv")[-1]["epoch"] == 2

    written = {path.name for path in tmp_path.iterdir() if path.suffix != ".pdf"}
    assert written == {*documented_files(name), "checkpoint.pt", ".lock"}
    drawn = {f"drawing {each}" for each in written if each.endswith((".png", ".gif"))}
    assert {"epoch 2/2", *drawn} <= {line.partition(" (")[0] for line in done.stdout.splitlines()}
    for path in tmp_path.glob("*.pdf"):
        assert b"/Type3" not in path.read_bytes() and path.with_suffix(".png").exists()
    config = files.read_json(tmp_path / "config.json")
    assert (config["seed"], config["device"], config["versions"]["torch"]) == (0, "cpu", torch.__version__)
    results = files.read_json(tmp_path / "metrics.json")
    for entry in results.values():
        assert isinstance(entry["value"], float) and entry["unit"] and entry["formula"]
    assert {*metrics.DESCRIPTIONS, "sampling_time", "wall_time", "speed"} <= results.keys()
    assert results["frechet_distance"]["samples"] == metrics.NUM_JUDGED_QUICKLY

    # The trained model draws the same samples again, wherever they go.
    again = flags_of(name, tmp_path / "again", "--sample-only", "--model", tmp_path / "model.pt")
    assert call_step(STEPS[name], *again).returncode == 0
    assert (tmp_path / "again" / "samples.png").read_bytes() == (tmp_path / "samples.png").read_bytes()


@pytest.fixture
def drawn(bare_steps, monkeypatch):
    """Return a dict that gets the arguments of each figure's function, by the file's name."""
    seen = {}
    monkeypatch.setattr(Run, "draw", lambda self, name, _, *arguments, **__: seen.update({name: arguments}))
    return seen


def test_samples_go_to_a_folder_of_their_own(call_step, drawn, monkeypatch, tmp_path):
    """Without --model they are drawn from the run with the same options, and nothing of it is changed."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    flags = ["--hidden-dims", "8", "--data-dir", ROOT / "data"]
    assert call_step(step3, "--dry-run", *flags).returncode == 0
    runs_folder = tmp_path / "results" / "step3_vae" / "runs"
    before = {path: path.read_bytes() for path in runs_folder.rglob("*") if path.is_file()}
    assert runs_folder / "hidden_dims=8,dry_run" / "model.pt" in before
    more = ["--sample-only", "--count", 20, "--seed", 3, "--bound-samples", 7]
    done = call_step(step3, "--dry-run", *flags, *more)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"results go to {runs_folder}") and first.endswith("sample_only")
    assert len(drawn["samples.png"][0]) == 20
    assert before == {path: path.read_bytes() for path in runs_folder.rglob("*") if path.is_file()}
    # The reported model has not been trained here.
    done = call_step(step3, "--sample-only", *flags[2:])
    assert_refused(done, str(runs_folder.with_name("model.pt")))


def test_count_and_digit_of_samples(call_step, drawn, trained, tmp_path):
    flags = ["--sample-only", "--out-dir", tmp_path, "--count", 20, "--conditional", "--digit", 7]
    flags += ["--model", trained["conditional"] / "model.pt"]
    assert call_step(step2, *flags, "--complete", 3, 4).returncode == 0
    assert len(drawn["samples.png"][0]) == len(drawn["samples_digit.png"][0]) == 20
    assert drawn["completions.png"][2].tolist() == [0, 4]  # labels of the test images 3 and 4
    assert_refused(call_step(step2, *flags, "--complete", 3, 10_000), "--complete")


@pytest.mark.parametrize("name", STEPS)
def test_a_run_without_the_classifier_finishes(name, call_step, bare_steps, monkeypatch, tmp_path):
    """It says at its start what it leaves out."""
    monkeypatch.setattr(metrics, "classifier_folder", lambda dataset: tmp_path / "none")
    monkeypatch.setattr(metrics, "judge_sampler", JUDGE)
    monkeypatch.setattr(metrics, "load_data", children.few_images)
    done = call_step(STEPS[name], *flags_of(name, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("python results/train_classifier.py") < done.stdout.index("epoch 1/2")
    assert "frechet_distance" not in files.read_json(tmp_path / "metrics.json")


# Numbers that are not finite, and other trainings


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(call_step, bare_steps, monkeypatch, tmp_path):
    calls, loss_func = [], step3.loss_func

    def diverging(*args):
        calls.append(1)
        return loss_func(*args) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(step3, "loss_func", diverging)
    assert_refused(call_step(step3, *flags_of("vae", tmp_path)), "epoch 2, batch 2")
    assert position(tmp_path) == (0, 3)
    assert files.all_finite(content(tmp_path, "checkpoint.pt")["modules"])


@pytest.mark.parametrize("name", STEPS)
def test_a_training_that_diverges_is_stopped(name, call_step, bare_steps, tmp_path):
    """For real, by a learning rate that is far too high."""
    kinds = ("d-", "g-") if name == "gan" else ("",)
    flags = [word for kind in kinds for word in (f"--{kind}learning-rate", "1e30")]
    assert_refused(call_step(STEPS[name], *flags_of(name, tmp_path, *flags)), "lower the learning rate")
    assert files.all_finite(content(tmp_path, "checkpoint.pt")["modules"])
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("name", STEPS)
def test_the_shortest_training_ends_with_metrics(name, call_step, bare_steps, tmp_path):
    """The clock starts with the first batch, and that batch is trained."""
    flags = [*children.FLAGS[name], "--minutes", 1e-6, "--batch-size", 16, "--out-dir", tmp_path]
    done = call_step(STEPS[name], *flags)
    assert done.returncode == 0 and "hardly trained" in done.stdout, done.stderr
    assert position(tmp_path) == (0, 1)
    rows = files.read_csv(tmp_path / ("epochs.csv" if name == "gan" else "losses.csv"))
    assert rows[-1]["epoch"] == pytest.approx(1 / 13, abs=0.005)
    if name == "gan":
        assert files.read_csv(tmp_path / "quality.csv")[-1]["epoch"] == rows[-1]["epoch"]


def test_minutes_limit_the_training(call_step, bare_steps, monkeypatch, tmp_path):
    """The clock stands in evaluations, the learning rate falls with the time, and the last row is of epoch 2.2.

    A batch takes a second here, and an evaluation a minute.
    """
    now = [0.0]

    def slowly(function, seconds):
        def called(*arguments):
            now[0] += seconds
            return function(*arguments)

        return called

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step2, "evaluate", slowly(step2.evaluate, 60))
    monkeypatch.setattr(step2.data, "binarize", slowly(step2.data.binarize, 1))
    flags = ["--minutes", 22 / 60, "--batch-size", 20, "--out-dir", tmp_path]
    done = call_step(step2, *flags)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in files.read_csv(tmp_path / "losses.csv")] == [0, 1, 2, 2.2]
    assert "epoch 2.2 (" in done.stdout and "hardly trained" not in done.stdout
    schedule = content(tmp_path, "checkpoint.pt")["modules"]["schedule"]
    assert schedule["last_epoch"] == 22 and max(schedule["_last_lr"]) < 1e-6


# The loop's helpers


@pytest.fixture
def toy_run(tmp_path):
    """Return a run of two epochs that trains nothing."""
    flags = dict(device="cpu", seed=0, minutes=None, dry_run=False, resume=False, restart=False)
    args = SimpleNamespace(**flags, held_out=False, dataset="MNIST", variant=None, command="toy")
    (tmp_path / "toy").mkdir()
    run = Run("toy", args, dict(num_epochs=2, batch_size=4), tmp_path / "toy")
    yield run
    run.close()


def test_means_weigh_a_short_last_batch_by_its_size(toy_run):
    """And a loss that some batches lack is averaged over the others."""
    toy_run.resume_or_start()
    seen = []
    for epoch in toy_run.epochs(2):
        for (x,) in toy_run.batches(torch.ones(10), batch_size=4):
            rare = torch.tensor(5.0) if toy_run.iteration % 2 == 0 else None
            toy_run.record_row(size=torch.tensor(float(len(x))), rare=rare)
        seen.append((epoch, toy_run.epochs_done, toy_run.is_last(), toy_run.pop_means()))
    means = dict(size=pytest.approx((4 * 4 + 4 * 4 + 2 * 2) / 10), rare=5.0)
    assert seen == [(1, 1, False, means), (2, 2, True, means)] and toy_run.images_seen == 20
    assert toy_run.tables["losses"] == {
        "iteration": [1, 2, 3, 4, 5, 6],
        "epoch": [1, 1, 1, 2, 2, 2],
        "size": [4, 4, 2, 4, 4, 2],
        "rare": [None, 5.0, None, 5.0, None, 5.0],
    }


def test_tables_hold_what_their_files_hold(toy_run):
    """Six digits, so that a resumed run draws the same figures."""
    toy_run.resume_or_start()
    toy_run.log("mine", value=math.pi, name="a", none=None)
    assert toy_run.tables["mine"] == {"value": [3.14159], "name": ["a"], "none": [None]}


def test_snapshots_are_rounded(toy_run):
    toy_run.snapshot(torch.tensor([0.0, 0.9999, 0.5 / 255 + 1e-4]))
    assert toy_run.snapshots[0].tolist() == [0, 255, 1]
