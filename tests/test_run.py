"""A training run: its files, its samples, numbers that are not finite, and the helpers of the training loops."""

import csv
import json
import re
from types import SimpleNamespace

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests import children
from tests.children import STEPS
from tests.conftest import ROOT, assert_refused, assert_same_training, content, flags_of
from utils import cli, files, machine, metrics, theory, vae_results
from utils import run as runs
from utils.figures import STYLE
from utils.files import UserError
from utils.run import Run

# ---------------------------------------------------------------------------------------------------------
# Files


def documented_files(name):
    """Return the names of the files that the step script says a run writes."""
    _, _, text = STEPS[name].__doc__.partition("Writes into")
    text = text.partition("and after --ablation")[0]
    if name == "pixelcnn":
        text = text.partition("and with --conditional")[0]
    lines = [line for line in text.splitlines() if "--ablation" not in line]
    return {*re.findall(r"\b\w+\.(?:png|gif|csv|json|pt)\b", "\n".join(lines))}


@pytest.mark.parametrize("name", STEPS)
def test_dry_run_writes_every_file(name, call_step, trained, monkeypatch, tmp_path):
    """With every figure and metric, and the same weights as without."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 60)
    monkeypatch.setattr(theory, "STEPS", 20)
    monkeypatch.setattr(vae_results, "FINE_SIDE", 10)
    monkeypatch.setattr(cli, "load_data", children.few_images)
    done = call_step(STEPS[name], *flags_of(name, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 1/2" in done.stdout and "epoch 2/2" in done.stdout
    assert_same_training(tmp_path, trained[name])

    written = {path.name for path in tmp_path.iterdir() if path.suffix != ".pdf"}
    assert written == {*documented_files(name), "checkpoint.pt", ".lock"}
    figures = {each for each in written if each.endswith((".png", ".gif"))}
    assert {f"drawing {each}" for each in figures} <= {*done.stdout.splitlines()}
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in tmp_path.glob("*.pdf"):
        read = path.read_bytes()
        assert read.startswith(b"%PDF") and b"/Type3" not in read and path.with_suffix(".png").exists()
    assert (tmp_path / "loss.pdf").exists() and not (tmp_path / "samples.pdf").exists()
    for path in tmp_path.glob("*.pt"):
        torch.load(path, weights_only=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["seed"], config["device"], config["versions"]["torch"]) == (0, "cpu", torch.__version__)
    results = json.loads((tmp_path / "metrics.json").read_text())
    for entry in results.values():
        assert isinstance(entry["value"], float) and entry["unit"] and entry["formula"]
    assert {*metrics.DESCRIPTIONS, "sampling_time", "wall_time", "speed"} <= results.keys()
    assert results["frechet_distance"]["samples"] == metrics.NUM_JUDGED_QUICKLY
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert int(rows[-1]["epoch"]) == 2
    assert not STEPS[name].load_model(tmp_path / "model.pt").training

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
    """Without --model they are drawn from the run with the same hyperparameters, and nothing of it is changed."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(cli, "DRY_RUN_EPOCHS", 1)
    results, own = tmp_path / "results" / "step3_vae", ["--hidden-dims", "8", "--data-dir", ROOT / "data"]
    assert call_step(step3, "--dry-run", *own).returncode == 0
    trained = results / "runs" / "hidden_dims=8,dry_run"
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert trained / "model.pt" in before
    done = call_step(
        step3, "--dry-run", *own, "--sample-only", "--count", 20, "--seed", 3, "--bound-samples", 7
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"results go to {results / 'runs'}") and first.endswith("sample_only")
    assert len(drawn["samples.png"][0]) == 20
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    # The reported model has not been trained here.
    assert_refused(call_step(step3, "--sample-only", *own[2:]), str(results / "model.pt"))


def test_count_and_digit_of_samples(call_step, drawn, trained, tmp_path):
    model = ["--sample-only", "--out-dir", tmp_path, "--count", 20, "--model"]
    assert call_step(step1, *model, trained["gan"] / "model.pt").returncode == 0
    assert len(drawn["samples.png"][0]) == 20
    asked = []
    flags = [*model, trained["conditional"] / "model.pt", "--conditional", "--digit", 7]
    sample = step2.ConditionalPixelCNN.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            step2.ConditionalPixelCNN,
            "sample",
            lambda self, labels, *more, **options: (
                asked.append(labels) or sample(self, labels, *more, **options)
            ),
        )
        assert call_step(step2, *flags).returncode == 0
    assert len(drawn["samples_digit.png"][0]) == 20
    assert any(len(labels) == 20 and (labels == 7).all() for labels in asked)


def test_headline_metrics_stand_beside_the_reported_ones(toy_run, monkeypatch, capsys, tmp_path):
    """Also where the run replaces the reported one."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    toy_run.folder = tmp_path / "results" / "toy"
    toy_run.folder.mkdir(parents=True)
    reported = dict.fromkeys(("loss", "nll"), files.metric(1.25, "nats", "formula", pixels="grey"))
    files.write_json(toy_run.folder / "metrics.json", reported)
    toy_run.track()
    results = dict(loss=files.metric(2.5, "nats", "formula", pixels="grey"))
    results |= dict(nll=files.metric(3.5, "nats", "formula", pixels="binary"), more=files.metric(3.0, "", ""))
    toy_run.finish(("loss", "nll", "other"), **results)
    printed = capsys.readouterr().out
    assert "loss: 2.5 (reported 1.25; nats)\n" in printed and "more" not in printed and "other" not in printed
    assert "nll: 3.5 (nats)\n" in printed, "other pixels are on another scale"


# ---------------------------------------------------------------------------------------------------------
# Numbers that are not finite, and other trainings


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(call_step, bare_steps, monkeypatch, tmp_path):
    calls, loss_func = [], step3.loss_func

    def diverging(*args):
        calls.append(1)
        return loss_func(*args) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(step3, "loss_func", diverging)
    assert_refused(call_step(step3, *flags_of("vae", tmp_path)), "epoch 2, batch 2")
    checkpoint = content(tmp_path, "checkpoint.pt")
    assert checkpoint["position"][:2] == (1, 0) and files.all_finite(checkpoint["tracked"])


@pytest.mark.parametrize(
    "name, rates",
    [
        ("gan", ["--g-learning-rate", "--d-learning-rate"]),
        ("pixelcnn", ["--learning-rate", "--muon-rate"]),
        ("conditional", ["--learning-rate"]),
        ("vae", ["--learning-rate"]),
    ],
)
def test_a_training_that_diverges_is_stopped(name, rates, call_step, bare_steps, tmp_path):
    """For real, by a learning rate that is far too high."""
    flags = [word for rate in rates for word in (rate, "1e30")]
    done = call_step(STEPS[name], *flags_of(name, tmp_path, *flags))
    assert_refused(done, "lower the learning rate")
    assert files.all_finite(content(tmp_path, "checkpoint.pt")["tracked"])
    assert not (tmp_path / "model.pt").exists()


def test_an_update_that_is_not_finite_is_not_saved(call_step, bare_steps, monkeypatch, tmp_path):
    """The loss was finite, the weights after the epoch's last update are not: nothing else would notice it."""
    record, seen = Run.record, []

    def poison(self, *args, **losses):
        record(self, *args, **losses)
        seen.append(1)
        if len(seen) == 2 * runs.DRY_RUN_BATCHES:
            next(self._tracked["generator"].parameters()).data[0, 0] = float("inf")

    monkeypatch.setattr(Run, "record", poison)
    assert_refused(call_step(step1, *flags_of("gan", tmp_path)), "last update of epoch 2")
    checkpoint = content(tmp_path, "checkpoint.pt")
    assert checkpoint["position"][:2] == (1, 0) and files.all_finite(checkpoint["tracked"])


@pytest.mark.parametrize("name", STEPS)
def test_batches_of_one_image(name, call_step, bare_steps, tmp_path):
    done = call_step(STEPS[name], *flags_of(name, tmp_path, "--batch-size", 1))
    assert done.returncode == 0, done.stderr


def test_minutes_limit_the_training(call_step, bare_steps, monkeypatch, tmp_path):
    """On few images, many short epochs until the time is over, and the learning rate falls with the time."""
    steps = []
    clip = step2.nn.utils.clip_grad_norm_
    monkeypatch.setattr(step2.nn.utils, "clip_grad_norm_", lambda *args: steps.append(1) or clip(*args))
    minutes = 0.025
    done = call_step(step2, "--minutes", minutes, "--batch-size", 20, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "metrics.json").read_text())["wall_time"]["value"]
    # The last checkpoint is written after the clock is read.
    assert 60 * minutes - 0.5 <= seconds < 60 * minutes + 5
    schedule = content(tmp_path, "checkpoint.pt")["tracked"]["schedule"]
    assert schedule["last_epoch"] == len(steps)
    assert max(schedule["_last_lr"]) < 0.2 * max(schedule["base_lrs"])


# ---------------------------------------------------------------------------------------------------------
# The loop's helpers


@pytest.fixture
def toy_run(tmp_path):
    """Return a run of two epochs that trains nothing."""
    flags = dict(device="cpu", seed=0, minutes=None, dry_run=False, resume=False, restart=False)
    args = SimpleNamespace(**flags, held_out=False, dataset="MNIST", variant=None, command="toy")
    run = Run("toy", args, dict(num_epochs=2, batch_size=4), tmp_path / "toy")
    yield run
    run.close()


def test_means_weigh_a_short_last_batch_by_its_size(toy_run):
    """And a loss that some batches lack is averaged over the others."""
    toy_run.track()
    seen = []
    for epoch in toy_run.epochs(2):
        for (x,) in toy_run.batches(torch.ones(10), batch_size=4):
            rare = torch.tensor(5.0) if toy_run.iteration % 2 == 0 else None
            toy_run.record(keep=True, size=torch.tensor(float(len(x))), rare=rare)
        seen.append((epoch, toy_run.iteration, toy_run.means()))
    assert seen == [
        (1, 3, dict(size=pytest.approx((4 * 4 + 4 * 4 + 2 * 2) / 10), rare=5.0)),
        (2, 6, dict(size=pytest.approx((4 * 4 + 4 * 4 + 2 * 2) / 10), rare=5.0)),
    ]
    assert toy_run.images_seen == 20
    assert toy_run.tables["losses"] == {
        "iteration": [1, 2, 3, 4, 5, 6],
        "epoch": [1, 1, 1, 2, 2, 2],
        "size": [4, 4, 2, 4, 4, 2],
        "rare": [None, 5.0, None, 5.0, None, 5.0],
    }


def test_a_loss_that_is_not_finite_is_named_with_its_place(toy_run):
    toy_run.track()
    with pytest.raises(UserError, match="loss became nan in epoch 1, batch 2"):
        for _ in toy_run.epochs(1):
            for _ in toy_run.batches(torch.ones(10), batch_size=4):
                toy_run.record(loss=torch.tensor(float("nan") if toy_run.iteration == 2 else 1.0))


def test_every_epoch_has_all_images_in_an_order_of_its_own(toy_run):
    toy_run.track()
    images, labels, orders = torch.arange(30).view(30, 1), torch.arange(30), []
    for _ in toy_run.epochs(2):
        batches = list(toy_run.batches(images, labels, batch_size=7))
        assert [len(x) for x, _ in batches] == [7, 7, 7, 7, 2]
        assert all(x.flatten().equal(y) for x, y in batches)
        orders.append(torch.cat([y for _, y in batches]).tolist())
    toy_run.args.seed += 1
    orders.append(torch.cat([y for _, y in toy_run.batches(images, labels, batch_size=7)]).tolist())
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({*map(tuple, orders)}) == 3, "the second epoch, and its like with another seed"


def test_hardware_names_the_units_that_torch_may_use(monkeypatch):
    """Limited to AVX2, a processor with bfloat16 units trains in single precision and says so."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for limit, units, precise in (("AVX512", "bfloat16 units", False), ("AVX2", "AVX2", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda limit=limit: limit)
        assert f"with {units}, " in machine.hardware(cpu)
        with machine.autocast(cpu, "auto"):
            product = torch.ones(1, 1) @ torch.ones(1, 1)
        assert (product.dtype is torch.float32) == precise
