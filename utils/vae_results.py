"""Figures and final metrics of step 3."""

import math
from functools import partial

import numpy as np
import torch

from models.common import IMAGE_SHAPE
from models.VAE import loss_terms
from utils import files, machine, metrics, plotting
from utils.data import binarize, to_unit
from utils.likelihoods import importance_bounds, plane_gaps, plane_log_likelihood, plane_posteriors
from utils.metrics import CHUNK, NUM_DRAWS
from utils.plotting import COLUMNS, NUM_SAMPLES
from utils.prior import draw_codes

PLANE_SIDE = 12
WALK_FROM, WALK_TO = (1, 7), (0, 6)  # digits
WALK_STEPS = 12
# Means over images and draws.
FORMULAS = dict(
    negative_elbo="-log p(x|z) + KL(q(z|x) || p(z)), one z for each image and draw",
    reconstruction="-log p(x|z), one z for each image and draw",
    kl="1/2 sum_j (sigma_j^2 + mu_j^2 - 1 - log sigma_j^2)",
    bound="-log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k from the encoder's q(z|x)",
    bound_fitted="as test_bound, but p(z) is the prior that was fitted to the codes",
    gap="KL(q(z|x) || p(z|x)) on a grid in the latent plane",
    gap_best="as test_gap, of the best q(z|x) that we find for each image, a Gaussian as well",
    nll="-log of the integral of p(x|z) p(z) over the latent plane, a sum over a grid",
)
# For each kind of test pixels, a suffix of its keys in metrics.json and what it is. Do not compare across kinds.
PROTOCOLS = {
    "stochastic": ("", "dynamically binarised, Bernoulli(x)"),
    "none": ("_grey", "grey, as targets of the cross-entropy"),
    "threshold": ("_threshold", "thresholded, x > 0.5"),
}


@torch.no_grad()
def evaluate(model, x, batch_size=1000):
    """Return reconstruction term and KL in nats, means over images x in [0, 1] with one draw of z for each."""
    totals = torch.zeros(2)
    for chunk in x.flatten(1).to(next(model.parameters())).split(batch_size):
        totals += len(chunk) * torch.stack(loss_terms(model, chunk)).cpu()
    return (totals / len(x)).tolist()


@torch.no_grad()
def posterior_means(model, images):
    """Return the mean of q(z|x) for grey uint8 images (N, 1, 28, 28): (N, z_size)."""
    x = to_unit(images).flatten(1).to(next(model.parameters()))
    return torch.cat([model.encode(chunk)[0] for chunk in x.split(CHUNK)])


@torch.no_grad()
def decode_images(model, z):
    """Decode z (N, z_size) to images (N, 1, 28, 28) in [0, 1]."""
    return torch.cat([model.decode(some) for some in z.split(CHUNK)]).reshape(-1, *IMAGE_SHAPE)


def sample_images(model, count, generator=None, prior=None):
    """Decode z ~ N(0, I), or of another prior, to images (count, 1, 28, 28) in [0, 1]; any handout's model will do.

    `generator` is the CPU's, by default a new one with seed 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    if prior is None and hasattr(model, "sample"):
        return model.sample(count, generator)
    z = prior.sample(count, generator) if prior else torch.randn(count, model.z_size, generator=generator)
    return decode_images(model, z.to(next(model.parameters())))


def decode_plane(model, side):
    """Decode a grid of quantiles of the prior, (side^2, 1, 28, 28): z_1 to the right, z_2 upwards, further z_j = 0."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
    z = torch.zeros(side * side, model.z_size)
    z[:, 0], z[:, 1] = quantiles.repeat(side), quantiles.flip(0).repeat_interleave(side)
    return decode_images(model, z.to(next(model.parameters())))


def draw_losses(path, history, batches):
    """Draw the negative ELBO and its terms over the epochs, of a short training its loss over the batches."""
    if history["epoch"][-1] < plotting.FEW_EPOCHS:
        end = {"negative ELBO of test images at the end": -history["test_elbo"][-1]}
        return plotting.save_batches(path, batches, "loss (nats per image)", end)
    labels = {"elbo": "negative ELBO", "reconstruction": r"$-\log p(x|z)$", "kl": r"KL$(q(z|x) \,\|\, p(z))$"}
    panels = []  # without the much larger values before the training
    for term, label in labels.items():
        keys = {"training images": f"train_{term}", "test images": f"test_{term}"}
        curves = {name: [*map(abs, history[key][1:])] for name, key in keys.items()}
        panels.append((f"{label} (nats)", curves, {}))
    plotting.save_curves(path, history["epoch"][1:], panels, log=["epoch"])


def draw_figures(run, model, images, labels, prior=None):
    """Draw samples, reconstructions and the latent space; images (N, 1, 28, 28) are uint8 test images.

    A prior fitted to the codes is for priors.png and, with --prior fitted, for samples.png.
    """
    noise = torch.Generator().manual_seed(run.args.seed)
    sample = partial(sample_images, model, prior=prior if run.args.prior == "fitted" else None)
    samples = metrics.draw_in_chunks(sample, run.args.count or NUM_SAMPLES, noise)
    run.draw("samples.png", plotting.save_images, samples, COLUMNS)
    run.draw("latent_plane.png", plotting.save_latent_plane, decode_plane(model, PLANE_SIDE), PLANE_SIDE)
    if prior:
        columns = {
            "prior N(0, I)": [sample_images(model, 64)],
            "fitted prior": [sample_images(model, 64, prior=prior)],
            "codes of test images": [decode_images(model, draw_codes(model, images[:64]))],
        }
        run.draw("priors.png", plotting.save_grid_table, columns, 8)
    means, few = posterior_means(model, images), slice(2 * COLUMNS)
    pairs = dict(original=to_unit(images[few]), reconstruction=decode_images(model, means[few]))
    run.draw("reconstructions.png", plotting.save_rows, pairs)
    run.draw("walk.png", draw_walk, model, images, labels, means)
    title = "posterior means of the test digits"
    run.draw("latent_means.png", plotting.save_scatter, means[:, :2].cpu(), labels.cpu(), title)


@torch.no_grad()
def draw_walk(path, model, images, labels, means):
    """Draw equal steps from a typical test digit to another, between posterior means and between pixels."""
    first, last = ([typical(means, labels, digit) for digit in digits] for digits in (WALK_FROM, WALK_TO))
    share = torch.linspace(0, 1, WALK_STEPS, device=means.device)[:, None]

    def walk(x):
        return torch.lerp(x[first, None], x[last, None], share).flatten(0, 1)

    pixels = walk(to_unit(images).flatten(1)).reshape(-1, *IMAGE_SHAPE)
    kinds = {"latent space": decode_images(model, walk(means)), "pixels": pixels}
    plotting.save_rows(path, kinds, WALK_STEPS)


def gap_metrics(run, model, **sets):
    """Return metrics of the gap between ELBO and log p(x) for a few uint8 images of each set; draw posterior.png.

    The sets are `test` images, which the figure shows, and `train` images.
    """
    entries = {}
    for kind, images in sets.items():
        count = 200 if run.epochs_done >= 10 else 4  # a short training has a short evaluation
        x = binarize(images[:count], "stochastic", torch.Generator().manual_seed(0))
        gaps = plane_gaps(model, x)
        if kind == "test":
            run.draw("posterior.png", draw_posterior, model, x, gaps)
        for name, values in zip(("gap", "gap_best"), gaps):
            more = dict(pixels=PROTOCOLS["stochastic"][1], images=len(x), median=values.median().item())
            entries[f"{kind}_{name}"] = files.metric(values, "nats per image", FORMULAS[name], **more)
    return entries


def draw_posterior(path, model, x, gaps):
    """Draw the image of largest `plane_gaps`, its true posterior p(z|x) and its q(z|x), and the gaps of all images x."""
    worst = gaps[0].argmax()
    z, (log_p,), (log_q,) = plane_posteriors(model, x[worst, None])
    likely = z[torch.maximum(log_p, log_q) > math.log(1e-4)]  # where one of them has some mass
    low, high = likely.amin(0) - 0.05, likely.amax(0) + 0.05
    z, (log_p,), (log_q,) = plane_posteriors(model, x[worst, None], low.tolist(), high.tolist())
    peaks = decode_images(model, torch.stack([z[log_q.argmax()], z[log_p.argmax()]]))
    side = math.isqrt(len(z))
    z_1, z_2, p, q = (each.reshape(side, side).cpu().numpy() for each in (*z.T, log_p.exp(), log_q.exp()))
    with plotting.new_figure(path, plotting.WIDTH, 1.7, 1, 3, width_ratios=[1.8, 1, 1]) as (_, axes):
        headings = {"image": 0, "mean of q": 1, "peak of p": 2}
        plotting.draw_images(torch.cat([x[worst, None], peaks]), 3, axis=axes[0], headings=headings)
        axes[1].pcolormesh(z_1, z_2, p, cmap="Blues", shading="nearest", rasterized=True)
        axes[1].contour(z_1, z_2, q, q.max() * np.exp([-2, -0.5]), colors=plotting.COLORS[1])
        axes[1].set(xlabel="$z_1$", ylabel="$z_2$", title="$p(z|x)$ blue, $q(z|x)$ orange")
        axes[1].set_aspect("equal")
        for values, color in zip(gaps.sort().values.cpu(), plotting.COLORS[1:]):
            axes[2].plot(values, torch.arange(1, len(x) + 1) / len(x), color=color)
        labels = dict(xlabel="slack (nats)", ylabel="share of images below")
        axes[2].set(xscale="log", title="encoder's q orange, best q green", **labels)
        axes[2].xaxis.set_major_formatter("{x:g}")


def typical(means, labels, digit):
    """Return the index of the image of a digit whose posterior mean is nearest to the median of that digit."""
    chosen = (labels == digit).nonzero().flatten()
    return chosen[(means[chosen] - means[chosen].median(0).values).norm(dim=1).argmin()].item()


def draw_ablation(folder, folders, variants, load_model):
    """Draw ablation.png and kl_weights.png of the runs in `folders`, by variant."""
    panels = {
        "nats per image": {"negative ELBO": "test_negative_elbo", "importance bound": "test_bound"},
        "1-NN accuracy": {"": "neighbour_accuracy"},
        "Fréchet distance": {"": "frechet_distance"},
    }
    rows = files.read_csv(folder / "ablation.csv")
    plotting.save_ablation(folder / "ablation.png", rows, panels, log=["Fréchet distance"])
    shown = {"default", *(name for name, (_, changes) in variants.items() if [*changes] == ["kl_coeff"])}
    paths = [folders[name] / "model.pt" for name in folders if name in shown]
    table, side = {}, 5
    for weight, path in sorted((files.options_of(path)["kl_coeff"], path) for path in paths):
        model = load_model(path)
        table[f"KL weight {weight:g}"] = sample_images(model, side**2), decode_plane(model, side)
    plotting.save_grid_table(folder / "kl_weights.png", table, side, ["samples", "latent plane"])


def write_metrics(run, model, train_set, test_set, prior=None, results=()):
    """Write metrics.json; `results` are entries of the fitted prior."""
    sizes, results = dict(train_images=len(train_set[0]), test_images=len(test_set[0])), dict(results)
    # A run to choose by leaves out what takes long and is not chosen by.
    for how in ("stochastic",) if run.args.held_out else PROTOCOLS:
        machine.say(f"bounds of log p(x), pixels {PROTOCOLS[how][1]}")
        with machine.seeded(run.device):
            results |= bounds(run, model, test_set[0], how, sizes, prior)
    if model.z_size == 2 and not run.args.held_out:
        results |= gap_metrics(run, model, test=test_set[0], train=train_set[0])
    machine.say("nearest neighbours, and the quality of samples")
    results |= representation_metrics(run, model, train_set, test_set, sizes)
    samples, quality = metrics.judge_sampler(run, partial(sample_images, model))
    results |= quality
    if prior:
        fitted = sample_images(model, len(samples), prior=prior)
        codes = decode_images(model, draw_codes(model, train_set[0][: len(samples)]))
        for name, images in {"": samples, "_fitted": fitted, "_codes": codes}.items():
            results |= metrics.judge_binary(run, images, name, "stochastic")
            if name:  # `judge_sampler` has thresholded those of the prior
                results |= metrics.judge_binary(run, images, name)
    run.finish(("test_negative_elbo", "test_bound", "frechet_distance"), **results)


def bounds(run, model, images, how, sizes, prior=None):
    """Return the negative ELBO, its terms and closer bounds in nats, for metrics.json; write per_image.npz.

    They are means over NUM_DRAWS draws of pixels and noise. The pixels have a generator of their own, so that models
    with other latent spaces see the same.
    """
    suffix, kind = PROTOCOLS[how]
    pixels, noise = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    draws = [binarize(images, how, pixels) for _ in range(NUM_DRAWS)]
    reconstruction, kl = torch.tensor([evaluate(model, x) for x in draws], dtype=torch.float64).T
    values, settings = dict(negative_elbo=reconstruction + kl, reconstruction=reconstruction, kl=kl), {}
    if how == "stochastic":
        trained = run.images_seen >= 10 * sizes["train_images"]  # a short training has a short evaluation
        num_samples, spacing = (5, 0.2) if run.args.dry_run else (500, 0.04) if trained else (20, 0.1)
        num_samples = run.args.bound_samples or num_samples
        priors = {"bound": None, "bound_fitted": prior} if prior else {"bound": None}
        closer = [-importance_bounds(model, x, num_samples, noise, [*priors.values()]) for x in draws]
        per_image = dict(zip(priors, torch.stack(closer, 1)))  # (draws, N) each
        metrics.save_per_image(run.folder, torch.cat(draws), per_image)
        values |= {name: each.mean(1) for name, each in per_image.items()}
        settings = {name: dict(samples=num_samples) for name in priors}
        if model.z_size == 2 and not run.args.held_out:
            values["nll"] = torch.stack([-plane_log_likelihood(model, x, spacing).mean() for x in draws])
            settings["nll"] = dict(grid_spacing=spacing)
    results, more = {}, dict(pixels=kind, draws=NUM_DRAWS, **sizes)
    for name, each in values.items():
        protocol = {**settings.get(name, {}), **more}
        results[f"test_{name}{suffix}"] = files.metric(each, "nats per image", FORMULAS[name], **protocol)
    return results


def representation_metrics(run, model, train_set, test_set, sizes):
    """Return what the posterior means keep: latent dimensions in use, the label by nearest neighbour and classifier."""
    (train_images, train_labels), (images, labels) = train_set, test_set
    means, train_means = posterior_means(model, images), posterior_means(model, train_images)
    unit, share = f"latent dimensions of {model.z_size}", "share of test images"
    formula = "variance over the grey test images of the posterior mean > 0.01"
    active = (means.var(0) > 0.01).sum().item()  # Burda et al. 2016, arXiv 1509.00519, section 5.2
    results = {"active_units": files.metric(float(active), unit, formula, **sizes)}
    spaces = {"": ("posterior means, of grey images", means, train_means)}
    if not run.args.held_out:
        spaces["_pixels"] = ("grey pixels", to_unit(images), to_unit(train_images))
    for suffix, (what, points, references) in spaces.items():
        correct = train_labels[metrics.nearest(points, references)] == labels
        formula = f"the nearest training image has the same label, by Euclidean distance of {what}"
        results[f"neighbour_accuracy{suffix}"] = files.metric(correct, share, formula, **sizes)
    if metrics.has_classifier(run.args.dataset):
        of_class = metrics.probabilities(decode_images(model, means), run.args.dataset)
        formula = "the digit classifier sees the label in the image decoded from the posterior mean"
        correct = of_class.argmax(1) == labels.cpu()
        results["reconstruction_accuracy"] = files.metric(correct, share, formula, **sizes)
    return results
