"""The command line: variants, folders, exit codes, printing, and mains that are called from Python."""

import os
import signal
import threading
import traceback

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from results import train_classifier
from tests import children
from tests.children import FLAGS
from tests.conftest import ROOT, assert_refused, flags_of
from utils import cli, metrics
from utils import run as runs
from utils.files import UserError, read_json

SCRIPTS = [step1, step2, step3]
RESULTS = ROOT / "results"


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
        found = read_json(tmp_path / name / "config.json")
        assert found["variant"] == name
        for key, value in changes.items():
            if key not in ("num_epochs", "batch_size"):
                assert found["hyperparameters"][key] == (list(value) if isinstance(value, tuple) else value)


def test_a_mistake_in_a_variant_is_named_before_anything_trains(call_step, monkeypatch, tmp_path):
    monkeypatch.setitem(step2.VARIANTS, "mine", ("what if?", dict(kernelsize=3)))
    monkeypatch.setitem(step2.VARIANTS, "other", ("what if?", dict(block="dense")))
    for flags, *expected in (
        (["--variant", "mine"], "'kernelsize'", "'kernel_size'", "'mine'"),
        (["--ablation"], "'kernelsize'"),
        (["--variant", "other"], "block", "dense"),
        (["--variant", "others"], "'other'", "--list-variants"),
    ):
        done = call_step(step2, "--dry-run", *flags, "--out-dir", tmp_path / "out")
        assert_refused(done, *expected)
    assert not (tmp_path / "out").exists()


# Folders

GAN, PIXELCNN, VAE = (RESULTS / name for name in ("step1_gan", "step2_pixelcnn", "step3_vae"))
CONDITIONAL = RESULTS / "step2_conditional_pixelcnn"
FOLDERS = [
    # The reported runs, and commands that spell their values out.
    (step1, "--dropout 0.1 --seed 0 --g-channels 64 128 256", GAN),
    (step1, "--variant no-dropout --dropout 0", GAN / "variants/no-dropout"),
    (step2, "", PIXELCNN),
    (step2, "--conditional --variant stochastic", CONDITIONAL / "variants/stochastic"),
    (step1, "--ablation", GAN),
    # Other runs: flags in the order of the signature, then of the step, then the modes.
    (step1, "--seed 3 --g-channels 32 64 --dropout 0.4", GAN / "runs/dropout=0.4,g_channels=32-64,seed=3"),
    (step1, "--dry-run --dropout 0.4", GAN / "runs/dropout=0.4,dry_run"),
    (step1, "--variant no-dropout --dropout 0.1", GAN / "variants/no-dropout/runs/dropout=0.1"),
    (step2, "--muon-rate none --no-positional", PIXELCNN / "runs/muon_rate=none,positional=false"),
    (step3, "--bound-samples 50", VAE / "runs/bound_samples=50"),
    (step2, "--sample-only --count 20", PIXELCNN / "runs/count=20,sample_only"),
    # Numbers that look alike have folders of their own.
    (step3, "--learning-rate 1e-3", VAE / "runs/learning_rate=0.001"),
    (step3, "--learning-rate 1.0000001e-3", VAE / "runs/learning_rate=0.0010000001"),
    # An ablation that is not the reported one: its variants share a folder.
    (step1, "--ablation --variant no-penalty", GAN / "runs/ablation"),
    (step1, "--ablation --seeds 1 --minutes 0.05", GAN / "runs/ablation,minutes=0.05,seeds=1"),
    (step1, "--seeds 3", GAN / "runs/seeds=3"),
]


def test_folders_are_named_after_what_differs(folder_of):
    for module, flags, expected in FOLDERS:
        assert folder_of(module, *flags.split()) == expected, flags
    found = folder_of(train_classifier, "--dataset", "FashionMNIST")
    assert found == metrics.classifier_folder("FashionMNIST"), "where the metrics look for it"


def test_out_dir_is_the_very_folder(folder_of, monkeypatch, tmp_path):
    assert folder_of(step1, "--seed", 4, "--out-dir", tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    assert folder_of(step1, "--out-dir=~/x") == tmp_path / "x"


def test_folders_that_cannot_be_used(call_step, bare_steps, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        assert_refused(call_step(step3, "--dry-run", "--out-dir", folder), "--out-dir")
        assert_refused(call_step(step3, "--sample-only", "--model", folder), "model")
    assert_refused(call_step(step3, "--dry-run", "--out-dir=~nobody-of-this-name/x"), "--out-dir")


# Exit codes, and calls from Python


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (UserError("two\nlines"), 2, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt(signal.SIGTERM, "--resume goes on"), 143, "SIGTERM; --resume"),
        (MemoryError(), 2, "lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "--count"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "lower --batch-size"),
    ],
)
def test_exit_codes(error, code, expected, capsys):
    def work():
        raise error

    assert cli.exit_code(work, "x.py") == code
    printed = capsys.readouterr().err
    assert printed.startswith("x.py: ") and expected in printed and len(printed.splitlines()) == 1


LOSS = "    return reconstruction + coeff * kl\n"
UNPACK = "    train_images, _ = train_set\n"
IMPORT = "from models.VAE import VAE_model, loss_terms\n"
NETWORK = """from models.VAE import VAE_model as Ours, loss_terms
class VAE_model(Ours):
    def __init__(self, input_dim, hidden_dims, *, beta):
        super().__init__(input_dim, hidden_dims)
"""


@pytest.mark.parametrize(
    "change, error, flags, line",
    [
        ((LOSS, "    kl.expand(2).add_(1)\n" + LOSS), RuntimeError, [], "kl.expand(2).add_(1)"),
        ((UNPACK, "    a, b, c = train_set\n"), ValueError, [], "a, b, c = train_set"),
        ((IMPORT, NETWORK), TypeError, [], "model = VAE_model("),
        ((IMPORT, NETWORK), TypeError, ["--sample-only", "--model"], "return files.load_network("),
    ],
)
def test_mistakes_in_code_keep_a_traceback(change, error, flags, line, edit, bare_steps, trained, tmp_path):
    """An error of torch that mentions memory, an unpacking, a new required argument of a network."""
    module = edit(step3.__file__, change)
    flags = flags and [*flags, str(trained["vae"] / "model.pt")]
    with pytest.raises(error) as caught:
        module.main(["--dry-run", *FLAGS["vae"], *flags, "--out-dir", str(tmp_path / "out")])
    assert line in "".join(traceback.format_exception(error, caught.value, caught.tb))


def test_a_main_can_be_called_from_a_thread_and_again(call_step, bare_steps, monkeypatch, tmp_path):
    """As a notebook does; the lock of a run ends with it, also when the run was interrupted."""
    flags = flags_of("vae", tmp_path)
    codes, handlers = [], [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: codes.append(step3.main(flags)))
    thread.start()
    thread.join()
    with monkeypatch.context() as patch:
        children.interrupt(2, setting=patch.setattr)
        codes.append(step3.main(flags))
    assert [*codes, step3.main([*flags, "--resume"]), step3.main(flags)] == [0, 130, 0, 0]
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_the_command_of_a_run_names_no_place_of_this_machine(call_step, bare_steps, monkeypatch, tmp_path):
    """An ablation gives each run an absolute folder. A reader needs the one in his own clone."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    flags = ["--restart", *flags_of("vae", tmp_path / "results" / "runs"), "--data-dir", ROOT / "data"]
    assert call_step(step3, *flags).returncode == 0
    command = read_json(tmp_path / "results" / "runs" / "config.json")["command"]
    assert command.startswith("hw2_step3_main.py --hidden") and "--restart" not in command
    assert f"--out-dir {os.path.join('results', 'runs')} " in command
    for path in RESULTS.glob("*/config.json"):
        assert not any(map(os.path.isabs, read_json(path).get("command", "").split())), path


def test_numbers_that_make_no_network_are_refused(call_step, bare_steps, tmp_path):
    for flags, words in ((["--kinds", 17], "more than --dim-z 16"), (["--dim-z", 2**63 - 1], "memory")):
        assert_refused(call_step(step1, "--dry-run", "--out-dir", tmp_path, *flags), words)
