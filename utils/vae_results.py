"""Figures and final metrics of step 3."""

import torch
from tqdm import tqdm

from models.VAE import loss_terms, reconstruction_loss
from utils import figures, files, machine, metrics, plotting
from utils.data import binarize, to_unit
from utils.likelihoods import active_units, importance_bound, plane_log_likelihood

HEADLINE = ("test_negative_elbo", "test_bound", "frechet_distance")  # printed at the end
COLUMNS = 10  # images in a row of a figure
NUM_SAMPLES = 100  # in samples.png, unless --count says otherwise
PLANE_SIDE = 15
SNAPSHOT_SIDE = 10  # of the latent plane that is kept after an epoch, for training.gif
FINE_SIDE = 60  # points of the plane that the classifier judges, along each side
WALKS = ((1, 0), (7, 6))  # digits to walk from and to
WALK_STEPS = 12
CHUNK = 1000  # images that are encoded or decoded at once
NUM_DRAWS = 5  # of stochastic pixels and of z, in the final metrics
# Means over images and draws.
FORMULAS = dict(
    negative_elbo="-log p(x|z) + KL(q(z|x) || p(z)), one z for each image and draw",
    reconstruction="-log p(x|z), one z for each image and draw",
    kl="1/2 sum_j (sigma_j^2 + mu_j^2 - 1 - log sigma_j^2)",
    bound="-log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k from the encoder's q(z|x)",
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
    for chunk in x.split(batch_size):
        totals += len(chunk) * torch.stack(loss_terms(model, chunk)).cpu()
    return (totals / len(x)).tolist()


@torch.no_grad()
def posterior_means(model, images):
    """Return the mean of q(z|x) for grey uint8 images (N, 1, 28, 28): (N, z_size)."""
    return torch.cat([model.encode(to_unit(chunk))[0] for chunk in images.split(CHUNK)])


@torch.no_grad()
def decode_images(model, z):
    """Decode z (N, z_size) to images (N, 1, 28, 28) in [0, 1]."""
    return torch.cat([model.decode(some) for some in z.split(CHUNK)]).reshape(-1, 1, 28, 28)


def decode_plane(model, side):
    """Decode a grid of quantiles of the prior, (side^2, 1, 28, 28): z_1 to the right, z_2 upwards, further z_j = 0."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
    z = torch.zeros(side * side, model.z_size)
    z[:, 0] = quantiles.repeat(side)
    z[:, 1] = quantiles.flip(0).repeat_interleave(side)
    return decode_images(model, z.to(next(model.parameters())))


def draw_losses(path, history):
    """Draw the negative ELBO and its terms over the epochs, without the much larger values before the training."""
    terms = {
        "negative ELBO": "elbo",
        "$-\\log p(x|z)$": "reconstruction",
        "KL$(q(z|x) \\,\\|\\, p(z))$": "kl",
    }
    panels, keys = [], {"training images": "train", "test images": "test"}
    for label, term in terms.items():
        sign = -1 if term == "elbo" else 1
        columns = {name: history[f"{key}_{term}"][1:] for name, key in keys.items()}
        curves = {name: [None, *(sign * nats for nats in column)] for name, column in columns.items()}
        panels.append((f"{label} (nats)", curves, {}))
    plotting.save_curves(path, history["epoch"], panels, log=["epoch"])


def draw_figures(run, model, images, labels):
    """Draw samples, reconstructions and the latent space; images (N, 1, 28, 28) are uint8 test images."""
    samples = model.sample(run.args.count or NUM_SAMPLES, torch.Generator().manual_seed(run.args.seed))
    run.draw("samples.png", plotting.save_images, samples, COLUMNS)
    means = posterior_means(model, images)
    decoded = decode_images(model, means)
    x = to_unit(images)
    rows = torch.stack([each[: 2 * COLUMNS].unflatten(0, (2, COLUMNS)) for each in (x, decoded)], 1)
    names = ["original", "reconstruction"] * 2
    run.draw("reconstructions.png", plotting.save_images, rows.flatten(0, 2), COLUMNS, names)
    run.draw("extremes.png", draw_extremes, x, decoded, labels)
    run.draw("walk.png", draw_walk, model, images, labels, means)
    if run.snapshots:
        run.draw("training.gif", figures.save_training_gif, run.snapshots, SNAPSHOT_SIDE)
    points, title = means[:, :2].cpu(), "posterior means of the test digits"
    run.draw("latent_means.png", plotting.save_scatter, points, labels.cpu(), title)
    if metrics.load_classifier(dataset=run.args.dataset):
        digits = metrics.classify(decode_plane(model, FINE_SIDE), run.args.dataset)
        where = PLANE_SIDE, digits.reshape(FINE_SIDE, FINE_SIDE)
        run.draw("territories.png", plotting.save_territories, decode_plane(model, PLANE_SIDE), *where)


def draw_extremes(path, x, decoded, labels):
    """Draw the best and the worst reconstruction of each digit; decoded (N, 1, 28, 28) are Bernoulli means."""
    loss = reconstruction_loss(decoded.flatten(1), x)
    rows, names = [], []
    for name, sign in (("best", 1), ("worst", -1)):
        order = (sign * loss).argsort()
        chosen = [order[labels[order] == digit][0].item() for digit in labels.unique()]
        rows += [x[chosen], decoded[chosen]]
        names += [f"{name}, original", "reconstruction"]
    plotting.save_images(path, torch.cat(rows), len(rows[0]), names)


@torch.no_grad()
def draw_walk(path, model, images, labels, means):
    """Draw equal steps from a typical test digit to another, between posterior means and between pixels."""
    share = torch.linspace(0, 1, WALK_STEPS, device=means.device)[:, None]
    rows = []
    for digits in WALKS:
        ends = [typical(means, labels, digit) for digit in digits]
        codes, pixels = (
            (1 - share) * start + share * end
            for start, end in (means[ends], to_unit(images[ends]).flatten(1))
        )
        rows += [model.decode(codes), pixels]
    images = torch.cat(rows).reshape(-1, 1, 28, 28)
    plotting.save_images(path, images, WALK_STEPS, ["latent space", "pixels"] * len(WALKS))


def typical(means, labels, digit):
    """Return the index of the image of a digit whose posterior mean is nearest to the median of that digit."""
    chosen = (labels == digit).nonzero().flatten()
    return chosen[(means[chosen] - means[chosen].median(0).values).norm(dim=1).argmin()].item()


def draw_ablation(folder, folders, variants, default_kl_coeff, load_model):
    """Draw ablation.png and kl_weights.png of the runs in `folders`, by variant."""
    panels = {
        "nats per image": {"negative ELBO": "test_negative_elbo", "importance bound": "test_bound"},
        "1-NN accuracy": {"": "neighbour_accuracy"},
        "Fréchet distance": {"": "frechet_distance"},
    }
    rows = files.read_csv(folder / "ablation.csv")
    plotting.save_ablation(folder / "ablation.png", rows, panels, log=["Fréchet distance"])
    weights = {default_kl_coeff: "default"}
    for name, (_, options) in variants.items():
        if name in folders and list(options) == ["kl_coeff"]:
            weights[options["kl_coeff"]] = name
    table, side = {}, 5
    for weight, name in sorted(weights.items()):
        model = load_model(folders[name] / "model.pt")
        table[f"KL weight {weight:g}"] = model.sample(side**2), decode_plane(model, side)
    plotting.save_grid_table(folder / "kl_weights.png", table, side, ["samples", "latent plane"])


def write_metrics(run, model, train_set, test_set):
    """Write metrics.json."""
    thorough = not run.args.held_out  # a run to choose by leaves out what takes long and is not chosen by
    sizes = dict(train_images=len(train_set[0]), test_images=len(test_set[0]))
    results = {}
    for how in PROTOCOLS if thorough else ("stochastic",):
        machine.say(f"bounds of log p(x), pixels {PROTOCOLS[how][1]}")
        with machine.seeded(run.device):
            results |= bounds(run, model, test_set[0], how, sizes)
    machine.say("nearest neighbours, and the quality of samples")
    results |= representation_metrics(model, train_set, test_set, thorough, run.args.dataset, sizes)
    results |= metrics.judge_sampler(run, model.sample)[1]
    run.finish(HEADLINE, **results)


def bounds(run, model, images, how, sizes):
    """Return the negative ELBO, its terms and closer bounds in nats, for metrics.json.

    They are means over NUM_DRAWS draws, each with pixels and noise of its own.
    """
    suffix, pixels = PROTOCOLS[how]
    trained = run.images_seen >= 10 * sizes["train_images"]  # a short training has a short evaluation
    num_samples = run.args.bound_samples or (5 if run.args.dry_run else 500 if trained else 20)
    spacing = 0.2 if run.args.dry_run else 0.04 if trained else 0.1
    generator = torch.Generator().manual_seed(0)
    values = {}
    for _ in tqdm(range(NUM_DRAWS), "bounds", unit="draw", disable=None, leave=False):
        x = binarize(images, how, generator)
        reconstruction, kl = evaluate(model, x)
        terms = dict(negative_elbo=reconstruction + kl, reconstruction=reconstruction, kl=kl)
        if how == "stochastic":
            terms["bound"] = -importance_bound(model, x, num_samples, generator).mean().item()
            if model.z_size == 2 and not run.args.held_out:
                terms["nll"] = -plane_log_likelihood(model, x, spacing).mean().item()
        for name, value in terms.items():
            values.setdefault(name, []).append(value)
    more = dict(pixels=pixels, draws=NUM_DRAWS, **sizes)
    settings = dict(bound=dict(samples=num_samples), nll=dict(grid_spacing=spacing))
    results = {}
    for name, draws in values.items():
        draws = torch.tensor(draws, dtype=torch.float64)
        protocol = {**settings.get(name, {}), **more}
        results[f"test_{name}{suffix}"] = files.metric(draws, "nats per image", FORMULAS[name], **protocol)
    return results


def representation_metrics(model, train_set, test_set, thorough, dataset, sizes):
    """Return what the posterior means keep: latent dimensions in use, the label by nearest neighbour and classifier."""
    (train_images, train_labels), (images, labels) = train_set, test_set
    means, train_means = posterior_means(model, images), posterior_means(model, train_images)
    unit, share = f"latent dimensions of {model.z_size}", "share of test images"
    formula = "variance over the grey test images of the posterior mean > 0.01"
    results = {"active_units": files.metric(float(active_units(means)), unit, formula, **sizes)}
    spaces = {"": ("posterior means, of grey images", means, train_means)}
    if thorough:
        spaces["_pixels"] = ("grey pixels", to_unit(images), to_unit(train_images))
    for suffix, (what, points, references) in spaces.items():
        correct = train_labels[metrics.nearest(points, references)] == labels
        formula = f"the nearest training image has the same label, by Euclidean distance of {what}"
        results[f"neighbour_accuracy{suffix}"] = files.metric(correct, share, formula, **sizes)
    if metrics.load_classifier(dataset=dataset):
        correct = metrics.classify(decode_images(model, means), dataset) == labels.cpu()
        formula = "the digit classifier sees the label in the image decoded from the posterior mean"
        results["reconstruction_accuracy"] = files.metric(correct, share, formula, **sizes)
    return results
