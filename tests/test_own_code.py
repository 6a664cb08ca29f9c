"""A student's own code: textbook versions of the assignment's classes in place of ours, one at a time.

tests/textbook.py has them. A dry run then writes every file that ours writes.
"""

import json

import pytest

import hw2_step2_main as step2
from models import AR, ar_sampler
from tests import children, textbook
from tests.children import FLAGS, STEPS
from tests.conftest import documented_files
from utils import cli, gan_results, metrics, pixelcnn_results
from utils.figures import STYLE

REPLACED = [
    ("gan", "Generator"),
    ("gan", "Discriminator"),
    ("vae", "VAE_model"),
    ("vae", "loss_func"),
    ("pixelcnn", "MaskedConv2d"),
    ("conditional", "ConditionalMaskedConv2d"),
    ("pixelcnn", "PixelCNN"),
    ("conditional", "ConditionalPixelCNN"),
]


@pytest.fixture
def quick(monkeypatch):
    """Take few images and small figures. Where each pixel needs a forward pass, draw the last row alone."""
    draw_plainly = ar_sampler._draw_plainly
    for owner, name, value in (
        (cli, "load_data", children.few_images),
        (metrics, "load_data", children.few_images),
        (metrics, "NUM_JUDGED_QUICKLY", 20),
        (gan_results, "OPTIMUM_STEPS", 20),
        (step2, "load_unconditional", lambda run: None),
        (
            ar_sampler,
            "_draw_plainly",
            lambda network, images, thresholds, _, y: draw_plainly(network, images, thresholds, 27, y),
        ),
    ):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)


def replace(monkeypatch, name, own):
    """Put a class or function in the place of ours, wherever the project has imported it."""
    for module in (*STEPS.values(), AR, pixelcnn_results):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, own)
    if name == "PixelCNN":
        monkeypatch.setattr(step2, "NETWORK", own)


@pytest.mark.filterwarnings("ignore::models.ar_sampler.SlowSampling")
@pytest.mark.parametrize("name, replaced", REPLACED)
def test_a_dry_run_with_a_textbook_version_writes_every_file(
    name, replaced, call_step, quick, monkeypatch, tmp_path
):
    """And the figures are drawn from its model again."""
    replace(monkeypatch, replaced, getattr(textbook, replaced))
    flags = [] if replaced == "PixelCNN" else FLAGS[name]
    flags = [*flags, "--dry-run", "--batch-size", 16, "--out-dir"]
    done = call_step(STEPS[name], *flags, tmp_path / "run")
    assert done.returncode == 0 and not done.stderr, done.stderr
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert documented_files(name) <= written
    assert "frechet_distance" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert ("a pass of the whole network" in done.stdout) == replaced.endswith("PixelCNN")
    flags += [tmp_path / "drawn", "--sample-only", "--model", tmp_path / "run" / "model.pt"]
    assert call_step(STEPS[name], *flags).returncode == 0
    assert (tmp_path / "drawn" / "samples.png").exists()


@pytest.mark.parametrize("name", ["gan", "vae"])
def test_a_model_of_ours_does_not_fit_another_network(name, call_step, trained, monkeypatch, tmp_path):
    """One line says which file, and which class in which module."""
    replace(monkeypatch, "Generator", textbook.Generator)
    replace(monkeypatch, "VAE_model", lambda *sizes, **more: textbook.VAE_model(*sizes, **more).decoder)
    flags = ["--sample-only", "--model", trained[name] / "model.pt", "--out-dir", tmp_path]
    done = call_step(STEPS[name], *flags)
    assert done.returncode == 2 and " does not fit the " in done.stderr, done.stderr
