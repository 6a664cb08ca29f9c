"""A fourth model is a module of `models/` and a step script. Nothing else has to know of it.

The toy of toy_model.py and toy_step.py is copied into a copy of the project, as a student would add it.
"""

import ast
import csv
import importlib
import json
import os
import shutil
import re
import subprocess
import sys

import pytest
import torch

import models
from tests import children
from tests.conftest import ROOT, TIMEOUT, assert_refused

TOY = {"toy_model.py": "models/mixture.py", "toy_step.py": "hw2_step4_main.py"}
MODULES = ("models.mixture", "hw2_step4_main")
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
def import_step(project, bare_steps, monkeypatch):
    """Return a function that replaces parts of the toy's step script, imports it into this process and returns it."""
    monkeypatch.syspath_prepend(project)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(project / "models")])

    def import_step(*replacements):
        script = project / "hw2_step4_main.py"
        text = script.read_text()
        for old, new in replacements:
            assert text.count(old) == 1
            text = text.replace(old, new)
        script.write_text(text)
        return importlib.import_module("hw2_step4_main")

    yield import_step
    for name in MODULES:
        sys.modules.pop(name, None)


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["weights"]


def test_the_toy_is_short_and_needs_no_base_class_and_no_private_name():
    texts = [(ROOT / "tests" / name).read_text() for name in TOY]
    assert sum(len(text.splitlines()) for text in texts) <= 90
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    bases = [ast.unparse(base) for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases]
    assert bases == ["nn.Module"]
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert not [name for name in names if name.startswith("_") and not name.startswith("__")]


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
    assert {"test_nll", "frechet_distance"} <= json.loads((folder / "metrics.json").read_text()).keys()


def test_its_hyperparameters_are_its_signature(import_step, call_step, tmp_path):
    step4 = import_step()
    done = call_step(step4, *SMALL, "--learning-rate", 1e-3, "--seed", 5, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["step"] == "step4_mixture" and config["seed"] == 5
    expected = dict(num_epochs=2, batch_size=16, learning_rate=1e-3, components=3)
    assert config["hyperparameters"] == expected
    assert weights(tmp_path / "run")["pixels"].shape == (3, 784)
    assert_refused(call_step(step4, *SMALL, "--components", 0, "--out-dir", tmp_path / "bad"), "--components")
    assert not (tmp_path / "bad").exists()


def test_a_new_hyperparameter_is_one_line_and_its_use(import_step, call_step, tmp_path):
    line = '    weight_decay: Annotated[float, "weight decay of Adam"] = 0.0,\n'
    use = "lr=learning_rate", "lr=learning_rate, weight_decay=weight_decay"
    step4 = import_step((RATE, RATE + line), use)
    assert "weight decay of Adam (0.0)" in call_step(step4, "--help").stdout
    for value in (0.0, 0.5):
        done = call_step(step4, *SMALL, "--weight-decay", value, "--out-dir", tmp_path / str(value))
        assert done.returncode == 0, done.stderr
        config = json.loads((tmp_path / str(value) / "config.json").read_text())
        assert config["hyperparameters"]["weight_decay"] == value
    assert not torch.equal(weights(tmp_path / "0.0")["pixels"], weights(tmp_path / "0.5")["pixels"])


def test_it_is_interrupted_and_resumed_bit_for_bit(import_step, call_step, monkeypatch, tmp_path):
    step4 = import_step()
    assert call_step(step4, *SMALL, "--out-dir", tmp_path / "whole").returncode == 0
    with monkeypatch.context() as patch:
        children.interrupt(4, setting=patch.setattr)
        assert call_step(step4, *SMALL, "--out-dir", tmp_path / "cut").returncode == 130
    assert not (tmp_path / "cut" / "model.pt").exists()
    done = call_step(step4, *SMALL, "--resume", "--out-dir", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (tmp_path / "whole/losses.csv").read_text() == (tmp_path / "cut/losses.csv").read_text()
    assert "--resume" not in json.loads((tmp_path / "cut" / "config.json").read_text())["command"]


def test_it_is_sampled_and_ablated(import_step, call_step, call_here, monkeypatch, tmp_path):
    """The runs of an ablation call the main of the script in this process."""
    step4, drawn = import_step(), []
    flags = ["--ablation", "--seeds", 1, "--dry-run", "--batch-size", 16, "--out-dir", tmp_path]
    done = call_step(step4, *flags)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    assert [row["variant"] for row in rows] == ["default", "few"] and len(call_here) == 2
    assert all(float(row["test_nll_mean"]) > 0 for row in rows)

    folder = tmp_path / "ablation" / "seed_0" / "variants" / "few"
    assert len(weights(folder)["pixels"]) == 10
    monkeypatch.setattr(step4.plotting, "save_images", lambda path, images, *_: drawn.append((path, images)))
    monkeypatch.setattr(
        step4.cli.Run, "draw", lambda self, name, function, *more: function(self.folder / name, *more)
    )
    flags = ["--sample-only", "--model", folder / "model.pt", "--count", 7, "--out-dir", tmp_path / "drawn"]
    assert call_step(step4, *flags).returncode == 0
    path, images = drawn[0]
    assert path == tmp_path / "drawn" / "samples.png" and images.shape == (7, 1, 28, 28)
    wrong = ROOT / "results" / "classifier" / "model.pt"
    flags = ["--sample-only", "--model", wrong, "--out-dir", tmp_path / "wrong"]
    assert_refused(call_step(step4, *flags), "step4_mixture")
    assert not (tmp_path / "wrong").exists()


def test_a_mistyped_key_of_its_variant_is_refused(import_step, call_step, tmp_path):
    step4 = import_step(("dict(components=10)", "dict(component=10)"))
    for flags in (["--dry-run"], ["--variant", "few"], ["--ablation"]):
        assert_refused(call_step(step4, *flags, "--out-dir", tmp_path / "out"), "'component'", "'components'")
    assert not (tmp_path / "out").exists()
