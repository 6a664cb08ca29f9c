"""Ablations: which runs they make and keep, their lengths and flags, and their table."""

import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests import children
from tests.children import FLAGS
from tests.conftest import TIMEOUT, assert_refused, content
from utils import ablation
from utils.files import read_csv, read_json


def test_a_table_grows_with_each_variant(call_step, bare_steps, call_here, monkeypatch, tmp_path):
    """Finished runs stay, as long as the flags are the same."""
    flags = [*FLAGS["vae"], *"--dry-run --batch-size 8 --ablation --seeds 2 --out-dir".split(), tmp_path]

    def ablate(*more):
        call_here.clear()
        done = call_step(step3, *flags, *more)
        assert done.returncode == 0, done.stderr
        return [" ".join(command[2:]) for command in call_here], read_csv(tmp_path / "ablation.csv")

    commands, rows = ablate("--variant", "kl-0.1")
    assert all((tmp_path / name).exists() for name in ("ablation.png", "kl_weights.png"))
    monkeypatch.setattr(step3, "draw_ablation", lambda *_: None)
    assert len(commands) == 4 and all("--held-out" in command for command in commands)
    folders = [tmp_path / "ablation" / f"seed_{seed}" for seed in (0, 1)]
    values = [read_json(each / "metrics.json")["test_negative_elbo"]["value"] for each in folders]
    assert [(row["variant"], row["seeds"]) for row in rows] == [("default", 2), ("kl-0.1", 2)]
    assert rows[0]["test_negative_elbo_mean"] == pytest.approx(statistics.fmean(values), rel=1e-5)
    assert rows[0]["test_negative_elbo_std"] == pytest.approx(statistics.stdev(values), rel=1e-3)
    found = read_json(folders[1] / "variants" / "kl-0.1" / "config.json")
    assert (found["variant"], found["seed"], found["hyperparameters"]["hidden_dims"]) == ("kl-0.1", 1, [8])
    assert found["evaluated_on"] == "last 10,000 training images"

    commands, more_rows = ablate("--variant=kl-4")
    assert len(commands) == 2 and all("--variant kl-4" in command for command in commands)
    assert [row["variant"] for row in more_rows] == ["default", "kl-0.1", "kl-4"] and more_rows[:2] == rows
    for more in ([], ["--restart"]):  # their rows would not compare with those of the finished runs
        done = call_step(step3, *flags, "--variant", "kl-4", "--kl-warm-up", 0.1, *more)
        assert_refused(done, "--hidden-dims 8", "--out-dir")
    commands, again = ablate("--variant", "kl-4", "--restart")
    assert len(commands) == 4 and all("--restart" in command for command in commands) and len(again) == 3


def test_seeds_make_a_table_of_their_own(call_step, bare_steps, call_here, tmp_path):
    """The flag of the conditional network is passed on."""
    flags = ["--conditional", "--dry-run", "--variant", "first-7", "--seeds", 2, "--seed", 5]
    done = call_step(step2, *flags, "--batch-size", 8, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "seeds" / "seed_6" / "config.json")
    assert (found["step"], found["variant"], found["seed"]) == (step2.CONDITIONAL_STEP, "first-7", 6)
    assert found["evaluated_on"] == "test images"
    (row,) = read_csv(tmp_path / "seeds.csv")
    assert (row["variant"], row["seeds"]) == ("first-7", 2)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say that a parent ended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_runs_end_with_their_parent(number, start, tmp_path):
    """At a batch, with a checkpoint, by which the same command goes on."""
    flags = [*FLAGS["gan"], "--epochs", 1000, "--batch-size", 6000, "--seeds", 2, "--out-dir", tmp_path]
    parent = start(children.ablate, "gan", flags)
    checkpoints = [tmp_path / "seeds" / f"seed_{seed}" / "checkpoint.pt" for seed in (0, 1)]

    def wait(condition):
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    def is_under_way(path):
        return path.exists() and content(path.parent, path.name)["state"]["images_seen"] > 0

    def is_locked(path):
        try:
            return ablation.files.lock(path.parent).close()
        except ablation.UserError:
            return True

    count = min(2, len(os.sched_getaffinity(0)))  # runs side by side
    wait(lambda: sum(map(is_under_way, checkpoints)) == count)
    os.kill(parent.process.pid, number)
    code, words = (-9, "") if number == signal.SIGKILL else (143, "the same command goes on")
    done = parent.end()
    assert done.returncode == code and words in done.stderr, done.stderr
    wait(lambda: not any(is_locked(each) for each in checkpoints if each.exists()))
    assert sum(map(is_under_way, checkpoints)) == count


@pytest.fixture
def pretend(processes_here, monkeypatch):
    """Let the runs only leave their files. Return the runs, (variant, whether resumed, epochs), and who is to fail."""
    seen = SimpleNamespace(runs=[], failing=(), folders={})

    def run(command):
        flags = dict(zip(command, command[1:]))
        name = flags.get("--variant")
        seen.runs.append((name, "--resume" in command, flags.get("--epochs")))
        if name in seen.failing:
            return 2, "hw2: Ü: d_loss became nan\n".encode()
        folder = seen.folders[name] = Path(flags["--out-dir"])
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("losses.csv", "model.pt"):
            (folder / file).touch()
        ablation.files.save_tensors(folder / "checkpoint.pt", {"step": "any", "finished": True})
        module = step1 if "step1" in command[1] else step3
        changes = module.VARIANTS[name][1] if name else {}
        (folder / "config.json").write_text(json.dumps({"hyperparameters": changes}))
        (folder / "metrics.json").write_text(json.dumps({"wall_time": {"value": 1.0}}))
        return 0, b""

    processes_here(run)
    for module in (step1, step3):
        monkeypatch.setattr(module, "draw_ablation", lambda _, folders: seen.folders.update(drawn=folders))
    return seen


def test_finished_runs_are_kept_and_interrupted_ones_go_on(call_step, pretend, monkeypatch, tmp_path):
    flags = ["--ablation", "--seeds", "1", "--out-dir"]
    assert call_step(step1, *flags, tmp_path).returncode == 0
    names, folders = [None, *step1.VARIANTS], pretend.folders
    assert {run[:2] for run in pretend.runs} == {(name, False) for name in names}
    assert [row["variant"] for row in read_csv(tmp_path / "ablation.csv")] == ["default", *step1.VARIANTS]
    assert folders["drawn"]["plain"] == tmp_path / "ablation" / "seed_0" / "variants" / "plain"

    pretend.runs.clear()
    ablation.files.save_tensors(folders["plain"] / "checkpoint.pt", {"step": "any"})  # begun anew
    for name, *missing in (
        ("relativistic", "metrics.json"),
        ("high-rates", "metrics.json", "checkpoint.pt"),
        ("d-freq-2", "checkpoint.pt"),
        ("dropout-50", "checkpoint.pt", "model.pt"),  # as in a copy that has the figures alone
    ):
        for file in missing:
            (folders[name] / file).unlink()
    assert call_step(step1, *flags, tmp_path).returncode == 0
    resumed = {name: is_resumed for name, is_resumed, _ in pretend.runs}
    assert resumed == {"dropout-50": False, "plain": True, "relativistic": True, "high-rates": False}

    pretend.runs.clear()
    monkeypatch.setitem(step1.VARIANTS, "no-dropout", ("edited meanwhile", dict(dropout=0.01)))
    assert call_step(step1, *flags, tmp_path).returncode == 0
    assert [run[:2] for run in pretend.runs] == [("no-dropout", False)], "not resumed"
    assert_refused(call_step(step1, *flags, tmp_path, "--minutes", "4"), "have the flags", "--out-dir")


def test_damaged_files_of_earlier_runs(call_step, pretend, tmp_path):
    """The flags of the runs are refused in one line; a run whose config.json says no options is made anew."""
    flags = ["--seeds", 1, "--out-dir", tmp_path]
    assert call_step(step1, *flags).returncode == 0
    (tmp_path / "seeds" / "seed_0" / "config.json").write_text("{}")
    assert call_step(step1, *flags).returncode == 0 and len(pretend.runs) == 2
    (tmp_path / "seeds" / "flags.json").write_text("{")
    assert_refused(call_step(step1, *flags), "flags.json cannot be read")


def test_a_run_that_fails_does_not_keep_the_others(pretend, monkeypatch, capsys, tmp_path):
    """Nor does a reason that the terminal cannot print."""
    pretend.failing = ("no-dropout",)
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "stdout", "w", encoding="ascii"))
    flags = ["--ablation", "--seeds", "1", "--out-dir", str(tmp_path / "Ü")]
    assert step1.main(flags) == 2
    assert {run[0] for run in pretend.runs} == {None, *step1.VARIANTS}
    assert f"1 of {1 + len(step1.VARIANTS)} runs failed" in capsys.readouterr().err
    assert "no-dropout, seed 0: " in (tmp_path / "stdout").read_text()
    pretend.runs.clear()
    assert step1.main(flags) == 2 and [run[0] for run in pretend.runs] == ["no-dropout"]


@pytest.mark.parametrize(
    "more, of_default, of_others",
    [([], "8", None), (["--epochs", 3], "3", "3"), (["--variant", "long-20"], None, None)],
)
def test_variants_about_the_length_have_their_own(more, of_default, of_others, call_step, pretend, tmp_path):
    """All other flags are passed on, however they are spelled."""
    flags = "--seeds=1 --kl-coeff 0.5 --ablation --seed 7 --hidden-dims 8 4".split()
    assert call_step(step3, *flags, *more, f"--out-dir={tmp_path}").returncode == 0
    lengths = {name: epochs for name, _, epochs in pretend.runs}
    assert lengths.pop(None) == of_default
    chosen = more[1:] if "--variant" in more else ["epochs-4", "epochs-16"]
    assert {lengths.pop(name) for name in chosen} == {of_others} and {*lengths.values()} <= {of_default}
    assert not lengths.keys() & {*step3.ABLATION["left_out"]}
    kept = read_json(tmp_path / "ablation" / "flags.json", kind=list)
    assert " ".join(kept).partition(" --epochs 3")[0].endswith("--kl-coeff 0.5 --hidden-dims 8 4")
