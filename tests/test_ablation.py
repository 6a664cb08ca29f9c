"""Ablations: which runs they make and keep, their lengths and flags, and their table."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests.children import FLAGS
from tests.conftest import ROOT, assert_refused
from utils import ablation
from utils.files import read_csv

TINY = [*FLAGS["vae"], "--dry-run", "--batch-size", "8", "--ablation", "--seeds", "2"]


def value(folder, key):
    return json.loads((folder / "metrics.json").read_text())[key]["value"]


def test_a_table_grows_with_each_variant(call_step, bare_steps, call_here, monkeypatch, tmp_path):
    """Finished runs stay, as long as the flags are the same."""

    def ablate(*flags):
        call_here.clear()
        done = call_step(step3, *TINY, *flags, "--out-dir", tmp_path)
        assert done.returncode == 0, done.stderr
        return [" ".join(command[2:]) for command in call_here], read_csv(tmp_path / "ablation.csv")

    commands, rows = ablate("--variant", "kl-0.1")
    assert all((tmp_path / name).exists() for name in ("ablation.png", "kl_weights.png"))
    monkeypatch.setattr(step3, "draw_ablation", lambda *_: None)
    assert len(commands) == 4 and all("--held-out" in command for command in commands)
    assert [row["variant"] for row in rows] == ["default", "kl-0.1"]
    folders = [tmp_path / "ablation" / f"seed_{seed}" for seed in (0, 1)]
    values = [value(folder, "test_negative_elbo") for folder in folders]
    assert rows[0]["seeds"] == 2
    assert rows[0]["test_negative_elbo_mean"] == pytest.approx(statistics.fmean(values), rel=1e-5)
    assert rows[0]["test_negative_elbo_std"] == pytest.approx(statistics.stdev(values), rel=1e-3)
    found = json.loads((folders[1] / "variants" / "kl-0.1" / "config.json").read_text())
    assert (found["variant"], found["seed"]) == ("kl-0.1", 1)
    assert found["hyperparameters"]["hidden_dims"] == [8]
    assert found["evaluated_on"] == "last 10,000 training images"

    commands, more_rows = ablate("--variant=kl-4")
    assert len(commands) == 2 and all("--variant kl-4" in command for command in commands)
    assert [row["variant"] for row in more_rows] == ["default", "kl-0.1", "kl-4"] and more_rows[:2] == rows
    for more in ([], ["--restart"]):  # their rows would not compare with those of the finished runs
        other = ["--variant", "kl-4", "--kl-warm-up", 0.1, *more, "--out-dir", tmp_path]
        assert_refused(call_step(step3, *TINY, *other), "--hidden-dims 8", "--out-dir")
    commands, again = ablate("--variant", "kl-4", "--restart")
    assert len(commands) == 4 and all("--restart" in command for command in commands)
    assert [row["variant"] for row in again] == ["default", "kl-0.1", "kl-4"]


def test_seeds_make_a_table_of_their_own(call_step, bare_steps, call_here, tmp_path):
    flags = [*FLAGS["gan"], "--dry-run", "--variant", "no-dropout", "--seeds", 2, "--seed", 5]
    done = call_step(step1, *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "seeds").iterdir()} == {
        "seed_5",
        "seed_6",
        "flags.json",
        ".lock",
    }
    config = json.loads((tmp_path / "seeds" / "seed_6" / "config.json").read_text())
    assert (config["variant"], config["seed"], config["hyperparameters"]["dropout"]) == ("no-dropout", 6, 0.0)
    assert config["evaluated_on"] == "test images"
    (row,) = read_csv(tmp_path / "seeds.csv")
    assert (row["variant"], row["seeds"]) == ("no-dropout", 2)


def test_ablation_of_step_2(call_step, bare_steps, call_here, tmp_path):
    """The flag of the conditional network is passed on."""
    flags = ["--conditional", "--ablation", "--variant", "first-7", "--seeds", "1", "--dry-run"]
    done = call_step(step2, *flags, "--batch-size", 8, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["variant"] for row in read_csv(tmp_path / "ablation.csv")] == ["default", "first-7"]
    folder = tmp_path / "ablation" / "seed_0" / "variants" / "first-7"
    config = json.loads((folder / "config.json").read_text())
    assert config["step"] == "step2_conditional_pixelcnn" and config["variant"] == "first-7"
    assert config["evaluated_on"] == "last 10,000 training images"


@pytest.mark.parametrize("module, name", [(step1, "gan"), (step3, "vae")])
def test_ablation_of_a_data_set_without_a_classifier(
    module, name, call_step, bare_steps, call_here, tmp_path
):
    """Its runs lack the metrics that rest on the classifier."""
    flags = [*FLAGS[name], "--dry-run", "--ablation", "--seeds", 1, "--dataset", "FashionMNIST"]
    variant = [*module.VARIANTS][0]
    done = call_step(module, *flags, "--variant", variant, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ablation.png").exists()
    assert [row["variant"] for row in read_csv(tmp_path / "ablation.csv")] == ["default", variant]


def test_a_process_that_fails_is_named_with_its_reason(call_step, tmp_path):
    """A real process, which refuses what only the network can check."""
    done = call_step(step2, "--dry-run", "--seeds", 1, "--kernel-size", 4, "--out-dir", tmp_path)
    assert_refused(done, "1 of 1 runs failed", "default with seed 0", "kernel_size must be", "odd")
    assert not (tmp_path / "seeds.csv").exists()


@pytest.fixture
def pretend(monkeypatch):
    """Let the runs of an ablation only leave their files behind; return what has been started.

    Each entry has the variant, whether the run is resumed, and the flags of its length. A variant in
    `pretend.failing` fails.
    """
    seen = SimpleNamespace(runs=[], failing=(), folders={})

    def run(command, **_):
        flags = dict(zip(command, command[1:]))
        name = flags.get("--variant")
        seen.runs.append((name, "--resume" in command, flags.get("--minutes"), flags.get("--epochs")))
        if name in seen.failing:
            return subprocess.CompletedProcess(command, 2, "", f"hw2: {command[-1]} Ü: d_loss became nan")
        folder = seen.folders[name] = Path(flags["--out-dir"])
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("checkpoint.pt", "losses.csv", "model.pt"):
            (folder / file).touch()
        module = next(each for each in (step1, step2, step3) if Path(command[1]).stem == each.__name__)
        changes = module.VARIANTS[name][1] if name else {}
        (folder / "config.json").write_text(json.dumps({"hyperparameters": changes}))
        (folder / "metrics.json").write_text(json.dumps({"wall_time": {"value": 1.0}}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    for module in (step1, step3):
        monkeypatch.setattr(module, "draw_ablation", lambda _, folders: seen.folders.update(drawn=folders))
    return seen


def test_finished_runs_are_kept_and_interrupted_ones_go_on(call_step, pretend, monkeypatch, tmp_path):
    flags = ["--ablation", "--seeds", "1", "--out-dir"]
    assert call_step(step1, *flags, tmp_path).returncode == 0
    names = [None, *step1.VARIANTS]
    expected = [(name, False, None, None) for name in names]
    assert sorted(pretend.runs, key=str) == sorted(expected, key=str)
    folders = pretend.folders
    assert list(folders["drawn"]) == ["default", *step1.VARIANTS]
    assert folders["relativistic"] == tmp_path / "ablation" / "seed_0" / "variants" / "relativistic"
    assert folders["relativistic"] == folders["drawn"]["relativistic"]
    assert [row["variant"] for row in read_csv(tmp_path / "ablation.csv")] == ["default", *step1.VARIANTS]

    pretend.runs.clear()
    later = (folders["plain"] / "metrics.json").stat().st_mtime_ns + 10**9
    os.utime(folders["plain"] / "checkpoint.pt", ns=(later, later))  # started anew and interrupted
    (folders["relativistic"] / "metrics.json").unlink()
    (folders["high-rates"] / "metrics.json").unlink()
    (folders["high-rates"] / "checkpoint.pt").unlink()
    (folders["d-freq-2"] / "checkpoint.pt").unlink()
    for file in ("checkpoint.pt", "model.pt"):  # as in a copy that has the figures alone
        (folders["dropout-50"] / file).unlink()
    assert call_step(step1, *flags, tmp_path).returncode == 0
    resumed = {name: is_resumed for name, is_resumed, _, _ in pretend.runs}
    assert resumed == {"dropout-50": False, "plain": True, "relativistic": True, "high-rates": False}

    pretend.runs.clear()
    monkeypatch.setitem(step1.VARIANTS, "no-dropout", ("edited meanwhile", dict(dropout=0.01)))
    assert call_step(step1, *flags, tmp_path).returncode == 0
    assert [run[:2] for run in pretend.runs] == [("no-dropout", False)], "not resumed"

    pretend.runs.clear()
    assert_refused(call_step(step1, *flags, tmp_path, "--minutes", "4"), "same flags", "--out-dir")
    assert pretend.runs == []
    assert call_step(step1, *flags, tmp_path / "epochs", "--epochs", "2").returncode == 0
    assert {run[2:] for run in pretend.runs} == {(None, "2")}


@pytest.mark.parametrize("module", [step1, step2, step3])
def test_the_reported_ablation_has_the_flags_that_are_kept(module, call_step, pretend, tmp_path):
    """Otherwise nobody could go on with it."""
    (tmp_path / "ablation").mkdir()
    shutil.copy(ROOT / "results" / module.STEP / "ablation" / "flags.json", tmp_path / "ablation")
    done = call_step(module, "--ablation", "--seeds", 1, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_run_that_fails_does_not_keep_the_others(call_step, pretend, tmp_path):
    pretend.failing = ("no-dropout",)
    flags = ["--ablation", "--seeds", "1", "--out-dir", tmp_path]
    assert_refused(
        call_step(step1, *flags), "no-dropout with seed 0 failed", "nan", f"1 of {1 + len(step1.VARIANTS)}"
    )
    assert {run[0] for run in pretend.runs} == {None, *step1.VARIANTS}
    assert not (tmp_path / "ablation.csv").exists()
    pretend.runs.clear()
    assert_refused(call_step(step1, *flags), "1 of 1")
    assert [run[0] for run in pretend.runs] == ["no-dropout"]


def test_a_reason_that_the_terminal_cannot_print_does_not_end_an_ablation(pretend, monkeypatch, tmp_path):
    pretend.failing = ("no-dropout", "plain")
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "stdout", "w", encoding="ascii"))
    assert step1.main(["--ablation", "--seeds", "1", "--out-dir", str(tmp_path / "Ü")]) == 2
    assert {run[0] for run in pretend.runs} == {None, *step1.VARIANTS}
    sys.stdout.flush()
    assert "no-dropout with seed 0 failed" in (tmp_path / "stdout").read_text()


def test_variants_about_the_length_have_their_own(call_step, pretend, tmp_path):
    for folder, more, expected in (("a", [], "8"), ("b", ["--epochs", "3"], "3")):
        pretend.runs.clear()
        flags = ["--ablation", "--seeds", "1", "--out-dir", tmp_path / folder, *more]
        assert call_step(step3, *flags).returncode == 0
        lengths = {name: epochs for name, _, _, epochs in pretend.runs}
        assert {None, "epochs-4", "epochs-16"} < lengths.keys() and not {
            *step3.NOT_COMPARABLE
        } & lengths.keys()
        own = {name: length for name, length in lengths.items() if length != expected}
        assert own == ({} if more else {"epochs-4": None, "epochs-16": None})
    pretend.runs.clear()
    flags = ["--ablation", "--variant", "long-20", "--seeds", "1", "--out-dir", tmp_path / "c"]
    assert call_step(step3, *flags).returncode == 0
    assert {(name, epochs) for name, _, _, epochs in pretend.runs} == {(None, None), ("long-20", None)}


def test_flags_are_passed_on_to_each_run(call_step, pretend, tmp_path):
    """All but those that differ between the runs, however they are spelled."""
    flags = [
        "--seeds=2",
        "--kl-coeff",
        0.5,
        "--ablation",
        "--variant=kl-4",
        "--seed",
        7,
        "--hidden-dims",
        8,
        4,
    ]
    assert call_step(step3, *flags, "--no-such", "--out-dir", tmp_path / "no").returncode == 2
    assert call_step(step3, *flags, f"--out-dir={tmp_path}").returncode == 0
    kept = json.loads((tmp_path / "ablation" / "flags.json").read_text())
    assert kept[-5:] == ["--kl-coeff", "0.5", "--hidden-dims", "8", "4"]
    assert len(pretend.runs) == 4 and pretend.folders[None].parent == tmp_path / "ablation"
    assert not (tmp_path / "no").exists()


def test_table_of_metrics_that_not_every_run_has(tmp_path):
    """More than two latent dimensions have no integral over the plane."""
    for name, results in (("default", dict(test_kl=9.0, test_nll=130.0)), ("latent-5", dict(test_kl=7.0))):
        (tmp_path / name).mkdir()
        entries = {key: {"value": value} for key, value in results.items()}
        (tmp_path / name / "metrics.json").write_text(json.dumps(entries))
    table = ablation.table({None: [tmp_path / "default"], "latent-5": [tmp_path / "latent-5"]})
    assert table["test_kl_mean"] == [9.0, 7.0] and table["test_nll_mean"] == [130.0, None]
    assert table["variant"] == ["default", "latent-5"] and table["test_kl_std"] == [None, None]
