"""Our extras of step 1, worked out by hand: relativistic and saturating losses, the gradient penalty, --d-freq."""

import csv
import json
import math

import pytest
import torch
from torch import nn

import hw2_step1_main as step1
from models.GAN import Discriminator, gradient_penalty, relativistic_logits
from models.GAN import train_discriminator, train_generator
from tests import children

CRITERION = nn.BCEWithLogitsLoss()


class Weights(nn.Module):
    """A linear discriminator w x, or a generator whose logits are its weights."""

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return x @ self.w[:, None]


def softplus(x):
    return math.log(1 + math.exp(x))


def test_relativistic_discriminator_by_hand():
    """L = 2 mean log(1 + e^-t), t = w (x - G(z)), and dL/dw = -2 mean (x - G(z)) s(-t)."""
    real, fake, w = torch.randn(5, 3), torch.randn(5, 3), [0.5, -0.3, 0.8]
    discriminator = Weights(*w)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    d_loss, outputs_real, outputs_fake, d_loss_fake = train_discriminator(
        discriminator, optimizer, real, fake, CRITERION, "cpu", relativistic=True
    )
    margins = [sum(a * b for a, b in zip(w, row)) for row in (real - fake).tolist()]
    real_logits, fake_logits = relativistic_logits(outputs_real, outputs_fake)
    assert real_logits[:, 0].tolist() == pytest.approx(margins, rel=1e-4) and real_logits.equal(-fake_logits)
    mean = sum(softplus(-margin) for margin in margins) / 5
    assert d_loss.item() == pytest.approx(2 * mean, rel=1e-5)
    assert d_loss_fake.item() == pytest.approx(mean, rel=1e-5)
    for j, weight in enumerate(w):
        slopes = [-2 * row[j] / (1 + math.exp(m)) for row, m in zip((real - fake).tolist(), margins)]
        assert discriminator.w[j].item() == pytest.approx(weight - 0.1 * sum(slopes) / 5, rel=1e-4)


def test_penalty_of_a_linear_discriminator():
    """R1 + R2 = |w|^2 / 2 + |w|^2 / 2, whatever the images, and a step of SGD follows its gradient, 2 w."""
    w, sizes = [0.6, -0.8, 2.0], [4, 6]
    x = torch.randn(10, 3, requires_grad=True)
    assert gradient_penalty(x, Weights(*w)(x), sizes).item() == pytest.approx(0.36 + 0.64 + 4.0)
    steps = []
    for penalty in (0.0, 0.25):
        discriminator = Weights(*w)
        optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
        images = x.detach().split(sizes)
        d_loss, *_ = train_discriminator(discriminator, optimizer, *images, CRITERION, "cpu", penalty=penalty)
        steps.append((d_loss, discriminator.w.detach()))
    (loss, without), (same_loss, penalised) = steps
    assert torch.equal(loss, same_loss)
    assert (without - penalised).tolist() == pytest.approx([0.1 * 0.25 * 2 * each for each in w], rel=1e-4)


def test_penalty_by_finite_differences():
    """Halves of different sizes, each with its own mean, of a network that is not linear."""
    discriminator, sizes, h = Discriminator(channels=[8]).double().eval(), [1, 3], 1e-6
    x = torch.randn(4, 784, dtype=torch.double)
    shifts = h * torch.eye(784, dtype=torch.double)
    with torch.no_grad():
        slopes = [(discriminator(each + shifts) - discriminator(each - shifts)) / (2 * h) for each in x]
    squares = [each.square().sum().item() for each in slopes]
    x.requires_grad_()
    penalty = gradient_penalty(x, discriminator(x), sizes).item()
    assert penalty == pytest.approx(squares[0] / 2 + sum(squares[1:]) / 3 / 2, rel=1e-5)


@pytest.mark.parametrize(
    "flags, loss, slope",
    [
        ({}, lambda t: softplus(-t), lambda t: -1 / (1 + math.exp(t))),
        ({"saturating": True}, lambda t: -softplus(t), lambda t: -1 / (1 + math.exp(-t))),
    ],
)
@pytest.mark.parametrize("real", [None, [0.3, -0.9, 1.1]])
def test_generator_losses_by_hand(flags, loss, slope, real):
    """Value and gradient at logits t, or t - t_real in the relativistic loss."""
    logits = [-2.0, 0.5, 3.0]
    generator = Weights(*logits)
    outputs_real = None if real is None else torch.tensor(real)[:, None].requires_grad_()
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.3)
    g_loss, g_loss_fake = train_generator(
        generator, optimizer, generator(torch.eye(3)), CRITERION, "cpu", outputs_real=outputs_real, **flags
    )
    ts = [t - r for t, r in zip(logits, real or [0.0] * 3)]
    assert g_loss.item() == pytest.approx(sum(map(loss, ts)) / 3, rel=1e-5)
    assert g_loss_fake.item() == pytest.approx(sum(map(softplus, ts)) / 3, rel=1e-5)
    expected = [logit - 0.3 * slope(t) / 3 for logit, t in zip(logits, ts)]
    assert generator.w.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("d_freq", [2, 100])
def test_generator_is_updated_once_in_d_freq_iterations(d_freq, call_step, bare_steps, tmp_path):
    flags = ["--dry-run", *children.FLAGS["gan"], "--batch-size", 16, "--d-freq", d_freq]
    done = call_step(step1, *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert [int(row["iteration"]) for row in rows] == list(range(1, 7))
    updated = [int(row["iteration"]) for row in rows if row["g_loss"]]
    assert updated == [iteration for iteration in range(1, 7) if iteration % d_freq == 0]
    assert ("g_loss" in json.loads((tmp_path / "metrics.json").read_text())) == bool(updated)
