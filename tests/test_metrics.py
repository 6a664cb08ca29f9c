"""Each metric against a value known in closed form or computed by brute force."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from models.VAE import VAE_model
from tests.conftest import ROOT
from utils import likelihoods, machine, metrics, vae_results
from utils.data import binarize, load_data


def test_frechet_distance_of_gaussians():
    """|m_1 - m_2|^2 + sum_j (s_1j - s_2j)^2 for diagonal covariances, in any basis, and zero for equal samples."""
    torch.manual_seed(0)
    a = torch.randn(200_000, 3).double()
    # Moments exactly 0 and I, then exactly those wanted.
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T
    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.0, -1.0]).double()
    basis, _ = torch.linalg.qr(torch.randn(3, 3).double())
    for b, c in ((a, a * scale + shift), (a @ basis, (a * scale + shift) @ basis)):
        assert metrics.frechet_distance(b, c) == pytest.approx(10 + 0 + 1 + 0.25, rel=1e-6)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_classifier_score_in_closed_form():
    sure = torch.eye(10).double().repeat(5, 1)
    assert metrics.classifier_score(sure) == pytest.approx(10)
    assert metrics.classifier_score(sure[:1].repeat(7, 1)) == pytest.approx(1)
    two = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double()
    expected = math.exp(math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.classifier_score(two) == pytest.approx(expected)


def brute_force_neighbours(samples, real, k):
    def radius(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    sample_radii = [radius(samples, i) for i in range(len(samples))]
    inside = [[math.dist(r, s) <= radius for s in samples] for r, radius in zip(real, real_radii)]
    recalled = [any(math.dist(r, s) <= radius for s, radius in zip(samples, sample_radii)) for r in real]
    return dict(
        precision=sum(map(any, zip(*inside))) / len(samples),
        recall=sum(recalled) / len(real),
        coverage=sum(map(any, inside)) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_metrics_by_brute_force(k, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    samples, real = torch.randn(31, 3).double() + 0.7, torch.randn(40, 3).double()
    expected = brute_force_neighbours(samples.tolist(), real.tolist(), k)
    found = metrics.neighbour_metrics(samples, real, k)
    means = {name: each.double().mean().item() for name, each in found.items()}
    assert means == pytest.approx(expected)
    assert 0 < expected["coverage"] < 1 and 0 < expected["recall"] < 1


def test_parzen_window_by_hand():
    """log mean_i N(x; c_i, sigma^2 I), and the width that suits the validation images."""
    centres, x = torch.rand(6, 4), torch.rand(5, 4)
    window = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(6)),
        torch.distributions.Independent(torch.distributions.Normal(centres, 0.3), 1),
    )
    expected = window.log_prob(x)
    densities, sigma = metrics.parzen_log_likelihood(centres, x, x, sigmas=[0.3])
    assert torch.allclose(densities, expected, rtol=1e-5) and sigma == 0.3
    tight = torch.zeros(200, 4)
    validation = 0.2 * torch.randn(500, 4)
    # Draws of N(0, 0.2^2) around one centre: the likeliest of the widths is theirs.
    assert metrics.parzen_log_likelihood(tight, x, validation, sigmas=[0.1, 0.2, 0.4])[1] == 0.2


def test_nearest_by_brute_force(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 3)
    samples, images = torch.rand(8, 1, 4, 4), torch.rand(20, 1, 4, 4)
    expected = [min(range(20), key=lambda j: (s - images[j]).square().sum().item()) for s in samples]
    assert metrics.nearest(samples, images).tolist() == expected


def test_jackknife_error_of_a_mean_is_its_standard_error():
    """With groups of one value it is the textbook's s / sqrt(n); with larger groups it estimates the same number."""
    x = torch.randn(1000).double()
    expected = (x.std() / 1000**0.5).item()
    mean = lambda values: values.mean().item()  # noqa: E731
    assert metrics.jackknife_error(mean, x, groups=1000) == pytest.approx(expected, rel=1e-6)
    assert metrics.jackknife_error(mean, x) == pytest.approx(expected, rel=0.7)


@pytest.fixture(scope="module")
def mnist():
    return load_data(ROOT / "data")


def test_classifier_is_as_good_as_it_says(mnist):
    _, (images, labels) = mnist
    stated = json.loads((metrics.classifier_folder("MNIST") / "metrics.json").read_text())
    for how in ("none", "threshold", "stochastic"):
        x = binarize(images[:400], how, torch.Generator().manual_seed(1))
        accuracy = (metrics.probabilities(x).argmax(1) == labels[:400]).double().mean().item()
        assert accuracy == pytest.approx(stated[f"accuracy_{how}"]["value"], abs=0.01)
        assert stated[f"accuracy_{how}"]["value"] >= 0.992


@pytest.fixture
def few(mnist, monkeypatch):
    """Judge by 300 test images and 200 images for the Parzen window."""
    train_set, (images, labels) = mnist
    few = train_set, (images[:300], labels[:300])
    monkeypatch.setattr(metrics, "load_data", lambda *_: few)
    monkeypatch.setattr(metrics, "NUM_SIGMA_IMAGES", 200)
    return few[1]


def test_judge_takes_a_tensor_of_images(mnist, few, monkeypatch):
    """Test images are as good as can be by the test images, and noise and a single digit are not."""
    _, (images, labels) = mnist
    digits = few[0][:200].float() / 255
    good, noise = metrics.judge(digits), metrics.judge(torch.rand(200, 1, 28, 28))
    ones = metrics.judge(images[labels == 1][:200].float() / 255)
    value = {name: [each[name]["value"] for each in (good, ones, noise)] for name in good}
    assert value["precision"][0] == 1 and value["precision"][2] < 0.05
    assert value["frechet_distance"][0] < value["frechet_distance"][1] < value["frechet_distance"][2]
    assert value["classifier_score"][0] > 9.5 and value["classifier_score"][1] < 1.2
    assert value["largest_share"][1] > 0.98 and value["smallest_share"][1] < 0.01
    assert value["parzen"][0] > value["parzen"][1] > value["parzen"][2]
    assert all(entry["unit"] and entry["formula"] and entry["samples"] == 200 for entry in good.values())
    assert good["coverage"]["floor"] is None  # which is for 10,000 samples
    monkeypatch.setattr(metrics, "NUM_JUDGED", 200)
    assert metrics.judge(digits.double())["coverage"]["floor"] > 0.9


def test_a_data_set_without_a_classifier_has_the_parzen_window_alone(few, monkeypatch, tmp_path, capsys):
    metrics.say_what_is_left_out("MNIST")
    assert metrics.has_classifier("MNIST") and not capsys.readouterr().out
    monkeypatch.setattr(metrics, "ROOT", tmp_path)
    for dataset in ("KMNIST", "MNIST"):
        judged = metrics.judge(torch.rand(6, 1, 28, 28), dataset=dataset)
        assert judged.keys() == {"parzen", "parzen_sigma"}
        metrics.say_what_is_left_out(dataset)
        assert f"--dataset {dataset} trains one" in capsys.readouterr().out
    metrics.load_classifier.cache_clear()
    with pytest.raises(metrics.files.UserError):
        metrics.load_classifier()


def test_long_waits_are_not_silent(monkeypatch, capsys):
    monkeypatch.setattr(machine, "SILENCE", 0.1)
    for item in machine.progress([0, 0.2, 0, 0], "work"):
        time.sleep(item)
    assert "  work: 50%\n" in capsys.readouterr().out


def test_a_slow_network_is_judged_by_few_samples(few, monkeypatch):
    args = SimpleNamespace(dry_run=False, held_out=False, data_dir=ROOT / "data", dataset="MNIST")
    run = SimpleNamespace(args=args, device=torch.device("cpu"))
    draw = lambda count, generator: torch.rand(count, 1, 28, 28, generator=generator)  # noqa: E731
    images, entries = metrics.judge_sampler(run, draw, "threshold", 30)
    assert len(images) == 30 and entries["precision"]["against"] == "30 test images, pixels threshold"
    monkeypatch.setattr(metrics, "judge_for", lambda _, x, how: {"recall": x.mean().item()})
    drawn = metrics.judge_binary(run, 0.2 * images, "_x", "stochastic")
    assert drawn == {"recall_x_stochastic": pytest.approx(0.1, abs=0.02)}


def test_a_default_of_double_precision_changes_no_metric(tmp_path):
    code = """if True:
        import sys, torch
        torch.set_default_dtype(getattr(torch, sys.argv[1]))
        from models.VAE import VAE_model
        from utils import data, likelihoods, metrics, plotting
        grey = torch.arange(30 * 784).remainder(251).view(30, 1, 28, 28).to(torch.uint8)
        noise, _ = torch.Generator().manual_seed(0), torch.manual_seed(1)
        print(data.distort(grey, 0.5).sum(), data.binarize(grey, "stochastic").sum().item())
        images = data.binarize(grey, "stochastic", noise)
        for name, entry in metrics.judge(images).items():
            print(name, entry["value"])
        vae = VAE_model(784, [8, 4])
        for each in vae.parameters():
            torch.nn.init.constant_(each, 0.01)
        print(f"{likelihoods.importance_bounds(vae, images, 20).mean():.5g}")
        print(f"{likelihoods.plane_log_likelihood(vae, images, 0.5).mean():.5g}")
        plotting.save_scatter(sys.argv[2], torch.rand(30, 2), torch.arange(30) % 10, "title")
    """

    def printed(dtype):
        command = [sys.executable, "-c", code, dtype, str(tmp_path / "scatter.png")]
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout

    assert printed("float64") == printed("float32")


@pytest.mark.parametrize(
    "images, reason",
    [
        (torch.zeros(10, 1, 28, 28, dtype=torch.uint8), "takes floats .* not torch.uint8"),
        (torch.rand(5, 1, 28, 28), "at least 6 images .* not 5"),
        (torch.full((10, 1, 28, 28), float("nan")), "from nan"),
    ],
)
def test_judge_refuses_what_it_cannot_judge(images, reason):
    with pytest.raises(ValueError, match=reason):
        metrics.judge(images)


def test_the_handouts_vae_is_rated_and_sampled_as_ours():
    """It has encode, decode and z_size, takes flat images, and its decoder ends in the sigmoid."""

    ours = VAE_model(784, [8, 4]).eval()
    textbook = SimpleNamespace(z_size=2, parameters=ours.parameters, decode=ours.decode)
    textbook.encode = lambda x: ours.encoder(x).chunk(2, 1)  # which no image (N, 1, 28, 28) survives
    both, images = (ours, textbook), torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8)
    x = images.float() / 255
    for rate, how in ((likelihoods.importance_bounds, 5), (likelihoods.plane_log_likelihood, 0.5)):
        nats = [rate(model, x, how) for model in both]
        assert torch.allclose(*nats, rtol=1e-5)
    assert torch.equal(*(vae_results.sample_images(model, 30) for model in both))
    assert torch.equal(*(vae_results.posterior_means(model, images) for model in both))
