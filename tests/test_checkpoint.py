"""Checkpoints: determinism, interruption, resumption, and runs that begin anew or become longer."""

import json
import os
import shutil
import signal
import time
from functools import partial

import pytest

import hw2_step1_main as step1
import hw2_step3_main as step3
from tests import children
from tests.children import FLAGS, STEPS
from tests.conftest import assert_refused, assert_same_training, content, flags_of
from utils import run as runs
from utils.run import Run


@pytest.mark.parametrize("name", STEPS)
def test_another_process_gives_the_same_training(name, start, trained, tmp_path):
    done = start(
        children.train, name, ["--batch-size", 16, "--out-dir", tmp_path], children.draw_nothing
    ).end()
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path, trained[name])


@pytest.mark.parametrize(
    "name, batch, number",
    [
        ("gan", 2, signal.SIGINT),
        ("gan", 3, signal.SIGTERM),
        ("pixelcnn", 5, signal.SIGTERM),
        ("conditional", 2, signal.SIGINT),
        ("vae", 4, signal.SIGINT),
    ],
)
def test_interrupted_equals_uninterrupted(name, batch, number, call_step, bare_steps, trained, tmp_path):
    """A signal within an epoch or at its end, then --resume: the same weights and losses, bit for bit."""
    flags = flags_of(name, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        children.interrupt(batch, number=number, setting=patch.setattr)
        done = call_step(STEPS[name], *flags)
    assert done.returncode == (130 if number == signal.SIGINT else 143), done.stderr
    assert "Traceback" not in done.stderr and "--resume" in done.stderr
    assert not (tmp_path / "model.pt").exists()
    position = content(tmp_path, "checkpoint.pt")["position"][:2]
    assert position == ((batch - 1) // runs.DRY_RUN_BATCHES, (batch - 1) % runs.DRY_RUN_BATCHES + 1)
    resumed = call_step(STEPS[name], *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_training(tmp_path, trained[name])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_from_outside(number, code, start, tmp_path):
    hook = partial(children.wait_for, tmp_path / "go on")
    child = start(children.train, "gan", ["--out-dir", tmp_path], children.draw_nothing, hook)
    while not (tmp_path / "waiting").exists():
        assert child.process.is_alive()
        time.sleep(0.01)
    os.kill(child.process.pid, number)
    (tmp_path / "go on").touch()
    done = child.end()
    assert done.returncode == code and "Traceback" not in done.stderr
    checkpoint = content(tmp_path, "checkpoint.pt")
    assert checkpoint["step"] == "step1_gan" and checkpoint["position"][2] > 0  # images seen


def test_ctrl_c_after_the_training_keeps_what_is_finished(call_step, bare_steps, trained, tmp_path):
    flags, draw = flags_of("vae", tmp_path), Run.draw

    def interrupted(self, name, *arguments, **options):
        if name == "walk.png":
            raise KeyboardInterrupt
        draw(self, name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "draw", interrupted)
        assert call_step(step3, *flags).returncode == 130
    assert_same_training(tmp_path, trained["vae"])
    assert not (tmp_path / "metrics.json").exists()
    done = call_step(step3, *flags, "--resume")
    assert done.returncode == 0 and "epoch 2/2" not in done.stdout
    assert_same_training(tmp_path, trained["vae"])
    assert (tmp_path / "metrics.json").exists()


# Of few images, so that no dry run is needed, which may always begin anew.
SHORT = ["--g-channels", "8", "--d-channels", "8", "--batch-size", "80"]


def test_an_unfinished_run_is_not_overwritten_unasked(call_step, bare_steps, tmp_path):
    flags = [*SHORT, "--epochs", 2, "--out-dir"]
    assert call_step(step1, *flags, tmp_path / "whole").returncode == 0
    assert call_step(step1, *flags, tmp_path / "whole").returncode == 0, "it was finished"
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        children.interrupt(4, setting=patch.setattr)
        assert call_step(step1, *flags, cut).returncode == 130
    before = {path.name: path.read_bytes() for path in cut.iterdir()}
    assert_refused(call_step(step1, *flags, cut), "--resume", "--restart", str(cut))
    assert before == {path.name: path.read_bytes() for path in cut.iterdir()}
    resumed, restarted = (shutil.copytree(cut, tmp_path / each) for each in ("resumed", "restarted"))
    assert call_step(step1, *flags, resumed, "--resume").returncode == 0
    done = call_step(step1, *flags, restarted, "--restart")
    assert done.returncode == 0 and "epoch 1/2" in done.stdout
    for folder in (resumed, restarted):
        assert_same_training(folder, tmp_path / "whole")


def test_a_run_without_a_schedule_can_be_lengthened(call_step, bare_steps, tmp_path):
    """Of step 1, finished or interrupted: the weights and losses of the longer run, bit for bit."""
    long, finished, cut = (tmp_path / each for each in ("long", "finished", "cut"))
    assert call_step(step1, *SHORT, "--epochs", 4, "--out-dir", long).returncode == 0
    assert call_step(step1, *SHORT, "--epochs", 2, "--out-dir", finished).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        children.interrupt(5, setting=patch.setattr)
        assert call_step(step1, *SHORT, "--epochs", 2, "--out-dir", cut).returncode == 130
    for folder in (finished, cut):
        done = call_step(step1, *SHORT, "--resume", "--out-dir", folder, "--epochs", 4)
        assert done.returncode == 0, done.stderr
        assert_same_training(folder, long)
        assert json.loads((folder / "config.json").read_text())["hyperparameters"]["num_epochs"] == 4
    assert_refused(
        call_step(step1, *SHORT, "--resume", "--out-dir", long, "--epochs", 3), "num_epochs", "--restart"
    )


@pytest.mark.parametrize("name", ["pixelcnn", "vae"])
def test_a_run_with_a_schedule_cannot(name, call_step, bare_steps, tmp_path):
    flags = [*FLAGS[name], "--batch-size", 80, "--out-dir", tmp_path, "--epochs"]
    assert call_step(STEPS[name], *flags, 1).returncode == 0
    before = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "config.json").read_bytes()
    assert_refused(call_step(STEPS[name], *flags, 2, "--resume"), "learning rate", "train anew")
    assert before == ((tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "config.json").read_bytes())


@pytest.mark.parametrize(
    "flags",
    [["--batch-size", 64], ["--seed", 1], ["--latent-dim", 3], ["--hidden-dims", 8, 8], ["--held-out"]],
)
def test_resume_with_other_hyperparameters_is_refused(flags, call_step, bare_steps, trained, tmp_path):
    folder = shutil.copytree(trained["vae"], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = call_step(step3, *flags_of("vae", folder, "--resume", *flags))
    assert_refused(done, "same flags", "--restart", str(flags[0])[2:].replace("-", "_"))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
