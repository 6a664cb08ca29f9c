"""Figures and final metrics of step 3."""

import torch

from models.VAE import active_units, importance_bound, plane_log_likelihood, reconstruction_loss
from utils import figures, files, machine, metrics, plotting
from utils.data import binarize, to_unit

HEADLINE = ("test_negative_elbo", "test_bound", "frechet_distance")  # printed at the end
COLUMNS = 10  # images in a row of a figure
NUM_SAMPLES = 100  # in samples.png, unless --count says otherwise
PLANE_SIDE = 20
SNAPSHOT_SIDE = 10  # of the latent plane that is kept after an epoch, for training.gif
FINE_SIDE = 60  # points of the plane that the classifier judges, along each side
WALKS = ((1, 0), (7, 6))  # digits to walk from and to
WALK_STEPS = 12
CHUNK = 1000  # images that are encoded or decoded at once
ELBO_FORMULA = "-log p(x|z) + KL(q(z|x) || p(z)), mean over images, one draw of z each"
# Suffix of the keys of metrics.json for each kind of test pixels, and what it is.
PROTOCOLS = {
    "stochastic": ("", "dynamically binarised, Bernoulli(x)"),
    "none": ("_grey", "grey, as targets of the cross-entropy"),
    "threshold": ("_threshold", "thresholded, x > 0.5"),
}
# Titles of the groups of variants in ablation.png, by the beginning of the variants' names.
GROUPS = {
    "rate-": "learning rate",
    "batch-": "batch size",
    "layers-": "hidden layers",
    "kl-": "KL term",
    "grey": "training pixels",
    "epochs-": "epochs",
    "latent-": "latent dimensions",
}


@torch.no_grad()
def posterior_means(model, images):
    """Return the mean of q(z|x) for grey uint8 images (N, 1, 28, 28): (N, z_size)."""
    return torch.cat([model.encode(to_unit(chunk))[0] for chunk in images.split(CHUNK)])


@torch.no_grad()
def decode_plane(model, side):
    """Decode a side x side grid of quantiles of the prior: (side^2, 1, 28, 28), z_1 to the right, z_2 upwards.

    Further latent dimensions stay at zero, the middle of the prior.
    """
    quantiles = plotting.gaussian_quantiles(side)
    z = torch.zeros(side * side, model.z_size)
    z[:, 0] = quantiles.repeat(side)
    z[:, 1] = quantiles.flip(0).repeat_interleave(side)
    return model.decode(z.to(next(model.parameters()))).reshape(-1, 1, 28, 28)


# ---------------------------------------------------------------------------------------------------------
# Figures


def draw_losses(path, history):
    """Draw the negative ELBO and its terms over the epochs, without the much larger values before the training."""
    panels = []
    for label, column, sign in (
        ("negative ELBO", "elbo", -1),
        ("$-\\log p(x|z)$", "reconstruction", 1),
        ("KL$(q(z|x) \\,\\|\\, p(z))$", "kl", 1),
    ):
        curves = {
            name: [None, *(sign * v for v in history[f"{name}_{column}"][1:])] for name in ("train", "test")
        }
        panels.append((f"{label} (nats)", curves, {}))
    plotting.save_curves(path, history["epoch"], panels)


def draw_samples(run, model):
    """Draw samples.png: digits decoded from the prior."""
    samples = model.sample(run.args.count or NUM_SAMPLES, torch.Generator().manual_seed(run.args.seed))
    run.draw("samples.png", plotting.save_images, samples, COLUMNS)


def draw_latent_plane(path, model, side):
    """Draw the latent plane as side x side images, with the axes z_1 and z_2."""
    plotting.save(plotting.draw_latent_plane(decode_plane(model, side), side), path, vector=False)


def draw_figures(run, model, images, labels):
    """Draw the figures of reconstructions and of the latent space; images (N, 1, 28, 28) are uint8 test images."""
    means = posterior_means(model, images)
    with torch.no_grad():
        decoded = torch.cat([model.decode(mean) for mean in means.split(CHUNK)])
    x = to_unit(images)
    run.draw("reconstructions.png", draw_reconstructions, x, decoded.reshape(x.shape))
    run.draw("extremes.png", draw_extremes, x, decoded, labels)
    run.draw("walk.png", draw_walk, model, images, labels, means)
    if run.snapshots:
        run.draw("training.gif", draw_training, run.snapshots)
    points, title = means[:, :2].cpu(), "posterior means of the test digits"
    run.draw("latent_means.png", plotting.save_scatter, points, labels.cpu(), title)
    run.draw("posterior.png", draw_posterior, model, images, run.args.seed)
    if metrics.load_classifier(dataset=run.args.dataset):
        run.draw("territories.png", draw_territories, model, run.args.dataset)


def draw_reconstructions(path, x, decoded):
    """Draw the first images of x above their reconstructions."""
    halves = range(COLUMNS), range(COLUMNS, 2 * COLUMNS)
    rows = torch.cat([images[half] for half in halves for images in (x, decoded)])
    plotting.save_images(path, rows, COLUMNS, ["original", "reconstruction"] * 2)


def draw_extremes(path, x, decoded, labels):
    """Draw the best and the worst reconstruction of each digit; decoded (N, 784) are Bernoulli means."""
    loss = reconstruction_loss(decoded, x)
    rows, names = [], []
    for name, sign in (("best", 1), ("worst", -1)):
        order = (sign * loss).argsort()
        chosen = [order[labels[order] == digit][0].item() for digit in labels.unique()]
        rows += [x[chosen], decoded[chosen].reshape(-1, 1, 28, 28)]
        names += [f"{name}, original", "reconstruction"]
    plotting.save_images(path, torch.cat(rows), len(rows[0]), names)


def draw_training(path, snapshots):
    """Draw the latent plane over the epochs as a moving picture."""
    frames = torch.stack([*snapshots.values()]) / 255
    figures.save_gif(path, frames, SNAPSHOT_SIDE, [f"epoch {epoch}" for epoch in snapshots])


@torch.no_grad()
def draw_walk(path, model, images, labels, means):
    """Draw equal steps from a typical test digit to another, between posterior means and between pixels."""
    share = torch.linspace(0, 1, WALK_STEPS, device=means.device)[:, None]
    rows = []
    for digits in WALKS:
        ends = [typical(means, labels, digit) for digit in digits]
        for start, end, decode in (
            (*means[ends], model.decode),
            (*to_unit(images[ends]).flatten(1), torch.clone),
        ):
            rows.append(decode((1 - share) * start + share * end).reshape(-1, 1, 28, 28))
    plotting.save_images(path, torch.cat(rows), WALK_STEPS, ["latent space", "pixels"] * len(WALKS))


def typical(means, labels, digit):
    """Return the index of the image of a digit whose posterior mean is nearest to the median of that digit."""
    chosen = (labels == digit).nonzero().flatten()
    return chosen[(means[chosen] - means[chosen].median(0).values).norm(dim=1).argmin()].item()


@torch.no_grad()
def draw_posterior(path, model, images, seed):
    """Draw the aggregated posterior of the images and the prior, for the first two latent dimensions."""
    mean, logvar = model.encode(to_unit(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        z = model.reparameterize(mean.cpu(), logvar.cpu())
    plotting.save_posterior(path, z[:, :2])


def draw_territories(path, model, dataset="MNIST"):
    """Draw the latent plane, and which digit the classifier sees where."""
    digits = metrics.classify(decode_plane(model, FINE_SIDE), dataset).reshape(FINE_SIDE, FINE_SIDE)
    plotting.save_territories(path, decode_plane(model, PLANE_SIDE), PLANE_SIDE, digits)


def draw_ablation(folder, folders, variants, default_kl_coeff, load_model):
    """Draw ablation.png and kl_weights.png of the runs in `folders`, by variant."""
    rows = {row["variant"]: row for row in files.read_csv(folder / "ablation.csv")}
    groups = {title: [name for name in rows if name.startswith(start)] for start, title in GROUPS.items()}
    grouped = sum(groups.values(), ["default"])
    groups["other variants"] = [name for name in rows if name not in grouped]
    groups = {title: ["default", *names] for title, names in groups.items() if names}

    def series(**keys):
        return {
            label: {name: (row[f"{key}_mean"], row[f"{key}_std"]) for name, row in rows.items()}
            for label, key in keys.items()
        }

    panels = [
        ("nats per image", {"negative ELBO": "test_negative_elbo", "importance bound": "test_bound"}),
        ("neighbour's label", {"accuracy": "neighbour_accuracy"}),
        ("Frechet distance", {"samples": "frechet_distance"}),
    ]
    panels = [(xlabel, series(**keys)) for xlabel, keys in panels]
    plotting.save_ablation(folder / "ablation.png", groups, panels)
    weights = {default_kl_coeff: folders["default"]}
    for name, place in folders.items():
        if name != "default" and list(variants[name][1]) == ["kl_coeff"]:
            weights[variants[name][1]["kl_coeff"]] = place
    models = {weight: load_model(weights[weight] / "model.pt") for weight in sorted(weights)}
    side = 5
    table = {
        f"weight {weight:g}": (model.sample(side**2), decode_plane(model, side))
        for weight, model in models.items()
    }
    plotting.save_grid_table(folder / "kl_weights.png", table, ["samples", "latent plane"], side)


# ---------------------------------------------------------------------------------------------------------
# Metrics


def write_metrics(run, model, train_set, test_set, evaluate):
    """Write metrics.json. Metrics of different pixels are on different scales; the literature's are stochastic.

    Args:
        evaluate: function of (model, x) that returns the reconstruction term and the KL.
    """
    # A run to choose by leaves out what takes long and is not chosen by.
    thorough = not run.args.held_out
    sizes = dict(train_images=len(train_set[0]), test_images=len(test_set[0]))
    results = {}
    for how in PROTOCOLS if thorough else ("stochastic",):
        machine.say(f"bounds of log p(x), pixels {PROTOCOLS[how][1]}")
        x = binarize(test_set[0], how, torch.Generator(run.device).manual_seed(0))
        results |= bounds(run, model, x, how, evaluate, sizes)
        if how == "stochastic" and model.z_size == 2 and thorough:
            results["test_nll"] = plane_nll(run, model, x, sizes)
    machine.say("nearest neighbours, and the quality of samples")
    results |= representation_metrics(model, train_set, test_set, thorough, sizes)
    results |= metrics.judge_sampler(run, model.sample)[1]
    run.finish(HEADLINE, **results)


def num_bound_samples(run, num_images):
    """Return the samples of the bound for each image: fewer for a short training, whose evaluation is to be short."""
    if run.args.dry_run:
        return 5
    return 500 if run.images_seen >= 10 * num_images else 20


def bounds(run, model, x, how, evaluate, sizes):
    """Return the negative ELBO, its terms and the importance-weighted bound of images x, for metrics.json."""
    suffix, pixels = PROTOCOLS[how]
    num_samples = run.args.bound_samples or num_bound_samples(run, sizes["train_images"])
    reconstruction, kl = evaluate(model, x)
    bound = -importance_bound(model, x, num_samples).mean().item()
    bound_formula = (
        "-log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k from the encoder's q(z|x), mean over images"
    )
    entries = (
        ("negative_elbo", reconstruction + kl, ELBO_FORMULA, {}),
        ("reconstruction", reconstruction, "-log p(x|z), one draw of z for each image", {}),
        ("kl", kl, "1/2 sum_j (sigma_j^2 + mu_j^2 - 1 - log sigma_j^2)", {}),
        ("bound", bound, bound_formula, dict(samples=num_samples)),
    )
    return {
        f"test_{name}{suffix}": files.metric(value, "nats per image", formula, pixels=pixels, **more, **sizes)
        for name, value, formula, more in entries
    }


def plane_nll(run, model, x, sizes):
    """Return the NLL of images x by integration over the latent plane, for metrics.json."""
    spacing = 0.2 if run.args.dry_run else 0.04
    return files.metric(
        -plane_log_likelihood(model, x, spacing).mean().item(),
        "nats per image",
        "-log of the integral of p(x|z) p(z) over the latent plane, a sum over a grid, mean over images",
        grid_spacing=spacing,
        pixels=PROTOCOLS["stochastic"][1],
        **sizes,
    )


def representation_metrics(model, train_set, test_set, thorough, sizes):
    """Return what the posterior means tell: latent dimensions in use, and the nearest neighbour's label."""
    (train_images, train_labels), (images, labels) = train_set, test_set
    means, train_means = posterior_means(model, images), posterior_means(model, train_images)
    unit = f"latent dimensions of {model.z_size}"
    formula = "variance over the grey test images of the posterior mean > 0.01"
    results = {"active_units": files.metric(float(active_units(means)), unit, formula, **sizes)}
    spaces = {"neighbour_accuracy": ("posterior means, of grey images", means, train_means)}
    if thorough:
        pixels = ("grey pixels", to_unit(images), to_unit(train_images))
        spaces["neighbour_accuracy_pixels"] = pixels
    for name, (what, points, references) in spaces.items():
        results[name] = files.metric(
            metrics.neighbour_accuracy(points, labels, references, train_labels),
            "share of test images",
            f"the nearest training image has the same label, by Euclidean distance of {what}",
            **sizes,
        )
    return results
