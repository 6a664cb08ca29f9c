"""A student's own code: textbook versions of the assignment's classes in place of ours, one at a time.

tests/textbook.py has them. A dry run then writes every file that ours writes.
"""

import json

import pytest
from torch import nn

import hw2_step2_main as step2
from models import AR, ar_sampler
from tests import children, textbook
from tests.children import STEPS
from tests.conftest import assert_refused, documented_files
from utils import cli, metrics, pixelcnn_results
from utils.plotting import STYLE


class PixelCNN(textbook.PixelCNN):
    """With batch normalisation, whose running means are buffers."""

    def __init__(self):
        super().__init__()
        self.blocks.append(nn.BatchNorm2d(16))


OWN = [
    ("gan", textbook.Generator),
    ("gan", textbook.Discriminator),
    ("vae", textbook.VAE_model),
    ("vae", textbook.loss_func),
    ("pixelcnn", textbook.MaskedConv2d),
    ("conditional", textbook.ConditionalMaskedConv2d),
    ("pixelcnn", PixelCNN),
    ("conditional", textbook.ConditionalPixelCNN),
]
FLAGS = {**children.FLAGS, "vae": ["--hidden-dims", 8, 8, 8]}  # a textbook's network has three hidden layers


@pytest.fixture
def quick(monkeypatch):
    """Take few images and small figures. Where each pixel needs a forward pass, draw the last row alone."""
    draw_plainly = ar_sampler._draw_plainly

    def draw_last_row(network, images, thresholds, _, y):
        draw_plainly(network, images, thresholds, 27, y)

    for owner, name, value in (
        (cli, "load_data", children.few_images),
        (metrics, "load_data", children.few_images),
        (metrics, "NUM_JUDGED_QUICKLY", 20),
        (step2, "load_unconditional", lambda run: None),
        (ar_sampler, "_draw_plainly", draw_last_row),
        (pixelcnn_results, "PIXELS_A_FRAME", 392),
    ):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)


def replace(monkeypatch, own):
    """Put a class or function in the place of ours, wherever the project has imported it."""
    for module in (*STEPS.values(), AR, pixelcnn_results):
        if hasattr(module, own.__name__):
            monkeypatch.setattr(module, own.__name__, own)
    if own is PixelCNN:
        monkeypatch.setattr(step2, "NETWORK", own)


@pytest.mark.filterwarnings("ignore::models.ar_sampler.SlowSampling")
@pytest.mark.parametrize("name, own", OWN)
def test_a_dry_run_with_own_code_writes_every_file(name, own, call_step, quick, monkeypatch, tmp_path):
    """And the figures are drawn from its model again."""
    replace(monkeypatch, own)
    flags = [] if own is PixelCNN else FLAGS[name]
    flags = [*flags, "--dry-run", "--batch-size", 16, "--out-dir"]
    done = call_step(STEPS[name], *flags, tmp_path / "run")
    assert done.returncode == 0 and not done.stderr, done.stderr
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert documented_files(name) <= written
    assert "frechet_distance" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert ("a pass of the whole network" in done.stdout) == own.__name__.endswith("PixelCNN")
    flags += [tmp_path / "drawn", "--sample-only", "--model", tmp_path / "run" / "model.pt"]
    assert call_step(STEPS[name], *flags).returncode == 0
    assert (tmp_path / "drawn" / "samples.png").exists()


def test_a_model_of_ours_does_not_fit_another_network(call_step, trained, monkeypatch, tmp_path):
    """One line says which file, and which module has the network."""
    replace(monkeypatch, textbook.Generator)
    flags = ["--sample-only", "--model", trained["gan"] / "model.pt", "--out-dir", tmp_path]
    assert_refused(call_step(STEPS["gan"], *flags), "does not fit", "tests.textbook")
