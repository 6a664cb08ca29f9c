"""Step 1: its warnings, figures and means against what is known, and the optimal discriminator."""

import json
import math

import pytest
import torch
from torch import nn

import hw2_step1_main as step1
from tests import children
from tests.conftest import ROOT
from utils import files, gan_results, metrics, theory
from utils.data import load_data, to_symmetric


class Shows(nn.Module):
    """A generator of given images."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def sample(self, num_samples):
        return self.images[:num_samples]


@pytest.fixture(scope="module")
def digits():
    _, (images, labels) = load_data(ROOT / "data")
    return images[:4000].float() / 255, labels[:4000]


def test_warnings_come_when_they_should(digits):
    images, labels = digits
    varied, threes = Shows(images), Shows(images[labels == 3])
    assert gan_results.find_trouble(varied, d_real=0.6, d_fake=0.4) == []
    # A discriminator that is sure of the real images alone, or of the fakes alone, is not saturated.
    assert gan_results.find_trouble(varied, d_real=0.99, d_fake=0.4) == []
    assert gan_results.find_trouble(varied, d_real=0.6, d_fake=0.01) == []
    (saturated,) = gan_results.find_trouble(varied, d_real=0.97, d_fake=0.03)
    assert "saturated discriminator" in saturated
    (collapsed,) = gan_results.find_trouble(threes, d_real=0.6, d_fake=0.4)
    assert "collapsed generator" in collapsed and collapsed.endswith("are a 3")
    assert len(gan_results.find_trouble(threes, d_real=1.0, d_fake=0.0)) == 2


def test_nobody_is_warned_of_the_digit_that_a_classifier_sees_in_fog():
    assert (
        gan_results.find_trouble(Shows(torch.rand(200, 1, 28, 28) * 0.2 + 0.4), d_real=0.6, d_fake=0.4) == []
    )


def test_a_run_warns_and_its_files_make_the_figure_of_an_ablation(
    call_step, bare_steps, monkeypatch, tmp_path
):
    monkeypatch.setattr(gan_results, "find_trouble", lambda _, *means: [f"trouble with {len(means)}"])
    judged = None, {"frechet_distance": files.metric(1.0, "", "")}
    monkeypatch.setattr(metrics, "judge_sampler", lambda *_: judged)
    flags = ["--dry-run", *children.FLAGS["gan"], "--batch-size", 16, "--variant", "relativistic"]
    flags += ["--d-freq", 2]
    done = call_step(step1, *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("epoch 2/2"))
    assert "trouble with 3" in line and all(label in line for label in gan_results.LABELS.values())
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert {"d_loss", "g_loss", "d_real", "d_fake"} <= results.keys()
    assert results["g_loss"]["formula"] == "-log D(G(z), x)"
    assert results["d_loss"]["formula"] == "-log D(x, G(z)) - log(1 - D(G(z), x))"
    (tmp_path / "ablation.csv").write_text("variant,seeds\ndefault,1\n")
    folders = {"default": tmp_path, "again": tmp_path}
    gan_results.draw_ablation(tmp_path / "ablation.png", folders, step1.load_model)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_losses_are_drawn_over_epochs_with_their_optima(monkeypatch):
    drawn = []
    monkeypatch.setattr(gan_results.plotting, "save_curves", lambda *args, **more: drawn.append((args, more)))
    history = dict(iteration=[1, 2, 3], epoch=[1, 1, 2], d_loss=[1, 2, 3], g_loss=[4, None, 5])
    history |= dict(d_real=[0.6] * 3, d_fake=[0.4] * 3)
    gan_results.draw_losses("loss.png", history, dict(loss="saturating"))
    (_, x, ((_, losses, optima), (_, outputs, _))), more = drawn[0]
    assert x == [0.5, 1, 1.5] and more["smooth"] == 2
    assert list(losses.values()) == [history["d_loss"], history["g_loss"]] and len(outputs) == 2
    assert list(optima.values()) == pytest.approx([math.log(4), -math.log(2)])


def test_neighbours_are_the_copies_of_a_generator_that_copies(digits, monkeypatch):
    images = (digits[0][:300] * 255).to(torch.uint8)

    class Copies:
        def sample(self, num_samples, generator):
            return (to_symmetric(images.flip(0)[:num_samples]) + 1) / 2

    drawn = []
    monkeypatch.setattr(gan_results.plotting, "save_images", lambda path, pairs, *_: drawn.append(pairs))
    gan_results.draw_neighbours("neighbours.png", Copies(), images, seed=0)
    rows = drawn[0].split(gan_results.COLUMNS)
    assert len(rows) == 6
    for samples, nearest in zip(rows[::2], rows[1::2]):
        assert torch.allclose(samples, nearest, atol=1e-6)


def test_trained_discriminator_is_near_the_formula():
    """Both agree to a few hundredths where there are draws."""
    x = torch.linspace(-3, 3, 60)
    for p_g in (theory.P_G, theory.P_DATA):
        trained = theory.trained_discriminator(theory.P_DATA, p_g, x)
        formula = theory.P_DATA.log_prob(x).exp() / (theory.P_DATA.log_prob(x).exp() + p_g.log_prob(x).exp())
        assert torch.allclose(theory.optimal_discriminator(theory.P_DATA, p_g, x), formula, atol=1e-6)
        assert (trained - formula).abs().max() < 0.04
    assert (formula - 0.5).abs().max() < 1e-6


def test_trained_discriminator_is_repeatable_and_leaves_the_global_state(monkeypatch):
    monkeypatch.setattr(theory, "STEPS", 3)
    x, state = torch.linspace(-3, 3, 60), torch.get_rng_state()
    first = theory.trained_discriminator(theory.P_DATA, theory.P_G, x)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert torch.equal(first, theory.trained_discriminator(theory.P_DATA, theory.P_G, x))
