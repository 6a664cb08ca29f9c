"""Runs as a user starts them: files, determinism, interruption, bad input."""

import csv
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests import children
from tests.conftest import ROOT
from utils import ablation, metrics, plotting, runs

COMMON = {
    "config.json",
    "metrics.json",
    "losses.csv",
    "loss.png",
    "samples.png",
    "model.pt",
    "checkpoint.pt",
    ".lock",
}
GAN_FIGURES = {"samples_by_epoch.png", "neighbours.png", "optimal_discriminator.png"}
PIXELCNN_FIGURES = {"completions.png", "nll_map.png", "nll_digits.png", "receptive_field.png"}
STEPS = {
    "gan": ("hw2_step1_main.py", [], GAN_FIGURES, step1.load_model),
    "pixelcnn": ("hw2_step2_main.py", [], PIXELCNN_FIGURES, step2.load_model),
    "conditional": (
        "hw2_step2_main.py",
        ["--conditional", "--digit", "7", "--binarize", "stochastic"],
        PIXELCNN_FIGURES | {"samples_digit.png", "comparison.png", "bayes.png"},
        step2.load_model,
    ),
    "vae": (
        "hw2_step3_main.py",
        [],
        {
            "reconstructions.png",
            "extremes.png",
            "walk.png",
            "latent_plane.png",
            "territories.png",
            "latent_means.png",
            "posterior.png",
        },
        step3.load_model,
    ),
}


def list_of(value):
    """What JSON makes of a value."""
    return list(value) if isinstance(value, tuple) else value


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["weights"]


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", STEPS)
def test_dry_run_writes_every_file_and_is_deterministic(name, run_script, run_step, tmp_path):
    script, flags, figures, load_model = STEPS[name]
    folders = tmp_path / "a", tmp_path / "b"
    for folder, run in zip(folders, (run_script, run_step)):
        done = run(script, "--dry-run", *flags, "--out-dir", folder)
        assert done.returncode == 0, done.stderr
        assert "epoch 1/2" in done.stdout and "epoch 2/2" in done.stdout
    folder = folders[0]
    assert {path.name for path in folder.iterdir() if path.suffix != ".pdf"} == COMMON | figures
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in folder.glob("*.pdf"):
        content = path.read_bytes()
        assert content.startswith(b"%PDF") and b"/Type3" not in content and path.with_suffix(".png").exists()
    assert (folder / "loss.pdf").exists() and not (folder / "samples.pdf").exists()
    for path in folder.glob("*.pt"):
        torch.load(path, weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["seed"] == 0 and config["device"] == "cpu" and config["versions"]["torch"] == torch.__version__
    )
    results = json.loads((folder / "metrics.json").read_text())
    for entry in results.values():
        assert isinstance(entry["value"], float) and entry["unit"] and entry["formula"]
    assert {*metrics.DESCRIPTIONS, "sampling_time", "wall_time", "peak_memory"} <= results.keys()
    assert results["frechet_distance"]["samples"] == metrics.NUM_JUDGED_QUICKLY
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    assert int(rows[-1]["epoch"]) == 2
    assert_same_weights(*folders)
    network = load_model(folder / "model.pt")
    assert not network.training

    before = (folder / "samples.png").read_bytes(), (folder / "model.pt").read_bytes()
    (folder / "samples.png").unlink()
    done = run_step(script, "--sample-only", *flags, "--out-dir", folder)
    assert done.returncode == 0, done.stderr
    assert before == ((folder / "samples.png").read_bytes(), (folder / "model.pt").read_bytes())


@pytest.mark.parametrize(
    "name, batch", [("gan", 2), ("gan", 3), ("pixelcnn", 5), ("conditional", 2), ("vae", 4)]
)
def test_interrupted_equals_uninterrupted(name, batch, start, tmp_path):
    """Ctrl-C within an epoch or at its end, then --resume: the same weights and losses, bit for bit."""
    flags = ["--batch-size", "16", *STEPS[name][1], "--out-dir"]

    def train(folder, *more, hooks=()):
        return start(children.train, name, [*flags, folder, *more], children.draw_nothing, *hooks).end()

    assert train(tmp_path / "whole").returncode == 0
    done = train(tmp_path / "cut", hooks=[partial(children.interrupt, batch)])
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "cut" / "model.pt").exists()
    finished = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["position"][:2]
    assert finished == ((batch - 1) // runs.DRY_RUN_BATCHES, (batch - 1) % runs.DRY_RUN_BATCHES + 1)
    resumed = train(tmp_path / "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole" / "losses.csv").read_text() == (tmp_path / "cut" / "losses.csv").read_text()


def test_ctrl_c_from_outside(tmp_path):
    """A real SIGINT, sent while the training is under way."""
    command = [
        sys.executable,
        str(ROOT / "hw2_step1_main.py"),
        "--epochs",
        "1000",
        "--batch-size",
        "2000",
        "--out-dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == "step1_gan" and checkpoint["position"][2] > 0  # images seen


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        (step1, ["--epochs", "0"], "--epochs"),
        (step1, ["--batch-size", "-3"], "--batch-size"),
        (step1, ["--batch-size", "many"], "--batch-size"),
        (step1, ["--d-freq", "0"], "--d-freq"),
        (step1, ["--seed", "-1"], "--seed"),
        (step1, ["--seeds", "0"], "--seeds"),
        (step1, ["--variant", "nonsense"], "--list-variants"),
        (step1, ["--device", "tpu"], "--device"),
        (step1, ["--no-such-flag"], "--no-such-flag"),
        (step2, ["--digit", "10"], "--digit"),
        (step2, ["--digit", "-1"], "--digit"),
        (step2, ["--digit", "three"], "--digit"),
        (step2, ["--binarize", "maybe"], "--binarize"),
        (step2, ["--minutes", "0"], "--minutes"),
        (step2, ["--minutes", "1", "--epochs", "2"], "not allowed with"),
        (step2, ["--minutes", "soon"], "--minutes"),
        (step3, ["--bound-samples", "0"], "--bound-samples"),
        (step3, ["--kl-coeff", "-1"], "--kl-coeff"),
        (step3, ["--kl-coeff", "nan"], "--kl-coeff"),
        (step3, ["--latent-dim", "0"], "--latent-dim"),
        (step3, ["--resume"], "no checkpoint"),
        (step3, ["--sample-only"], "no model"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(module, flags, expected, call_step, tmp_path):
    done = call_step(module, *flags, "--out-dir", tmp_path / "out")
    assert_refused(done, expected)
    assert not (tmp_path / "out").exists()


def assert_refused(done, expected):
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_absent_device(call_step, tmp_path):
    assert_refused(call_step(step1, "--device", "cuda", "--out-dir", tmp_path), "cuda")


def test_unusable_folders(call_step, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(call_step(step1, "--data-dir", tmp_path / "file"), "--data-dir")
    assert_refused(call_step(step1, "--dry-run", "--out-dir", tmp_path / "file" / "out"), "--out-dir")


class _Payload:
    """A pickle that would create a file on loading."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_bad_usage_of_a_process(run_script, tmp_path):
    done = run_script("hw2_step2_main.py", "--digit", "12", "--out-dir", tmp_path / "out")
    assert_refused(done, "--digit")


@pytest.mark.parametrize(
    "content",
    ["empty", "random", "truncated", "altered", "pickle", "pickle in a zip", "other step", "other values"],
)
@pytest.mark.parametrize("file, flag", [("checkpoint.pt", "--resume"), ("model.pt", "--sample-only")])
def test_bad_files_are_refused(content, file, flag, call_step, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / file
    good = path.read_bytes()
    if content == "empty":
        path.write_bytes(b"")
    elif content == "random":
        path.write_bytes(bytes(torch.randint(256, (5000,), dtype=torch.uint8).tolist()))
    elif content == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif content == "altered":
        middle = len(good) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    elif content == "pickle in a zip":
        torch.save(_Payload(tmp_path / "pwned"), path)
    elif content == "pickle":
        path.write_bytes(pickle.dumps(_Payload(tmp_path / "pwned")))
    elif content == "other step":
        torch.save({**torch.load(path, weights_only=True), "step": "step1_gan"}, path)
    else:
        torch.save({"step": "step3_vae"}, path)
    before = path.read_bytes()
    done = call_step(step3, "--dry-run", flag, "--out-dir", tmp_path / "run")
    assert_refused(done, file)
    assert path.read_bytes() == before and not (tmp_path / "pwned").exists()


def test_models_of_the_other_network_are_refused(call_step, small_steps, tmp_path):
    for flags, other in (([], ["--conditional"]), (["--conditional"], [])):
        folder = tmp_path / f"run{len(flags)}"
        assert call_step(step2, "--dry-run", "--batch-size", 2, *flags, "--out-dir", folder).returncode == 0
        assert_refused(call_step(step2, "--sample-only", *other, "--out-dir", folder), "model.pt")


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(call_step, monkeypatch, tmp_path):
    calls, loss_func = [], step3.loss_func

    def diverging(*args):
        calls.append(1)
        return loss_func(*args) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(step3, "loss_func", diverging)
    done = call_step(step3, "--dry-run", "--out-dir", tmp_path)
    assert_refused(done, "epoch 2, batch 2")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["position"][:2] == (1, 0)
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["tracked"]["model"].values())


@pytest.mark.parametrize("name", STEPS)
def test_a_training_that_diverges_is_stopped(name, call_step, small_steps, monkeypatch, tmp_path):
    """For real, by a learning rate that is far too high."""
    _, flags, _, _ = STEPS[name]
    module = children.STEPS[name]
    for key in module.DEFAULTS:
        if key.endswith("learning_rate"):
            monkeypatch.setitem(module.DEFAULTS, key, 1e30)
    done = call_step(module, "--dry-run", *flags, "--out-dir", tmp_path)
    assert_refused(done, "lower the learning rate")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert runs.all_finite(checkpoint["tracked"]) and not (tmp_path / "model.pt").exists()


def test_an_update_that_is_not_finite_is_not_saved(call_step, monkeypatch, tmp_path):
    """The loss was finite, the weights after the epoch's last update are not: nothing else would notice it."""
    add, seen = runs.Run.add, []

    def poison(self, *args, **losses):
        add(self, *args, **losses)
        seen.append(1)
        if len(seen) == 2 * runs.DRY_RUN_BATCHES:
            next(self._tracked["generator"].parameters()).data[0, 0] = float("inf")

    monkeypatch.setattr(runs.Run, "add", poison)
    done = call_step(step1, "--dry-run", "--out-dir", tmp_path)
    assert_refused(done, "last update of epoch 2")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["position"][:2] == (1, 0) and runs.all_finite(checkpoint["tracked"])


def test_default_folders_and_flags(call_step):
    parser = runs.make_parser("", step1.DEFAULTS)
    args = parser.parse_args([])
    assert args.data_dir == ROOT / "data"
    assert runs.results_folder("step1_gan", args) == ROOT / "results" / "step1_gan"
    assert (
        runs.results_folder("step1_gan", parser.parse_args(["--dry-run"])).parent
        == ROOT / "results" / "step1_gan"
    )
    common = (
        "--epochs --batch-size --seed --device --data-dir --out-dir --dry-run --resume --sample-only --variant "
        "--list-variants --ablation --seeds --held-out --minutes"
    ).split()
    for module, own in (
        (step1, ["--d-freq"]),
        (step2, ["--conditional", "--digit", "--binarize"]),
        (step3, ["--kl-coeff", "--latent-dim", "--bound-samples"]),
    ):
        printed = call_step(module, "--help").stdout
        assert all(flag in printed for flag in common + own)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("module", [step1, step3])
def test_small_batches(module, batch_size, call_step, tmp_path):
    done = call_step(module, "--dry-run", "--batch-size", batch_size, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [["--batch-size", "64"], ["--seed", "1"], ["--latent-dim", "3"]])
def test_resume_with_other_hyperparameters_is_refused(flags, call_step, trained):
    before = (trained / "checkpoint.pt").read_bytes(), (trained / "config.json").read_bytes()
    assert_refused(call_step(step3, "--dry-run", "--resume", *flags, "--out-dir", trained), "same flags")
    assert before == ((trained / "checkpoint.pt").read_bytes(), (trained / "config.json").read_bytes())


def test_a_second_run_into_the_same_folder_is_refused(call_step, trained):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    held = runs.lock(trained)
    assert_refused(call_step(step3, "--dry-run", "--out-dir", trained), "another run writes into")
    assert before == {path.name: path.read_bytes() for path in trained.iterdir()}
    held.close()
    runs.lock(trained)


def test_a_csv_is_read_as_it_was_written(tmp_path):
    table = {"name": ["a", "b"], "value": [0.5, None], "count": [3, 4]}
    runs.write_csv(tmp_path / "table.csv", table)
    assert runs.read_csv(tmp_path / "table.csv") == [
        {"name": "a", "value": 0.5, "count": 3.0},
        {"name": "b", "value": None, "count": 4.0},
    ]


@pytest.fixture(scope="module")
def trained(run_step, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert run_step("hw2_step3_main.py", "--dry-run", "--out-dir", folder).returncode == 0
    return folder


@pytest.mark.parametrize(
    "module, name", [(step, name) for step in (step1, step2, step3) for name in step.VARIANTS]
)
def test_every_variant_is_listed_and_runs(module, name, call_step, small_steps, monkeypatch, tmp_path):
    # The figures are those of the default, which other tests draw.
    monkeypatch.setattr(plotting, "save", lambda figure, *_, **__: plotting.plt.close(figure))
    monkeypatch.setattr(runs, "DRY_RUN_BATCHES", 1)
    monkeypatch.setattr(step3, "FINE_SIDE", 10)
    assert f"{name} " in call_step(module, "--list-variants").stdout
    done = call_step(module, "--variant", name, "--dry-run", "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "variants" / name / "config.json").read_text())
    assert config["variant"] == name
    assert all(
        config["hyperparameters"][key] == list_of(value)
        for key, value in module.VARIANTS[name][1].items()
        if key != "num_epochs"
    )


def test_ablation_makes_a_table(run_step, tmp_path):
    flags = ["--ablation", "--variant", "kl-0.1", "--seeds", "2", "--dry-run", "--out-dir", tmp_path]
    done = run_step("hw2_step3_main.py", *flags)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    assert [row["variant"] for row in rows] == ["default", "kl-0.1"]
    assert (tmp_path / "ablation.png").exists() and (tmp_path / "kl_weights.png").exists()
    seeds = [json.loads((tmp_path / f"ablation/seed_{seed}/metrics.json").read_text()) for seed in (0, 1)]
    values = [each["test_negative_elbo"]["value"] for each in seeds]
    assert float(rows[0]["test_negative_elbo_mean"]) == pytest.approx(sum(values) / 2, rel=1e-5)
    assert float(rows[0]["test_negative_elbo_std"]) == pytest.approx(
        abs(values[0] - values[1]) / 2**0.5, rel=1e-3
    )


def test_ablation_table_of_figures_that_not_every_run_has():
    """More than two latent dimensions have no integral over the plane."""
    entries = dict(test_kl={"value": 7.0}), dict(test_kl={"value": 9.0}, test_nll={"value": 130.0})
    results = {("latent-5", 0): entries[0], (None, 0): entries[1]}
    table = ablation._table([None, "latent-5"], range(1), results)
    assert table["test_kl_mean"] == [9.0, 7.0] and table["test_nll_mean"] == [130.0, None]


def test_ablation_of_step_2(run_step, tmp_path):
    """Held-out images, and no variant whose figures would not compare."""
    flags = ["--ablation", "--variant", "first-7", "--seeds", "1", "--dry-run", "--out-dir", tmp_path]
    done = run_step("hw2_step2_main.py", *flags)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    assert [row["variant"] for row in rows] == ["default", "first-7"]
    config = json.loads((tmp_path / "ablation/seed_0/variants/first-7/config.json").read_text())
    assert config["evaluated_on"] == "last 10,000 training images" and config["variant"] == "first-7"


def test_minutes_limit_the_training(call_step, small_steps, monkeypatch, tmp_path):
    """On few images, many short epochs until the time is over, and the learning rate falls with the time."""
    (images, labels), (test_images, test_labels) = step2.load_mnist(ROOT / "data")
    few = (images[:40], labels[:40]), (test_images[:20], test_labels[:20])
    monkeypatch.setattr(step2, "load_mnist", lambda *_: few)
    steps = []
    clip = step2.nn.utils.clip_grad_norm_
    monkeypatch.setattr(step2.nn.utils, "clip_grad_norm_", lambda *args: steps.append(1) or clip(*args))
    minutes = 0.05
    done = call_step(step2, "--minutes", minutes, "--batch-size", 4, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "metrics.json").read_text())["wall_time"]["value"]
    # The last checkpoint is written after the clock is read.
    assert 60 * minutes - 0.5 <= seconds < 60 * minutes + 5
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    schedule = checkpoint["tracked"]["adam_schedule"]
    assert schedule["last_epoch"] == len(steps) and schedule["_last_lr"] == [pytest.approx(0, abs=6e-4)]


def test_held_out_runs_keep_away_from_the_reported_ones():
    parser = runs.make_parser("", step1.DEFAULTS)
    folder = runs.results_folder("step1_gan", parser.parse_args(["--held-out"]))
    assert folder == ROOT / "results" / "step1_gan" / "held_out"


def test_means_weigh_a_short_last_batch_by_its_size():
    run = object.__new__(runs.Run)
    run._sums, run._bar, run.epoch, run.batch, run.images_seen = {}, runs.tqdm(disable=True), 0, 0, 0
    run.add(4, loss=1.0)
    run.add(1, loss=6.0)
    assert run.means() == {"loss": 2.0} and run.images_seen == 5
    with pytest.raises(runs.UserError, match="epoch 1, batch 1"):
        run.add(4, loss=float("nan"))


def test_half_written_files_never_replace_whole_ones(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    runs.save_tensors(path, {"step": "a"})
    monkeypatch.setattr(
        runs.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(runs.UserError, match="No space left"):
        runs.save_tensors(path, {"step": "b"})
    assert runs.load_tensors(path, ("a",), "checkpoint") == {"step": "a"}
