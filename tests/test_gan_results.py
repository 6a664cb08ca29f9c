"""Step 1: its warnings, figures and means against what is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.GAN import Generator
from tests.conftest import ROOT
from utils import gan_results, metrics
from utils.data import load_data


class Shows(nn.Module):
    """A generator of given images."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def sample(self, num_samples, generator):
        return self.images[:num_samples]


@pytest.fixture(scope="module")
def digits():
    _, (images, labels) = load_data(ROOT / "data")
    return images[:4000].float() / 255, labels[:4000]


@pytest.fixture
def drawn(monkeypatch):
    """Record the arguments after the path of all that is drawn, in a list."""
    calls = []
    for name in ("save_images", "save_curves", "save_ablation"):
        monkeypatch.setattr(gan_results.plotting, name, lambda _, *args: calls.append(args))
    return calls


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
    # Nobody is warned of the digit that a classifier sees in fog.
    fog = Shows(torch.rand(200, 1, 28, 28) * 0.2 + 0.4)
    assert gan_results.find_trouble(fog, d_real=0.6, d_fake=0.4) == []


def test_a_kind_is_pure_if_its_images_show_one_digit(digits, monkeypatch):
    images, labels = digits
    shown = [images[labels == digit][0] for digit in (3, 7)]
    monkeypatch.setattr(gan_results, "decode", lambda _, z: torch.stack([shown[z[0] < z[1]] for z in z]))
    assert gan_results.kind_purity(nn.Linear(2, 1), 2, "MNIST")["by_kind"] == [1, 1]


def test_a_relativistic_discriminator_has_names_of_its_own(monkeypatch, tmp_path):
    finished = {}
    monkeypatch.setattr(metrics, "judge_sampler", lambda *_: (None, {}))
    epochs = dict(d_loss=[1.3], g_loss=[None], d_real=[0.6], d_fake=[0.4])
    run = SimpleNamespace(tables=dict(epochs=epochs), finish=lambda _, **more: finished.update(more))
    for loss, real, fake in (("saturating", "D(x)", "D(G(z))"), ("relativistic", "D(x, G(z))", "D(G(z), x)")):
        run.options = dict(loss=loss, kinds=0)
        gan_results.write_metrics(run, None, [None] * 7)
        assert list(gan_results.labels(loss).values()) == ["D loss", "G loss", real, fake]
        assert finished["d_loss"]["formula"] == f"-log {real} - log(1 - {fake})"
        assert finished["d_real"]["formula"] == real and finished["d_fake"]["optimum"] == 0.5
        assert "g_loss" not in finished, "the generator had no update"


def test_an_ablation_names_the_variants_that_it_does_not_draw(drawn, tmp_path):
    distances = dict(default=40.0, better=30.0, collapsed=400.0, unknown="")
    lines = [f"{name},{value}" for name, value in distances.items()]
    (tmp_path / "ablation.csv").write_text("\n".join(["variant,frechet_distance_mean", *lines]))
    (tmp_path / "epochs.csv").write_text("epoch,d_real,d_fake\n1,0.8,0.3\n2,0.7,0.4\n")
    folders = dict.fromkeys(distances, tmp_path)
    gan_results.draw_ablation(tmp_path / "ablation.png", folders, lambda path: Generator(5, (8, 8)))
    assert (tmp_path / "ablation.png").exists() and (tmp_path / "ablation.pdf").exists()
    rows, _, _, note = drawn[0]
    assert [row["variant"] for row in rows] == ["default", "better", "unknown"]
    assert note.endswith(": collapsed")


def test_the_handouts_generator_is_sampled_as_ours():
    ours = Generator(5, (8, 8)).eval()
    textbook = nn.Sequential(*ours.layers)
    sample, noise = gan_results.sample_images, torch.Generator()
    samples = [sample(each, 30, noise.manual_seed(3)) for each in (ours, textbook)]
    assert samples[0].shape == (30, 1, 28, 28) and torch.equal(*samples)


@pytest.mark.parametrize("last", [0, 1, 2, 5, 50])
def test_short_trainings_have_samples_by_epoch(last):
    shown = gan_results.spread([*range(last + 1)])
    assert shown[0] == 0 and shown[-1] == last and len(shown) <= gan_results.STRIP_ROWS


def test_losses_are_drawn_over_epochs_or_in_a_short_training_over_batches(drawn):
    history = dict(d_loss=[1, 2, 3, 4], g_loss=[4, None, 5, 6], d_real=[0.6] * 4, d_fake=[0.4] * 4)
    history["iteration"] = [1, 2, 3, 4]
    for epochs in ([1, 1, 2, 3], [1, 1, 2, 2]):
        gan_results.draw_losses("loss.png", dict(history, epoch=epochs), dict(loss="saturating"))
    (x, panels, xlabel, _), (batches, _, short_label, _) = drawn
    assert (x, xlabel) == ([0.5, 1, 1.5, 2], "epoch") and (batches, short_label) == ([1, 2, 3, 4], "batch")
    (_, losses, optima), (_, outputs, _) = panels
    assert list(losses.values()) == [history["d_loss"], history["g_loss"]] and len(outputs) == 2
    assert list(optima.values()) == pytest.approx([math.log(4), -math.log(2)])


def test_neighbours_are_the_copies_of_a_generator_that_copies(digits, drawn):
    images = digits[0][:300]
    generator = Shows(images.flip(0))
    gan_results.draw_neighbours("neighbours.png", generator, (images * 255).round().to(torch.uint8), seed=0)
    rows = drawn[0][0].split(gan_results.COLUMNS)
    assert len(rows) == 6
    for samples, nearest in zip(rows[::2], rows[1::2]):
        assert torch.allclose(samples, nearest, atol=1e-6)
