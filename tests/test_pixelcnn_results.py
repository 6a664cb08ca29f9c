"""Figures and metrics of step 2: what they are made of. The likelihoods have their tests in test_ar.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import nn

from models.AR import ConditionalPixelCNN, PixelCNN
from utils import files, plotting
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
    images, labels = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8), torch.arange(3)
    nll = [results.evaluate(network, images, labels, "threshold") for _ in range(2)]
    assert nll[0] == nll[1] and network.training == training


def test_stochastic_test_images_are_the_same_in_every_epoch():
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    first, state = results.binarize_test(images, "stochastic"), torch.get_rng_state()
    assert torch.equal(first, results.binarize_test(images, "stochastic"))
    assert set(first.unique().tolist()) == {0.0, 1.0} and torch.equal(state, torch.get_rng_state())


def test_a_conditional_network_as_a_classifier_and_as_a_mixture():
    """By Bayes' rule the most likely label is the guess, and p(x) is the mean of p(x | y) over the labels."""
    network, x = conditional_network(), (torch.rand(12, 1, 28, 28) > 0.8).float()
    repeated = x.repeat_interleave(10, 0)  # each label in turn, for each image
    bernoulli = torch.distributions.Bernoulli(logits=network(repeated, torch.eye(10).repeat(12, 1)))
    table = bernoulli.log_prob(repeated).sum((1, 2, 3)).view(12, 10).detach()
    likeliest = table.argmax(1)
    labels = torch.cat([likeliest[:8], (likeliest[8:] + 1) % 10])
    run = SimpleNamespace(device=torch.device("cpu"), options=dict(precision="float32"))
    entries, nll = results.label_metrics(run, network, x, labels, {})
    assert entries["bayes_accuracy"]["value"] == pytest.approx(8 / 12)
    assert torch.allclose(nll, math.log(10) - table.logsumexp(1), rtol=1e-4)
    assert entries["mixture_nll"]["value"] == pytest.approx(nll.mean().item())


def test_how_often_the_classifier_is_unsure_and_sees_the_digit_that_was_asked_for(monkeypatch):
    """Of two samples of each digit one 3 is taken for a 5. It is sure of the others but for the first fifth."""

    def probabilities(images, _):
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


@pytest.fixture
def drawn(monkeypatch):
    """Record the arguments after the path of all that is drawn, in a list."""
    calls = []
    for name in ("save_images", "save_curves"):
        monkeypatch.setattr(plotting, name, lambda _, *args, **__: calls.append(args))
    return calls


def test_completions_have_the_digit_its_half_and_what_was_drawn(drawn):
    network = PixelCNN(**SMALL)
    real, labels = (torch.rand(3, 1, 28, 28) > 0.5).float(), torch.tensor([0, 1, 3])
    results.draw_completions("completions.png", network, real, labels, torch.Generator().manual_seed(0))
    rows = drawn[0][0].unflatten(0, (3, -1))
    given = results.ROWS_GIVEN
    for row, original in zip(rows, real):
        assert torch.equal(row[0], original)
        assert (row[1:, :, :given] == original[:, :given]).all() and (row[1, :, given:] == 0.5).all()
    assert len(rows[0]) == results.COLUMNS + 2


@pytest.mark.parametrize("conditional", [False, True])
def test_samples_to_judge_are_of_all_digits_in_turn(conditional, monkeypatch):
    asked = []
    network_class = ConditionalPixelCNN if conditional else PixelCNN
    monkeypatch.setattr(network_class, "sample", lambda self, what, generator: asked.append(what))
    results.sample_evenly(network_class(**SMALL), 12, None)
    assert asked[0].tolist() == [*range(10), 0, 1] if conditional else asked == [12]


@pytest.mark.parametrize("conditional", [False, True])
def test_a_network_without_our_extras_draws_the_images_that_ours_draws(conditional, capsys):
    """The handout's networks have a forward pass alone."""
    ours = conditional_network() if conditional else PixelCNN(**SMALL).eval()
    base = ConditionalPixelCNN if conditional else PixelCNN

    class Textbook(base):
        sample = logits = property()  # hasattr says no

        def __init__(self):
            nn.Module.__init__(self)
            self.network = ours

        def forward(self, *inputs):
            return self.network(*inputs)

    labels, given = torch.tensor([3, 7]), torch.ones(2, 1, 20, 28)
    sample, noise = results.sample_images, torch.Generator()
    images = [sample(each, labels, noise.manual_seed(1), given) for each in (ours, Textbook())]
    assert torch.equal(*images) and images[0].shape == (2, 1, 28, 28) and (images[0][:, :, :20] == 1).all()
    assert results.num_judged(ours) == 10_000 and not capsys.readouterr().out
    assert results.num_judged(Textbook()) == 200 and "200 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, rows, of_digit",
    [
        ({}, [digit for digit in range(10) for _ in range(10)], 100),
        (dict(count=13), [*range(10), 0, 1, 2], 13),
        (dict(count=3, complete=[4, 0]), [0, 1, 2], 3),
    ],
)
def test_what_is_drawn_is_chosen_by_count_digit_and_complete(flags, rows, of_digit, monkeypatch):
    drawn = {}
    monkeypatch.setattr(results, "num_judged", lambda _: None)
    # An image of a digit has its number in every pixel.
    shown = lambda network, labels, *_: labels.float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # noqa: E731
    monkeypatch.setattr(results, "sample_images", shown)
    flags = dict(dict(count=None, complete=None, digit=None, seed=0, dataset="MNIST"), **flags)
    args = SimpleNamespace(**flags)
    draw = lambda name, _, *arguments, **__: drawn.update({name: arguments})  # noqa: E731
    run = SimpleNamespace(args=args, options=dict(binarize="threshold"), draw=draw)
    test_set = torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.tensor([3, 1, 3, 1, 0])
    results.draw_samples(run, conditional_network(), test_set)
    assert drawn["samples.png"][0][:, 0, 0, 0].tolist() == rows
    assert drawn["samples_digit.png"][0][:, 0, 0, 0].tolist() == [results.DIGIT] * of_digit
    assert drawn["completions.png"][2].tolist() == ([0, 3] if args.complete else [0, 1, 3])
    _, samples, names = drawn["drawing.gif"]
    assert samples[:, 0, 0, 0].tolist() == names.tolist() == sorted(set(rows))
    args.complete = [5]
    with pytest.raises(files.UserError, match="below 5, not 5"):
        results.draw_samples(run, None, test_set)


def test_losses_of_a_short_training_are_drawn_over_its_batches(drawn):
    batches = dict(iteration=[1, 5, 9], loss=[9.0, 8.0, 7.0])
    for epochs in ([0, 0.4], [0, 1, 2, 3]):
        history = dict(epoch=epochs, test_nll=[500, 90, 80, 70][: len(epochs)], train_nll=[None, 90, 80, 70])
        results.draw_losses("loss.png", history, batches, "threshold")
    (short, [(_, curves, end)], *_), (x, *_) = drawn
    assert short == [1, 5, 9] and list(curves.values()) == [batches["loss"]] and list(end.values()) == [90]
    assert x == [0, 1, 2, 3]


def test_the_moving_picture_shows_pixels_in_raster_order_above_their_predictions(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "PIXELS_A_FRAME", 392)
    grid_of, grids = plotting.grid_of, []
    monkeypatch.setattr(plotting, "grid_of", lambda *images: grids.append(images[0]) or grid_of(*images))
    network, samples = conditional_network(), (torch.rand(4, 1, 28, 28) > 0.5).float()
    for name in ("a.gif", "b.gif"):
        results.draw_drawing(tmp_path / name, network, samples, torch.arange(4))
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    rows = torch.cat([samples, network(samples, torch.eye(10)[:4]).sigmoid()])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3
        for frame, shown, count in zip(ImageSequence.Iterator(gif), grids[1:4], (0, 392, 784)):
            assert torch.allclose(shown.flatten(1)[:, :count], rows.flatten(1)[:, :count])
            assert shown.flatten(1)[:, count:].isnan().all()
            assert frame.info["duration"] == (2000 if count == 784 else 150)
            # Every pixel of an image is a block of 2 x 2 on the screen, in some versions a few dots more.
            unknown = (np.asarray(frame.convert("RGB")) == (86, 180, 233)).all(2).sum()
            assert unknown == pytest.approx(8 * 4 * (784 - count), rel=0.03)
