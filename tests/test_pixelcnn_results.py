"""Figures and metrics of step 2: what they are made of. The likelihoods have their tests in test_ar.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.AR import ConditionalPixelCNN, PixelCNN
from utils import pixelcnn_results as results

SMALL = dict(num_blocks=2, channels=5, head_channels=7, first_kernel_size=5)


def conditional_network():
    """Return a network whose positions and labels make a difference, as they do after training."""
    network = ConditionalPixelCNN(**SMALL).eval()
    nn.init.normal_(network.position)
    nn.init.normal_(network.head[-1].class_emb.weight)
    return network


@pytest.mark.parametrize("training", [True, False])
def test_the_evaluation_is_without_dropout_and_leaves_the_mode(training):
    network = PixelCNN(**SMALL, dropout=0.9).train(training)
    images, labels = torch.randint(256, (3, 1, 28, 28)).to(torch.uint8), torch.arange(3)
    nll = [results.evaluate(network, images, labels, "threshold") for _ in range(2)]
    assert nll[0] == nll[1] and network.training == training


def test_stochastic_test_images_are_the_same_in_every_epoch():
    images = torch.randint(256, (3, 1, 28, 28)).to(torch.uint8)
    first, state = results.binarize_test(images, "stochastic"), torch.get_rng_state()
    assert torch.equal(first, results.binarize_test(images, "stochastic"))
    assert set(first.unique().tolist()) == {0.0, 1.0} and torch.equal(state, torch.get_rng_state())


def test_a_conditional_network_as_a_classifier_and_as_a_mixture(monkeypatch):
    """By Bayes' rule the most likely label is the guess, and p(x) is the mean of p(x | y) over the labels."""
    table = torch.full((3, 10), -100.0)
    table[0, 4], table[1, 2], table[2, 2] = -50, -60, -70
    monkeypatch.setattr(results, "label_log_likelihoods", lambda *_: table)
    drawn = []

    def draw(name, function, labels, guesses, *_):
        drawn.append((name, labels.tolist(), guesses.tolist()))

    options = dict(precision="float32")
    run = SimpleNamespace(device=torch.device("cpu"), options=options, draw=draw)
    labels = torch.tensor([4, 2, 9])
    metrics = results.label_metrics(run, None, torch.zeros(3, 1, 28, 28), labels, dict(test_images=3))
    assert metrics["bayes_accuracy"]["value"] == pytest.approx(2 / 3)
    expected = (50 + 60 + 70) / 3 + math.log(10)  # the other labels have next to no share
    assert metrics["mixture_nll"]["value"] == pytest.approx(expected, rel=1e-5)
    assert drawn == [("bayes.png", [4, 2, 9], [4, 2, 2])]


def test_how_often_the_classifier_is_unsure_and_sees_the_digit_that_was_asked_for(monkeypatch):
    """Of two samples of each digit one 3 is taken for a 5. It is sure of the others but for the first fifth."""

    def probabilities(images, dataset):
        digits = torch.arange(len(images)) % 10
        digits[13:14] = 5
        largest = torch.where(torch.arange(len(images)) < len(images) / 5, 0.6, 0.95)
        return nn.functional.one_hot(digits, 10) * largest[:, None]

    monkeypatch.setattr(results.metrics, "probabilities", probabilities)
    samples, real = torch.zeros(20, 1, 28, 28), torch.zeros(10, 1, 28, 28)
    entries = results.classifier_metrics(samples, real, True, "MNIST")
    assert entries["unsure"]["value"] == 4 / 20 and entries["unsure"]["floor"] == 2 / 10
    assert entries["recognised"]["value"] == 19 / 20
    assert entries["recognised"]["by_digit"] == [1, 1, 1, 0.5, 1, 1, 1, 1, 1, 1]
    assert results.classifier_metrics(samples, real, False, "MNIST").keys() == {"unsure"}


def test_receptive_field_is_a_mean_over_batches_of_any_size():
    network, x, labels = conditional_network(), torch.rand(5, 1, 28, 28), torch.arange(5)
    whole = results.receptive_field(network, x, labels, (14, 3))
    assert torch.allclose(
        results.receptive_field(network, x, labels, (14, 3), batch_size=2), whole, rtol=1e-4
    )


def test_completions_have_the_digit_its_half_and_what_was_drawn(monkeypatch):
    drawn, network = [], PixelCNN(**SMALL)
    monkeypatch.setattr(results.plotting, "save_images", lambda path, images, *_, **__: drawn.append(images))
    real, labels = (torch.rand(6, 1, 28, 28) > 0.5).float(), torch.tensor([3, 1, 3, 1, 0, 3])
    results.draw_completions("completions.png", network, real, labels, torch.Generator().manual_seed(0))
    rows = drawn[0].unflatten(0, (3, -1))
    given = results.ROWS_GIVEN
    for row, first in zip(rows, (4, 1, 0)):  # the first image of each label
        assert torch.equal(row[0], real[first])
        assert (row[1:, :, :given] == real[first][:, :given]).all() and (row[1, :, given:] == 0.5).all()
    assert len(rows[0]) == results.COLUMNS + 2


@pytest.mark.parametrize("conditional", [False, True])
def test_samples_to_judge_are_of_all_digits_in_turn(conditional, monkeypatch):
    asked = []
    network_class = ConditionalPixelCNN if conditional else PixelCNN
    monkeypatch.setattr(network_class, "sample", lambda self, what, generator: asked.append(what))
    results.sample_evenly(network_class(**SMALL), 12, None)
    assert asked[0].tolist() == [*range(10), 0, 1] if conditional else asked == [12]


def test_nll_of_a_digit_that_no_image_shows(monkeypatch):
    bars = []
    monkeypatch.setattr(results.plotting, "save_bars", lambda path, names, heights, *_: bars.extend(heights))
    nll = torch.tensor([1.0, 3.0, 5.0])[:, None, None, None].expand(3, 1, 28, 28)
    results.draw_nll_digits("nll_digits.png", nll, torch.tensor([2, 2, 9]), "threshold")
    assert bars == [0, 0, 784 * 2, 0, 0, 0, 0, 0, 0, 784 * 5]


def test_the_moving_picture_shows_pixels_in_raster_order_beside_their_predictions(monkeypatch):
    drawn, network = [], conditional_network()
    monkeypatch.setattr(results.figures, "save_gif", lambda path, frames, **_: drawn.append(frames))
    samples = (torch.rand(10, 1, 28, 28) > 0.5).float()
    results.draw_drawing("drawing.gif", network, samples)
    predicted = network(samples, torch.eye(10)).sigmoid()  # sample number i shows the digit i
    for frames, whole in zip(drawn[0].values(), (samples, predicted)):
        counts = [784 - frame.isnan().sum().item() // 10 for frame in frames]
        assert counts[0] == 0 and counts[-1] == 784 and counts == sorted(counts)
        assert torch.allclose(frames[-1], whole)
        known = ~frames[1][3].flatten().isnan()
        assert known[: counts[1]].all() and not known[counts[1] :].any()
