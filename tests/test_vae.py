"""Step 3: interface, the loss against torch.distributions and by hand, the estimates of log p(x)."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.distributions import kl_divergence as kl_of

import hw2_step3_main as step3
from models.VAE import VAE_model, kl_divergence, reconstruction_loss
from tests import children
from tests.conftest import ROOT
from utils import likelihoods, vae_results
from utils.data import binarize, load_data
from utils.likelihoods import active_units, importance_bound, plane_log_likelihood


def test_architecture_and_shapes():
    model = VAE_model(784, [256, 128, 64, 4])
    widths = [
        (layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)
    ]
    assert widths == [(784, 256), (256, 128), (128, 64), (64, 4), (2, 64), (64, 128), (128, 256), (256, 784)]
    assert model.z_size == 2 and isinstance(model.decoder[-1], nn.Sigmoid)
    outputs = model(torch.rand(3, 1, 28, 28))
    assert set(outputs) == {"imgs", "z", "mean", "logvar"}
    assert outputs["imgs"].shape == (3, 784) and 0 <= outputs["imgs"].min() and outputs["imgs"].max() <= 1
    assert all(outputs[key].shape == (3, 2) for key in ("z", "mean", "logvar"))
    assert VAE_model(10, [8, 6], decode_dim=5).decode(torch.zeros(1, 3)).shape == (1, 5)
    with pytest.raises(ValueError, match="even"):
        VAE_model(784, [256, 3])


def test_kl_against_torch_distributions():
    mean, logvar = torch.randn(6, 5), torch.randn(6, 5)
    expected = kl_of(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl_divergence(mean, logvar), expected, rtol=1e-5)


def test_kl_against_monte_carlo():
    """KL = E_q [log q(z) - log p(z)], by 400,000 draws: within five standard errors."""
    mean, logvar = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-1.0, 0.5, -3.0])
    q, p = Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)
    z = q.sample((400_000,))
    log_ratio = (q.log_prob(z) - p.log_prob(z)).sum(1)
    error = log_ratio.std() / len(z) ** 0.5
    assert error < 0.01
    assert abs(kl_divergence(mean[None], logvar[None]).item() - log_ratio.mean()) < 5 * error


def test_kl_known_values():
    zero = torch.zeros(1, 3)
    assert kl_divergence(zero, zero).item() == 0
    assert kl_divergence(zero + 2, zero).item() == pytest.approx(3 * 0.5 * 4)
    assert kl_divergence(zero, zero + math.log(4)).item() == pytest.approx(
        3 * 0.5 * (4 - 1 - math.log(4)), rel=1e-6
    )


def test_reconstruction_against_torch_distributions():
    imgs = torch.rand(4, 784).clamp(0.01, 0.99)
    x = (torch.rand(4, 1, 28, 28) > 0.5).float()
    assert torch.allclose(
        reconstruction_loss(imgs, x), -Bernoulli(imgs).log_prob(x.flatten(1)).sum(1), rtol=1e-4
    )


def test_loss_func_is_eq_2_summed_over_pixels_and_averaged_over_the_batch():
    """All weights zero: the decoder says 1/2 everywhere and q(z|x) has the encoder's bias as its parameters."""
    model = VAE_model(784, [16, 4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.encoder[-1].bias.data = torch.tensor([1.0, -1.0, 0.0, math.log(2)])
    kl = 0.5 * ((1 + 1 - 1 - 0) + (2 + 1 - 1 - math.log(2)))
    for count, coeff in ((1, 1.0), (7, 0.25)):
        loss = step3.loss_func(model, torch.rand(count, 1, 28, 28), coeff)
        assert loss.shape == () and loss.item() == pytest.approx(784 * math.log(2) + coeff * kl, rel=1e-5)


def test_reparameterize_has_the_mean_and_the_variance():
    model = VAE_model(784, [16, 4])
    mean, logvar = torch.tensor([1.0, -2.0]), torch.tensor([0.0, math.log(0.25)])
    z = model.reparameterize(mean.expand(100_000, 2), logvar.expand(100_000, 2))
    assert torch.allclose(z.mean(0), mean, atol=0.02)
    assert torch.allclose(z.std(0), torch.tensor([1.0, 0.5]), atol=0.02)


def test_terms_average_over_images_with_a_short_last_batch():
    model = VAE_model(784, [16, 4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(model.decoder[-2].bias, math.log(0.2 / 0.8))
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    images[4] = 255
    reconstruction, kl = step3.evaluate(model, binarize(images, "none"), batch_size=2)
    assert reconstruction == pytest.approx(784 * (-4 * math.log(0.8) - math.log(0.2)) / 5, rel=1e-5)
    assert kl == pytest.approx(0, abs=1e-6)


def test_sampling_is_repeatable_and_leaves_the_global_state():
    model = VAE_model(784, [16, 4]).eval()
    state = torch.get_rng_state()
    images = model.sample(4)
    assert torch.equal(state, torch.get_rng_state())
    assert images.shape == (4, 1, 28, 28) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, model.sample(4))
    assert not torch.equal(images, model.sample(4, torch.Generator().manual_seed(1)))


def constant_model(logit=0.0, num_pixels=784):
    """Return a model with q(z|x) = N((1, -0.5), diag(1/4, 2)) whose pixels are on with probability sigmoid(logit)."""
    model = VAE_model(num_pixels, [16, 4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(model.decoder[-2].bias, logit)
    model.encoder[-1].bias.data = torch.tensor([1.0, -0.5, math.log(0.25), math.log(2)])
    return model


def test_the_bound_of_a_decoder_that_ignores_z():
    """The pixels are independent, which gives log p(x). The bound averages p(z) / q(z|x), whose mean is one."""
    x = (torch.rand(3, 1, 4, 4) < 0.2).float()
    expected = Bernoulli(logits=torch.tensor(-1.0)).log_prob(x).sum((1, 2, 3))
    bound = importance_bound(constant_model(-1.0, 16), x, 50_000)
    # The narrow q leaves rare, large weights. Their variance does not exist, and the error falls slowly.
    assert torch.allclose(bound, expected, atol=0.3, rtol=0)


def tiny_model(num_pixels=3):
    """Few pixels, so that every image can be counted, and a q(z|x) that is far from the posterior."""
    torch.manual_seed(1)
    model = VAE_model(num_pixels, [8, 4]).eval()
    for parameter in model.decoder.parameters():
        parameter.data *= 4
    return model


def test_probabilities_of_all_images_add_up_to_one():
    model = tiny_model()
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    assert plane_log_likelihood(model, x, 0.1, 6.0).exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def trained():
    """The committed model, 40 binarised test digits and their log p(x) by integration over the plane."""
    _, (images, _) = load_data(ROOT / "data")
    x = binarize(images[:40], "stochastic", torch.Generator().manual_seed(0))
    model = step3.load_model(ROOT / "results" / step3.STEP / "model.pt")
    return model, x, plane_log_likelihood(model, x)


def test_the_grid_of_the_integration_is_fine_enough(trained):
    """A grid that is shifted by half its spacing gives the same mean."""
    model, x, exact = trained
    shifted = plane_log_likelihood(model, x, spacing=0.04, half_width=5.02)
    assert not torch.equal(shifted, exact) and abs(shifted.mean() - exact.mean()) < 0.02


def test_the_bound_grows_with_the_samples_from_the_elbo_to_log_p(trained):
    """This holds in expectation. The means of independent draws have standard errors of about 0.2 nat."""
    model, x, exact = trained
    torch.manual_seed(0)
    with torch.no_grad():
        elbo = -sum(sum(step3.loss_terms(model, x)).item() for _ in range(100)) / 100
    bounds = [importance_bound(model, x, count).mean().item() for count in (1, 10, 100, 1000)]
    assert bounds[0] == pytest.approx(elbo, abs=0.6)
    assert elbo < bounds[1] < bounds[2] < bounds[3] < exact.mean().item()


def test_estimates_are_repeatable_and_leave_the_global_state():
    model, x = VAE_model(784, [16, 4]), torch.rand(5, 1, 28, 28)
    state = torch.get_rng_state()
    first = importance_bound(model, x, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (5,) and torch.equal(first, importance_bound(model, x, 3))
    assert not torch.equal(first, importance_bound(model, x, 3, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError):
        importance_bound(model, x, 0)
    with pytest.raises(ValueError, match="two latent"):
        plane_log_likelihood(VAE_model(784, [16, 6]), x)


@pytest.mark.parametrize("num_samples", [1, 3, 40])
def test_estimates_decode_a_bounded_number_at_once(num_samples, monkeypatch):
    sizes, decode_logits = [], VAE_model.decode_logits
    monkeypatch.setattr(likelihoods, "NUM_DECODED", 7)
    monkeypatch.setattr(
        VAE_model, "decode_logits", lambda self, z: sizes.append(len(z)) or decode_logits(self, z)
    )
    model, x = constant_model(), torch.rand(10, 1, 28, 28)
    nn.init.zeros_(model.encoder[-1].bias)  # q(z|x) is the prior, so the weights are p(x|z)
    bound = importance_bound(model, x, num_samples)
    assert max(sizes) <= 7 and sum(sizes) == 10 * num_samples
    assert torch.allclose(bound, torch.tensor(-784 * math.log(2)))
    sizes.clear()
    integral = plane_log_likelihood(model, x, spacing=0.5)
    assert max(sizes) <= 7 and sum(sizes) == 400
    assert torch.allclose(integral, torch.tensor(-784 * math.log(2)))


def test_active_units_are_those_whose_mean_varies():
    means = torch.tensor([[1.0, 0.3, 5.0], [-1.0, 0.3, 5.1], [0.0, 0.31, 4.9]])
    assert active_units(means) == 1
    assert active_units(means, threshold=0.005) == 2
    assert active_units(torch.ones(4, 3)) == 0


def test_the_typical_image_is_nearest_to_the_median():
    means = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0], [2.0, 2.0], [50.0, 50.0]])
    assert vae_results.typical(means, torch.tensor([3, 7, 3, 3, 7]), 3) == 2


def test_the_latent_plane_has_z_1_to_the_right_and_z_2_upwards():
    """The first row has the largest z_2. Further latent dimensions stay at zero."""
    model, decoded = VAE_model(784, [16, 6]), []
    model.decode = lambda z: decoded.append(z) or torch.zeros(len(z), 784)
    assert vae_results.decode_plane(model, 3).shape == (9, 1, 28, 28)
    low = Normal(0.0, 1.0).icdf(torch.tensor(1 / 6)).item()  # thirds of the prior, each by its median
    expected = torch.tensor([[x, y, 0.0] for y in (-low, 0, low) for x in (low, 0, -low)])
    assert torch.allclose(decoded[0], expected, atol=1e-6)


def test_kl_warm_up_rises_to_the_weight():
    assert [step3.kl_weight(2.0, 0.25, done) for done in (0, 0.125, 0.25, 0.9)] == [0, 1, 2, 2]
    assert step3.kl_weight(2.0, 0.0, 0) == 2


@pytest.fixture
def no_metrics(bare_steps, monkeypatch):
    monkeypatch.setattr(vae_results, "write_metrics", lambda run, *_: run.finish())


def test_training_warms_the_kl_term_up_and_ends_on_undistorted_images(
    call_step, monkeypatch, no_metrics, tmp_path
):
    coeffs, loss_func, distorted = [], step3.loss_func, []
    monkeypatch.setattr(
        step3, "loss_func", lambda model, x, coeff: coeffs.append(coeff) or loss_func(model, x, coeff)
    )
    monkeypatch.setattr(step3.data, "distort", lambda images, share: distorted.append(share) or images)
    flags = ["--kl-coeff", 3, "--kl-warm-up", 0.5, "--distorted", 0.3, "--distorted-until", 0.6]
    flags += ["--batch-size", 8, *children.FLAGS["vae"]]
    done = call_step(step3, "--dry-run", *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert coeffs == pytest.approx([0, 1, 2, 3, 3, 3])
    assert distorted == [0.3] * 4


def test_the_gradient_is_clipped(call_step, monkeypatch, no_metrics, tmp_path):
    """Without that, one outlier among the log-variances has ended the default training with an infinite loss."""
    norms, step = [], torch.optim.Adam.step

    def recorded_step(self, *arguments):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.cat([each.flatten() for each in gradients]).norm().item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded_step)
    flags = ["--clip-norm", 0.5, "--batch-size", 8, *children.FLAGS["vae"]]
    done = call_step(step3, "--dry-run", *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert norms == [pytest.approx(0.5, rel=1e-3)] * 6


def test_minutes_limit_the_training(call_step, no_metrics, tmp_path):
    """On few images, there are many short epochs until the time is over. The learning rate falls with the time."""
    minutes = 0.03
    flags = ["--minutes", minutes, "--batch-size", 20, *children.FLAGS["vae"]]
    done = call_step(step3, *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "metrics.json").read_text())["wall_time"]["value"]
    # The last checkpoint is written after the clock is read.
    assert 60 * minutes - 0.5 <= seconds < 60 * minutes + 5
    schedule = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["tracked"]["schedule"]
    assert schedule["_last_lr"] == [pytest.approx(0, abs=3e-4)]


def test_three_latent_dimensions_have_every_figure_and_labelled_metrics(call_step, monkeypatch, tmp_path):
    """They lack only the integration over the plane."""
    monkeypatch.setattr(
        Figure, "savefig", lambda self, file, **_: file.write(b"drawn")
    )  # which takes longest
    monkeypatch.setattr(vae_results, "FINE_SIDE", 5)
    flags = ["--latent-dim", 3, "--hidden-dims", 16, "--bound-samples", 2, "--out-dir", tmp_path]
    done = call_step(step3, "--dry-run", *flags)
    assert done.returncode == 0, done.stderr
    figures = "latent_plane latent_means reconstructions extremes walk territories samples loss"
    assert {f"{name}.png" for name in figures.split()} == {path.name for path in tmp_path.glob("*.png")}
    results = json.loads((tmp_path / "metrics.json").read_text())
    for suffix, pixels in (("", "dynamically"), ("_grey", "grey"), ("_threshold", "thresholded")):
        for name in ("negative_elbo", "reconstruction", "kl"):
            entry = results[f"test_{name}{suffix}"]
            assert entry["pixels"].startswith(pixels) and entry["unit"] == "nats per image"
            assert entry["draws"] == vae_results.NUM_DRAWS and entry["standard_error"] >= 0
    assert results["test_bound"]["samples"] == 2 and results["test_negative_elbo"]["standard_error"] > 0
    assert results["active_units"]["unit"] == "latent dimensions of 3" and "test_nll" not in results
    accuracies = ("neighbour_accuracy", "neighbour_accuracy_pixels", "reconstruction_accuracy")
    assert {*accuracies, "frechet_distance"} <= results.keys()


def test_reconstructions_that_keep_the_digit(monkeypatch):
    """A decoder that returns its input, here the image itself as a code, keeps nearly all digits; a blank one few."""
    (train_images, train_labels), (images, labels) = load_data(ROOT / "data")
    sets = (train_images[:200], train_labels[:200]), (images[:200], labels[:200])
    monkeypatch.setattr(vae_results, "posterior_means", lambda model, images: images.flatten(1) / 255)
    shares = []
    for decode in (lambda z: z, torch.zeros_like):
        results = vae_results.representation_metrics(
            SimpleNamespace(decode=decode, z_size=784), *sets, thorough=False, dataset="MNIST", sizes={}
        )
        shares.append(results["reconstruction_accuracy"]["value"])
    assert shares[0] > 0.95 and shares[1] < 0.3
