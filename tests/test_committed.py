"""Committed figures against the committed weights: each is measured anew on a few images."""

import json

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from models import VAE
from tests.conftest import ROOT
from utils import metrics, pixelcnn_results
from utils.data import binarize, load_data
from utils.likelihoods import importance_bounds
from utils.prior import load_prior

TOLERANCE = 4.5  # standard errors; for a dozen models, chance exceeds it once in 10,000 times
NUM_IMAGES = 200


def committed(start):
    """Return the folders of a step's committed models."""
    paths = sorted(path.parent for path in (ROOT / "results").glob(f"{start}*/**/model.pt"))
    paths = [path for path in paths if "ablation" not in path.parts and "runs" not in path.parts]
    assert paths, f"no model of {start} is committed"
    return [pytest.param(path, id=str(path.relative_to(ROOT / "results"))) for path in paths]


def read(folder):
    return (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))


@pytest.fixture(scope="module")
def images():
    _, (all_images, labels) = load_data(ROOT / "data")
    chosen = torch.arange(0, len(labels), len(labels) // NUM_IMAGES)  # the first half has easier digits
    return all_images[chosen], labels[chosen]


def assert_close(values, expected):
    error = values.std().item() / len(values) ** 0.5
    assert values.mean().item() == pytest.approx(expected, abs=TOLERANCE * error)


@pytest.mark.parametrize("folder", committed("step2"))
def test_nll_of_a_pixelcnn(folder, images):
    config, results = read(folder)
    how = config["hyperparameters"]["binarize"]
    x = pixelcnn_results.binarize_test(images[0], how)
    nll = pixelcnn_results.pixel_nll(step2.load_model(folder / "model.pt"), x, images[1])
    assert_close(nll.sum((1, 2, 3)), results["test_nll"]["value"])


@pytest.mark.parametrize("folder", committed("step3"))
def test_elbo_of_a_vae(folder, images):
    _, results = read(folder)
    x = binarize(images[0], "stochastic", torch.Generator().manual_seed(1))
    model = step3.load_model(folder / "model.pt")
    with torch.no_grad():
        outputs = model(x)
        nats = VAE.reconstruction_loss(outputs["imgs"], x)
        nats += VAE.kl_divergence(outputs["mean"], outputs["logvar"])
    assert_close(nats, results["test_negative_elbo"]["value"])
    if (folder / "prior.pt").exists():
        (bounds,) = importance_bounds(model, x, 100, priors=[load_prior(folder / "model.pt")])
        assert_close(-bounds, results["test_bound_fitted"]["value"])


@pytest.mark.parametrize("folder", committed("step1"))
def test_score_of_a_gan(folder):
    _, results = read(folder)
    samples = step1.load_model(folder / "model.pt").sample(1000, torch.Generator().manual_seed(1))
    of_class = metrics.probabilities(samples)
    error = metrics.jackknife_error(metrics.classifier_score, of_class)
    expected = results["classifier_score"]["value"]
    assert metrics.classifier_score(of_class) == pytest.approx(expected, abs=TOLERANCE * error)
