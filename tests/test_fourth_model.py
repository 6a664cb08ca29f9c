"""A fourth model is a module of `models/` and a step script. Nothing else has to know of it.

The toy of toy_model.py and toy_step.py is copied into a copy of the project, as a student would add it.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

import models
from tests import children
from tests.conftest import ROOT, TIMEOUT, assert_refused, assert_same_run, content
from utils.files import read_csv, read_json

TOY = {"toy_model.py": "models/mixture.py", "toy_step.py": "hw2_step4_main.py"}
SMALL = ["--dry-run", "--components", 3, "--batch-size", 16]
RATE = '    learning_rate: Annotated[float, "learning rate of Adam"] = 3e-2,\n'


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project's code and of the classifier, with the toy in it."""
    folder = tmp_path / "project"
    for name in ("models", "utils", "results/classifier"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in TOY.items():
        shutil.copy(ROOT / "tests" / source, folder / target)
    return folder


@pytest.fixture
def import_step(project, bare_steps, edit, monkeypatch):
    """Return a function that replaces parts of the toy's step script and imports it into this process."""
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(project / "models")])
    yield lambda *replacements: edit(project / "hw2_step4_main.py", *replacements)
    sys.modules.pop("models.mixture", None)


def test_a_user_runs_it(project):
    """The run has a folder of its own in the project, the files and the metrics of samples that every model has."""
    command = [sys.executable, "hw2_step4_main.py", "--dry-run", "--data-dir", str(ROOT / "data")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 2/2 .* nll", done.stdout)
    folder = project / "results" / "step4_mixture" / "runs" / "dry_run"
    names = "config.json metrics.json losses.csv loss.png samples.png model.pt checkpoint.pt"
    assert set(names.split()) <= {path.name for path in folder.iterdir()}
    assert {"test_nll", "frechet_distance"} <= read_json(folder / "metrics.json").keys()


def test_it_is_interrupted_and_resumed_bit_for_bit(import_step, call_step, monkeypatch, tmp_path):
    """With a new option, which is one line and its use."""
    line = '    weight_decay: Annotated[float, "weight decay of Adam"] = 0.0,\n'
    step4 = import_step(
        (RATE, RATE + line), ("lr=learning_rate", "lr=learning_rate, weight_decay=weight_decay")
    )
    assert "weight decay of Adam (0.0)" in call_step(step4, "--help").stdout
    flags = [*SMALL, "--weight-decay", 0.5, "--out-dir"]
    assert call_step(step4, *flags, tmp_path / "whole").returncode == 0
    found = read_json(tmp_path / "whole" / "config.json")["hyperparameters"]
    assert found == dict(num_epochs=2, batch_size=16, learning_rate=3e-2, weight_decay=0.5, components=3)
    with monkeypatch.context() as patch:
        children.interrupt(4, setting=patch.setattr)
        assert call_step(step4, *flags, tmp_path / "cut").returncode == 130
    assert call_step(step4, *flags, tmp_path / "cut", "--resume").returncode == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_it_is_sampled_and_ablated(import_step, call_step, call_here, monkeypatch, tmp_path):
    step4, drawn = import_step(), []
    flags = ["--ablation", "--seeds", 1, "--dry-run", "--batch-size", 16, "--out-dir", tmp_path]
    done = call_step(step4, *flags)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "ablation.csv")
    assert [row["variant"] for row in rows] == ["default", "few"] and len(call_here) == 2
    folder = tmp_path / "ablation" / "seed_0" / "variants" / "few"
    assert len(content(folder, "model.pt")["weights"]["pixels"]) == 10
    monkeypatch.setattr(step4.cli.Run, "draw", lambda self, name, _, images, *more: drawn.append(images))
    flags = ["--sample-only", "--model", folder / "model.pt", "--count", 7, "--out-dir", tmp_path / "drawn"]
    assert call_step(step4, *flags).returncode == 0
    assert drawn[0].shape == (7, 1, 28, 28)
    flags[2] = ROOT / "results" / "classifier" / "model.pt"
    assert_refused(call_step(step4, *flags), "step4_mixture")
