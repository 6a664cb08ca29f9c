"""The command line: variants, folders, exit codes, printing, and mains that are called from Python."""

import difflib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests import children
from tests.children import FLAGS
from tests.conftest import ROOT, Accepted, assert_refused
from utils import cli, metrics, train_classifier
from utils import run as runs
from utils.files import UserError

SCRIPTS = [step1, step2, step3]
RESULTS = ROOT / "results"


def config(folder):
    return json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------------------------------------------------
# Variants


@pytest.mark.parametrize("module", SCRIPTS)
def test_every_variant_is_listed_and_runs(module, call_step, bare_steps, monkeypatch, tmp_path):
    """For one batch of an epoch, with few images, since the variants differ in their networks and trainings."""
    monkeypatch.setattr(runs, "DRY_RUN_BATCHES", 1)
    monkeypatch.setattr(cli, "DRY_RUN_EPOCHS", 1)
    listed = call_step(module, "--list-variants").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [*module.VARIANTS]
    for name, (reason, changes) in module.VARIANTS.items():
        assert reason in listed.pop(0)
        flags = ["--variant", name, "--dry-run", "--batch-size", 4, "--out-dir", tmp_path / name]
        done = call_step(module, *flags)
        assert done.returncode == 0, (name, done.stderr)
        found = config(tmp_path / name)
        assert found["variant"] == name
        for key, value in changes.items():
            if key not in ("num_epochs", "batch_size"):
                assert found["hyperparameters"][key] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    "module, wrong, nearest",
    [
        (step1, "d_chanels", "d_channels"),
        (step2, "kernelsize", "kernel_size"),
        (step3, "kl_coef", "kl_coeff"),
    ],
)
def test_a_mistyped_key_of_a_variant_is_named_before_anything_trains(
    module, wrong, nearest, call_step, monkeypatch, tmp_path
):
    monkeypatch.setitem(module.VARIANTS, "mine", ("what if?", {wrong: 3}))
    for flags in (["--variant", "mine"], ["--ablation"], []):
        done = call_step(module, "--dry-run", *flags, "--out-dir", tmp_path / "out")
        assert_refused(done, repr(wrong), repr(nearest), "'mine'")
    assert not (tmp_path / "out").exists()


def test_variants_of_bad_values_and_unknown_variants_are_refused(call_step, monkeypatch, tmp_path):
    near = difflib.get_close_matches("dropout-3", step1.VARIANTS, 1)[0]
    done = call_step(step1, "--variant", "dropout-3", "--out-dir", tmp_path / "out")
    assert_refused(done, near, "--list-variants")
    for changes in (dict(dropout=1.5), dict(g_channels=()), dict(loss="lsgan"), dict(num_epochs=2.5)):
        monkeypatch.setitem(step1.VARIANTS, "mine", ("what if?", changes))
        assert_refused(call_step(step1, "--variant", "mine", "--out-dir", tmp_path / "out"), *changes)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# Folders

GAN = RESULTS / "step1_gan"
PIXELCNN = RESULTS / "step2_pixelcnn"
CONDITIONAL = RESULTS / "step2_conditional_pixelcnn"
VAE = RESULTS / "step3_vae"
FOLDERS = [
    # The reported runs, and commands that spell their values out.
    (step1, "", GAN),
    (step1, "--dropout 0.1 --seed 0 --g-channels 64 128 256", GAN),
    (step1, "--variant no-dropout", GAN / "variants/no-dropout"),
    (step1, "--variant no-dropout --dropout 0", GAN / "variants/no-dropout"),
    (step2, "", PIXELCNN),
    (step2, "--conditional", CONDITIONAL),
    (step2, "--conditional --variant stochastic", CONDITIONAL / "variants/stochastic"),
    (step3, "", VAE),
    (step1, "--ablation", GAN),
    # Other runs: flags in the order of the signature, then of the step, then the modes.
    (step1, "--seed 3 --g-channels 32 64 --dropout 0.4", GAN / "runs/dropout=0.4,g_channels=32-64,seed=3"),
    (step1, "--epochs 1", GAN / "runs/epochs=1"),
    (step1, "--minutes 0.05", GAN / "runs/minutes=0.05"),
    (step1, "--held-out", GAN / "runs/held_out"),
    (step1, "--dry-run", GAN / "runs/dry_run"),
    (step1, "--dry-run --dropout 0.4", GAN / "runs/dropout=0.4,dry_run"),
    (step1, "--dataset FashionMNIST", GAN / "runs/dataset=FashionMNIST"),
    (step1, "--variant no-dropout --dropout 0.1", GAN / "variants/no-dropout/runs/dropout=0.1"),
    (step1, "--d-learning-rate 1e-5", GAN / "runs/d_learning_rate=1e-05"),
    (step2, "--muon-rate none --no-positional", PIXELCNN / "runs/muon_rate=none,positional=false"),
    (step3, "--bound-samples 50", VAE / "runs/bound_samples=50"),
    (step1, "--sample-only", GAN / "runs/sample_only"),
    (
        step2,
        "--conditional --sample-only --digit 7 --count 20",
        CONDITIONAL / "runs/digit=7,count=20,sample_only",
    ),
    # An ablation that is not the reported one: its variants share a folder.
    (step1, "--ablation --variant no-dropout", GAN / "runs/ablation"),
    (step1, "--ablation --variant no-penalty", GAN / "runs/ablation"),
    (
        step1,
        "--ablation --variant no-dropout --seeds 1 --minutes 0.05",
        GAN / "runs/ablation,minutes=0.05,seeds=1",
    ),
    (step1, "--ablation --dry-run", GAN / "runs/ablation,dry_run"),
    (step1, "--seeds 3", GAN / "runs/seeds=3"),
]


def test_folders_are_named_after_what_differs(folder_of):
    for module, flags, expected in FOLDERS:
        found = folder_of(module, *flags.split())
        if "," in expected.name:  # the order of the step's own flags and the common ones is not promised
            found = found.with_name(",".join(sorted(found.name.split(","), key=expected.name.index)))
        assert found == expected, (flags, found)
    found = folder_of(train_classifier, "--dataset", "FashionMNIST")
    assert found == metrics.classifier_folder("FashionMNIST"), "where the metrics look for it"


@pytest.mark.skipif(not ((ROOT / ".git").exists() and shutil.which("git")), reason="this is no git checkout")
def test_git_ignores_all_runs_but_the_reported_ones():
    folders = [folder / "samples.png" for _, _, folder in FOLDERS if "runs" in folder.parts]
    done = subprocess.run(
        ["git", "check-ignore", *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert sorted(done.stdout.split()) == sorted(map(str, folders))


def test_a_long_name_ends_in_a_hash(folder_of):
    flags = "--epochs 3 --d-learning-rate 1e-5 --g-learning-rate 2e-5 --g-channels 32 64 128 --d-channels 64 32 16"
    names = [folder_of(step1, *flags.split(), "--seed", seed).name for seed in (12345678, 12345679, 12345678)]
    assert names[0] == names[2] != names[1]
    for name in names:
        assert len(name) == 100 and name.startswith("epochs=3,d_learning_rate=1e-05,")
        assert len(name.rpartition("-")[2]) == 8


def test_out_dir_is_the_very_folder(folder_of, monkeypatch, tmp_path):
    for flags in ([], ["--variant", "no-dropout"], ["--seed", "4"], ["--ablation"]):
        assert folder_of(step1, *flags, "--out-dir", tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    assert folder_of(step1, "--out-dir=~/x") == tmp_path / "x"


def test_a_model_may_be_named_from_the_home_folder(call_step, bare_steps, trained, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(trained["gan"]))
    monkeypatch.setenv("USERPROFILE", str(trained["gan"]))
    flags = ["--sample-only", "--out-dir", tmp_path, "--model"]
    assert call_step(step1, *flags, "~/model.pt").returncode == 0
    assert_refused(call_step(step1, *flags, ""), "--model")
    assert_refused(call_step(step1, "--dry-run", "--out-dir=~nobody-of-this-name/x"), "--out-dir")


def test_folders_that_cannot_be_used(call_step, bare_steps, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "out", tmp_path / ("x" * 300), tmp_path / "a" / ("y" * 300)):
        assert_refused(call_step(step3, "--dry-run", "--out-dir", folder), "--out-dir")
        (tmp_path / "a").exists() and (tmp_path / "a").rmdir()
    assert_refused(call_step(step3, "--dry-run", "--data-dir", tmp_path / ("x" * 300)), "--data-dir")
    assert_refused(call_step(step3, "--sample-only", "--model", tmp_path / ("x" * 300)), "model")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the administrator may enter every folder")
def test_folders_that_may_not_be_entered(start, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    for folder in (closed, closed / "out"):
        flags = ["--dry-run", "--out-dir", folder]
        assert_refused(start(children.train, "vae", flags, children.be_nobody).end(), "--out-dir")
        flags = ["--sample-only", "--out-dir", closed.parent, "--model", folder / "model.pt"]
        assert_refused(start(children.train, "vae", flags, children.be_nobody).end(), "model")


# ---------------------------------------------------------------------------------------------------------
# Exit codes, printing, and calls from Python


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (UserError("two\nlines"), 2, "two lines"),
        (KeyboardInterrupt(), 130, "--resume"),
        (runs.Terminated(), 143, "--resume"),
        (MemoryError(), 2, "lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "lower --batch-size"),
    ],
)
def test_exit_codes(error, code, expected, capsys):
    def work():
        raise error

    assert cli.exit_code(work, "x.py") == code
    printed = capsys.readouterr().err
    assert printed.startswith("x.py: ") and expected in printed and len(printed.splitlines()) == 1


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shape"):
        cli.exit_code(lambda: torch.zeros(2).view(3), "x.py")


def test_bad_usage_of_a_process(run_step, tmp_path):
    assert_refused(run_step("hw2_step2_main.py", "--digit", "12", "--out-dir", tmp_path / "out"), "--digit")


def test_a_main_can_be_called_from_a_thread_and_again(call_step, bare_steps, monkeypatch, tmp_path):
    """As a notebook does; the lock of a run ends with it, also when the run was interrupted."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    flags = [*FLAGS["vae"], "--dry-run", "--batch-size", "8", "--out-dir", str(tmp_path)]
    codes, handlers = [], [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: codes.append(step3.main(flags)))
    thread.start()
    thread.join()
    assert codes == [0]
    with monkeypatch.context() as patch:
        children.interrupt(2, setting=patch.setattr)
        assert call_step(step3, *flags).returncode == 130
    assert call_step(step3, *flags, "--resume").returncode == 0
    assert call_step(step3, *flags, "--sample-only", "--model", tmp_path / "model.pt").returncode == 0
    assert call_step(step3, *flags).returncode == 0
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_a_main_without_flags_is_the_reported_run(folder_of, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for module, folder in ((step1, GAN), (step2, PIXELCNN), (step3, VAE)):
        with pytest.raises(Accepted) as accepted:
            module.main()
        assert accepted.value.args == (folder,)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no such device")
def test_an_interpreter_in_bad_surroundings(run_script):
    """Jupyter names a backend that matplotlib refuses without that package; the end flushes the output once more."""
    backend = "module://matplotlib_inline.backend_inline"
    with open("/dev/full", "w") as full:
        done = run_script("hw2_step1_main.py", "--list-variants", stdout=full, MPLBACKEND=backend)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("hook", [children.print_into_full_device, children.print_into_closed_pipe])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no such device")
def test_a_run_trains_on_when_nothing_can_be_printed(hook, start, tmp_path):
    done = start(children.train, "vae", ["--out-dir", tmp_path], children.draw_nothing, hook).end()
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "metrics.json").exists()


def test_names_that_the_terminal_cannot_print(call_step, bare_steps, monkeypatch, tmp_path):
    for file in ("stdout", "stderr"):
        monkeypatch.setattr(sys, file, open(tmp_path / file, "w", encoding="ascii"))
    folder = tmp_path / "Ü"
    flags = [*FLAGS["vae"], "--dry-run", "--batch-size", "8", "--out-dir", str(folder)]
    assert step3.main(flags) == 0
    assert step3.main([*flags, "--resume", "--seed", "1"]) == 2
    assert (folder / "metrics.json").exists()
    assert "\\xdc" in (tmp_path / "stdout").read_text() and "\\xdc" in (tmp_path / "stderr").read_text()


def test_the_command_of_a_run_names_no_place_of_this_machine():
    """An ablation gives each run an absolute folder. A reader needs the one in his own clone."""
    argv = ["--resume", "--seed", "1", "--out-dir", str(cli.ROOT / "results" / "runs")]
    assert cli._command("/home/me/step.py", argv) == "step.py --seed 1 --out-dir " + os.path.join(
        "results", "runs"
    )
    for path in (cli.ROOT / "results").rglob("config.json"):
        words = json.loads(path.read_text()).get("command", "").split()
        assert not any(map(os.path.isabs, words)), f"{path}: {words}"
