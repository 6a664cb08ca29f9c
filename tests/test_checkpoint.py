"""Checkpoints: determinism, interruption, resumption, and runs that begin anew or become longer."""

import os
import shutil
import signal
from functools import partial

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests import children
from tests.children import FLAGS, STEPS
from tests.conftest import assert_refused, assert_same_run, content, flags_of, position
from utils import cli, files
from utils import run as runs

# Of few images, so that no dry run is needed, which may always begin anew.
SHORT = ["--g-channels", "8", "--d-channels", "8", "--batch-size", "80"]


def stop(call_step, module, flags, hook, *arguments, **more):
    """Run a step in this process with one of the hooks of tests/children.py, which interrupts it."""
    with pytest.MonkeyPatch.context() as patch:
        hook(*arguments, setting=patch.setattr, **more)
        done = call_step(module, *flags)
    assert done.returncode > 128 and "Traceback" not in done.stderr and "--resume" in done.stderr, done.stderr
    return done


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", STEPS)
def test_another_process_gives_the_same_run(name, start, trained, tmp_path):
    flags = ["--batch-size", 16, "--out-dir", tmp_path]
    done = start(children.train, name, flags, children.draw_nothing).end()
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, trained[name])


@pytest.mark.parametrize(
    "name, batch, number",
    [
        ("gan", 2, signal.SIGINT),
        ("gan", 3, signal.SIGTERM),
        ("pixelcnn", 5, signal.SIGHUP),
        ("conditional", 1, signal.SIGUSR1),
        ("vae", 4, signal.SIGINT),
    ],
)
def test_interrupted_equals_uninterrupted(name, batch, number, call_step, bare_steps, trained, tmp_path):
    """A signal within an epoch or in its last batch, then --resume: the same run, bit for bit."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup")
    flags = flags_of(name, tmp_path)
    done = stop(call_step, STEPS[name], flags, children.interrupt, batch, number=number)
    assert done.returncode == 128 + number and not (tmp_path / "model.pt").exists()
    assert position(tmp_path) == ((batch - 1) // runs.DRY_RUN_BATCHES, (batch - 1) % runs.DRY_RUN_BATCHES + 1)
    resumed = call_step(STEPS[name], *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path, trained[name])


@pytest.mark.parametrize("name, epoch", [("gan", 2), ("pixelcnn", 1), ("vae", 0)])
def test_a_signal_in_an_evaluation_loses_no_batch(name, epoch, call_step, bare_steps, trained, tmp_path):
    """The message says what is going on, and the resumed run evaluates again."""
    flags = flags_of(name, tmp_path)
    done = stop(call_step, STEPS[name], flags, children.interrupt_evaluation, epoch)
    assert "evaluation" in done.stderr and "this batch" not in done.stderr
    assert position(tmp_path) == (max(epoch - 1, 0), runs.DRY_RUN_BATCHES * (epoch > 0))
    assert call_step(STEPS[name], *flags, "--resume").returncode == 0
    assert_same_run(tmp_path, trained[name])


def test_a_hang_up_is_ignored_under_nohup(start, trained, tmp_path):
    hang_up = partial(children.interrupt, 2, number=signal.SIGHUP)
    flags = ["--batch-size", 16, "--out-dir", tmp_path]
    done = start(children.train, "vae", flags, children.draw_nothing, children.ignore_hang_up, hang_up).end()
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, trained["vae"])


# The files of a run


def test_tables_are_written_anew_from_the_checkpoint(call_step, bare_steps, trained, tmp_path):
    """A killed run has written more rows, an editor has cut some, or the file is gone."""
    flags = flags_of("gan", tmp_path)
    stop(call_step, step1, flags, children.interrupt, 5)
    for name in ("losses.csv", "epochs.csv"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes() + b"7,7,7,7\n7," if name == "losses.csv" else b"")
    (tmp_path / "quality.csv").unlink(missing_ok=True)
    assert call_step(step1, *flags, "--resume").returncode == 0
    assert_same_run(tmp_path, trained["gan"])


def test_finished_or_not_stands_in_the_files(call_step, bare_steps, tmp_path):
    """Neither time stamps, nor a copy, nor a clock set back change it."""
    flags = [*SHORT, "--epochs", 2, "--out-dir"]
    assert call_step(step1, *flags, tmp_path / "whole").returncode == 0
    copied = shutil.copytree(tmp_path / "whole", tmp_path / "copied", copy_function=shutil.copyfile)
    os.utime(copied / "metrics.json", (0, 0))
    assert call_step(step1, *flags, copied).returncode == 0, "it was finished"
    cut = shutil.copytree(copied, tmp_path / "cut")
    stop(call_step, step1, [*flags, cut, "--restart"], children.interrupt, 4)
    (cut / "metrics.json").touch()  # of the earlier run
    before = read_all(cut)
    assert_refused(call_step(step1, *flags, cut), "--resume", "--restart", str(cut))
    assert before == read_all(cut)
    resumed, restarted = (shutil.copytree(cut, tmp_path / each) for each in ("resumed", "restarted"))
    assert call_step(step1, *flags, resumed, "--resume").returncode == 0
    assert call_step(step1, *flags, restarted, "--restart").returncode == 0
    for folder in (resumed, restarted):
        assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("file", ["metrics.json", "losses.csv", "model.pt", "config.json"])
def test_a_folder_of_something_else_is_refused(file, call_step, bare_steps, trained, tmp_path):
    """Files without a config.json, an unreadable one, and one of another step; --restart takes the folder."""
    shutil.copy(trained["gan"] / file, tmp_path)
    before = read_all(tmp_path)
    assert_refused(call_step(step3, *flags_of("vae", tmp_path)), str(tmp_path), "--restart", "--out-dir")
    assert before == {name: content for name, content in read_all(tmp_path).items() if name != ".lock"}
    if file == "config.json":
        (tmp_path / file).write_text("{")
        assert_refused(call_step(step3, *flags_of("vae", tmp_path)), file, "--restart")
    assert call_step(step3, *flags_of("vae", tmp_path, "--restart")).returncode == 0


# Other flags


def test_a_run_without_a_schedule_can_be_lengthened(call_step, bare_steps, tmp_path):
    """Of step 1, finished or interrupted: the longer run, bit for bit."""
    long, finished, cut = (tmp_path / each for each in ("long", "finished", "cut"))
    assert call_step(step1, *SHORT, "--epochs", 4, "--out-dir", long).returncode == 0
    assert call_step(step1, *SHORT, "--epochs", 2, "--out-dir", finished).returncode == 0
    stop(call_step, step1, [*SHORT, "--epochs", 2, "--out-dir", cut], children.interrupt, 5)
    for folder in (finished, cut):
        done = call_step(step1, *SHORT, "--resume", "--out-dir", folder, "--epochs", 4)
        assert done.returncode == 0, done.stderr
        assert torch.equal(*(content(each, "checkpoint.pt")["random"]["cpu"] for each in (folder, long)))
        assert content(folder, "model.pt")["weights"].keys() == content(long, "model.pt")["weights"].keys()
        assert files.read_json(folder / "config.json")["hyperparameters"]["num_epochs"] == 4
    assert_same_run(cut, long)
    done = call_step(step1, *SHORT, "--resume", "--out-dir", long, "--epochs", 3)
    assert_refused(done, "num_epochs", "--restart")


def test_a_longer_run_takes_the_checkpoint_of_the_shorter_one(call_step, bare_steps, monkeypatch, tmp_path):
    """In its own folder, and the shorter run stays as it is. With a schedule it is refused."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    data = ["--data-dir", files.ROOT / "data"]
    for module, more in ((step1, SHORT), (step3, [*FLAGS["vae"], "--batch-size", "80"])):
        assert call_step(module, *more, *data, "--epochs", 2).returncode == 0
        (shorter,) = (tmp_path / "results" / module.STEP / "runs").iterdir()
        before = read_all(shorter)
        done = call_step(module, *more, *data, "--epochs", 4, "--resume")
        longer = shorter.with_name(shorter.name.replace("epochs=2", "epochs=4"))
        if module is step3:
            assert_refused(done, "num_epochs 2, not 4", "learning rates")
        else:
            assert done.returncode == 0 and "resuming after 2 epochs" in done.stdout, done.stderr
            flags = [*more, *data, "--epochs", 4, "--out-dir", tmp_path / "whole"]
            assert call_step(module, *flags).returncode == 0
            assert (longer / "losses.csv").read_bytes() == (tmp_path / "whole" / "losses.csv").read_bytes()
        assert before == read_all(shorter)


@pytest.mark.parametrize("flags", [["--batch-size", 64], ["--seed", 1], ["--held-out"]])
def test_resume_with_other_options_is_refused(flags, call_step, bare_steps, trained, tmp_path):
    folder = shutil.copytree(trained["vae"], tmp_path / "run")
    before = read_all(folder)
    done = call_step(step3, *flags_of("vae", folder, "--resume", *flags))
    assert_refused(done, "same flags", "--restart", str(flags[0])[2:].replace("-", "_"))
    assert before == read_all(folder)


def test_a_model_says_its_pixels(call_step, bare_steps, trained, monkeypatch, tmp_path):
    """--sample-only draws with the pixels of the training, from the model, else config.json, else the flag."""
    seen, folder = [], shutil.copytree(trained["conditional"], tmp_path / "run")
    replaced = step2.pixelcnn_results, "binarize_test"
    monkeypatch.setattr(*replaced, lambda x, how, *_: seen.append(how) or x / 255.0)
    flags = ["--conditional", "--sample-only", "--out-dir", tmp_path, "--model", folder / "model.pt"]
    assert call_step(step2, *flags).returncode == 0
    model = content(folder, "model.pt")
    del model["options"]  # as in older files
    torch.save(model, folder / "model.pt")
    assert call_step(step2, *flags).returncode == 0
    (folder / "config.json").unlink()
    done = call_step(step2, *flags)
    assert done.returncode == 0 and "--binarize threshold" in done.stdout
    assert seen == ["stochastic", "stochastic", "threshold"]
