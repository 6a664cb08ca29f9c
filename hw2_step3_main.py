"""Step 3: a variational autoencoder on MNIST (Kingma & Welling 2014, arXiv 1312.6114).

Encoder and decoder are trained together on the evidence lower bound of Eq. 2.

    python hw2_step3_main.py                  train with the defaults below
    python hw2_step3_main.py --dry-run        a few batches, to look around
    python hw2_step3_main.py --sample-only    draw the figures of the trained model
    python hw2_step3_main.py --ablation       every variant below, over three seeds

Writes into results/step3_vae/:
    loss.png              negative ELBO and its two terms over the epochs, training and test
    samples.png           digits decoded from the prior
    latent_plane.png      the latent plane, decoded at quantiles of the prior
    territories.png       the same, and which digit the classifier sees where
    latent_means.png      the posterior means of the test digits, coloured by digit
    posterior.png         the aggregated posterior of the test digits against the prior
    reconstructions.png   test digits over their reconstructions
    extremes.png          the best and the worst reconstruction of each digit
    walk.png              from one test digit to another, in the latent space and in pixels
    losses.csv, metrics.json, config.json, model.pt
and after --ablation:
    ablation.png          the figures of the variants by what they change
    kl_weights.png        samples and latent plane at each KL weight
    ablation.csv
"""

import math

import torch

from models.VAE import (
    VAE_model,
    active_units,
    importance_bound,
    kl_divergence,
    plane_log_likelihood,
    reconstruction_loss,
)
from utils import ablation, metrics, plotting, runs
from utils.data import batches, binarize, distort, load_mnist, to_unit

STEP = "step3_vae"
NUM_PIXELS = 28 * 28

DEFAULTS = dict(
    num_epochs=120,  # passes over the 60,000 training images
    batch_size=128,
    learning_rate=3e-3,  # falling to zero along a cosine
    kl_coeff=1.0,  # weight of the KL term; 1 is the ELBO
    kl_warm_up=0.0,  # share of the training in which that weight rises from zero
    latent_dim=2,  # two, so that the latent plane can be looked at
    hidden_dims=(256, 256, 256),  # of the encoder, the decoder mirrors them; out of the assignment's set
    binarize="stochastic",  # training pixels: a fresh Bernoulli(x) draw at each step, or "none" for grey
    distorted=0.0,  # share of the training images that are slightly rotated, scaled and sheared
    distorted_until=0.9,  # of the training; its end sees images as they are
)

VARIANTS = {
    "rate-1e-4": ("the lower end of the handout's learning rates", dict(learning_rate=1e-4)),
    "rate-1e-3": ("are the usual steps large enough?", dict(learning_rate=1e-3)),
    "rate-1e-2": ("the upper end of the handout's learning rates", dict(learning_rate=1e-2)),
    "batch-64": ("does twice the number of steps pay?", dict(batch_size=64)),
    "batch-256": ("is the usual larger batch as good?", dict(batch_size=256)),
    "layers-256-128-64": ("layers that narrow towards the latent plane?", dict(hidden_dims=(256, 128, 64))),
    "layers-16-16-16": ("how small may the layers be?", dict(hidden_dims=(16, 16, 16))),
    "layers-256-256": ("is a layer less enough?", dict(hidden_dims=(256, 256))),
    "layers-256x4": ("does a layer more help?", dict(hidden_dims=(256, 256, 256, 256))),
    "kl-0.001": ("the lower end of the handout's KL weights: hardly a prior", dict(kl_coeff=1e-3)),
    "kl-0.01": ("how little of the KL term keeps the plane together?", dict(kl_coeff=1e-2)),
    "kl-0.1": ("better reconstructions for worse samples?", dict(kl_coeff=0.1)),
    "kl-4": ("what does the plane lose under a strong prior?", dict(kl_coeff=4.0)),
    "kl-warm-up": ("does the plane unfold better before the prior presses?", dict(kl_warm_up=0.3)),
    "grey": ("does it matter that the training pixels are binary?", dict(binarize="none")),
    "epochs-4": ("what does half of the ablation's training cost?", dict(num_epochs=4)),
    "epochs-16": ("and what does twice as much buy?", dict(num_epochs=16)),
    "latent-5": ("what do more latent dimensions buy?", dict(latent_dim=5)),
    "latent-10": ("and twice as many?", dict(latent_dim=10)),
    "latent-20": ("and the number of many publications?", dict(latent_dim=20)),
    "latent-50": ("are so many used?", dict(latent_dim=50)),
    "long-20": (
        "how good is a VAE of 20 latent dimensions?",
        dict(latent_dim=20, num_epochs=240, kl_warm_up=0.3, distorted=0.5),
    ),
    "long-50": (
        "and of 50?",
        dict(latent_dim=50, num_epochs=240, kl_warm_up=0.3, distorted=0.5),
    ),
    "grey-20": (
        "the figure of torch's own example: 20 latent dimensions, grey pixels, 10 epochs",
        dict(latent_dim=20, binarize="none", num_epochs=10),
    ),
}

# Not with the others of --ablation, which compares short trainings of about the same length.
NOT_COMPARABLE = ("long-20", "long-50", "grey-20")
# What a group of variants is about, by the beginning of their names.
GROUPS = {
    "rate-": "learning rate",
    "batch-": "batch size",
    "layers-": "hidden layers",
    "kl-": "KL term",
    "grey": "training pixels",
    "epochs-": "epochs",
    "latent-": "latent dimensions",
}

PLANE_SIDE = 20
FINE_SIDE = 60  # points of the plane that the classifier judges, along each side
NUM_BOUND_SAMPLES = 500
ABLATION_LENGTH = ["--epochs", "8"]  # but for variants that are about it
ABLATION_BOUND = ["--bound-samples", "20"]
WALKS = ((1, 0), (7, 6))  # digits to walk from and to
WALK_STEPS = 12
ELBO_FORMULA = "-log p(x|z) + KL(q(z|x) || p(z)), mean over images, one draw of z each"
# Test pixels, by how they are made: what keys of metrics.json end in, and what they are.
PROTOCOLS = {
    "stochastic": ("", "dynamically binarised, Bernoulli(x)"),
    "none": ("_grey", "grey, as targets of the cross-entropy"),
    "threshold": ("_threshold", "thresholded, x > 0.5"),
}


def loss_func(model, x, coeff):
    """Negative ELBO of Eq. 2: reconstruction + coeff * KL, in nats, a scalar.

    Both terms are summed over pixels or latent dimensions and averaged over the images x, (N, 1, 28, 28) or
    (N, 784) in [0, 1].
    """
    reconstruction, kl = loss_terms(model, x)
    return reconstruction + coeff * kl


def loss_terms(model, x):
    """The two terms of Eq. 2, reconstruction and KL, each a scalar: nats, the mean over the images x."""
    outputs = model(x)
    reconstruction = reconstruction_loss(outputs["imgs"], x).mean()
    return reconstruction, kl_divergence(outputs["mean"], outputs["logvar"]).mean()


def kl_weight(options, share):
    """The KL term's weight when a share of the training is done (warm-up: Sonderby et al. 2016, arXiv 1602.02282)."""
    warm_up = options["kl_warm_up"]
    return options["kl_coeff"] * (min(1, share / warm_up) if warm_up else 1)


def train(run, model, train_set, test_set):
    """Minimise `loss_func` over uint8 images."""
    options = run.options
    num_epochs, batch_size, how = (options[key] for key in ("num_epochs", "batch_size", "binarize"))
    steps = num_epochs * math.ceil(len(train_set[0]) / batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * min(1, run.share_done(step / steps)))) / 2
    )
    run.start(model=model, optimizer=optimizer, schedule=schedule)
    if run.epoch == run.batch == 0:
        log_epoch(run, model, train_set, test_set, epoch=0)

    for epoch in run.epochs(num_epochs):
        for images, _ in run.progress(batches(*train_set, batch_size, run.order())):
            share = run.share_done(schedule.last_epoch / steps)
            if share < options["distorted_until"]:
                images = distort(images, options["distorted"])
            coeff = kl_weight(options, share)
            loss = loss_func(model, binarize(images, how), coeff)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.add(len(images), loss=loss.item())
        log_epoch(run, model, train_set, test_set, epoch)


def log_epoch(run, model, train_set, test_set, epoch):
    row = dict(loss=run.means().get("loss"))
    # As many training images as test images, after the epoch, so that the two compare.
    for name, (images, _) in (("train", train_set), ("test", test_set)):
        x = binarize(images[: len(test_set[0])], run.options["binarize"])
        reconstruction, kl = evaluate(model, x)
        row |= {
            f"{name}_elbo": -reconstruction - kl,
            f"{name}_reconstruction": reconstruction,
            f"{name}_kl": kl,
        }
    run.log(epoch=epoch, **row)
    run.say(epoch, **row)


@torch.no_grad()
def evaluate(model, x, batch_size=1000):
    """Reconstruction term and KL in nats, means over images x in [0, 1], with one draw of z for each."""
    totals = torch.zeros(2)
    for chunk in x.split(batch_size):
        totals += len(chunk) * torch.stack(loss_terms(model, chunk)).cpu()
    return (totals / len(x)).tolist()


@torch.no_grad()
def posterior_means(model, images, batch_size=1000):
    """The mean of q(z|x) for grey uint8 images: (N, latent_dim)."""
    return torch.cat([model.encode(to_unit(chunk))[0] for chunk in images.split(batch_size)])


def draw_losses(run):
    history = run.history
    panels = []
    for label, column, sign in (
        ("negative ELBO", "elbo", -1),
        ("$-\\log p(x|z)$", "reconstruction", 1),
        ("KL$(q(z|x) \\,\\|\\, p(z))$", "kl", 1),
    ):
        # Before the training the terms are so large that the rest of the curve would be flat.
        curves = {
            name: [None, *(sign * v for v in history[f"{name}_{column}"][1:])] for name in ("train", "test")
        }
        panels.append((f"{label} (nats)", curves, {}))
    plotting.save_curves(run.folder / "loss.png", history["epoch"], panels)


@torch.no_grad()
def draw_reconstructions(run, model, images, labels):
    """Twenty test digits, each over its reconstruction from the posterior mean; the best and the worst of each digit."""
    columns = 10
    x = to_unit(images)
    means = posterior_means(model, images)
    decoded = torch.cat([model.decode(mean) for mean in means.split(1000)])
    loss = reconstruction_loss(decoded, x)
    decoded = decoded.reshape(x.shape)

    first = range(2 * columns)
    rows = [half for some in (first[:columns], first[columns:]) for half in (x[some], decoded[some])]
    plotting.save_images(
        run.folder / "reconstructions.png", torch.cat(rows), columns, ["original", "reconstruction"] * 2
    )
    rows, names = [], []
    for name, sign in (("best", 1), ("worst", -1)):
        order = (sign * loss).argsort()
        chosen = [order[labels[order] == digit][0].item() for digit in labels.unique()]
        rows += [x[chosen], decoded[chosen]]
        names += [f"{name}, original", "reconstruction"]
    plotting.save_images(run.folder / "extremes.png", torch.cat(rows), len(rows[0]), names)


@torch.no_grad()
def draw_walk(run, model, images, labels):
    """From a typical test digit to another in equal steps, between their posterior means and between their pixels."""
    means = posterior_means(model, images)
    share = torch.linspace(0, 1, WALK_STEPS, device=means.device)[:, None]
    rows = []
    for digits in WALKS:
        ends = [typical(means, labels, digit) for digit in digits]
        for start, end, decode in (
            (*means[ends], model.decode),
            (*to_unit(images[ends]).flatten(1), torch.clone),
        ):
            rows.append(decode((1 - share) * start + share * end).reshape(-1, 1, 28, 28))
    plotting.save_images(
        run.folder / "walk.png", torch.cat(rows), WALK_STEPS, ["latent space", "pixels"] * len(WALKS)
    )


def typical(means, labels, digit):
    """Index of the image of a digit whose posterior mean is nearest to the median of that digit's."""
    chosen = (labels == digit).nonzero().flatten()
    return chosen[(means[chosen] - means[chosen].median(0).values).norm(dim=1).argmin()].item()


@torch.no_grad()
def decode_plane(model, side):
    """Decode a side x side grid of quantiles of the prior, z_1 to the right and z_2 upwards: (side^2, 1, 28, 28).

    Further latent dimensions stay at zero, the middle of the prior.
    """
    quantiles = plotting.gaussian_quantiles(side)
    z = torch.zeros(side * side, model.z_size)
    z[:, 0] = quantiles.repeat(side)
    z[:, 1] = quantiles.flip(0).repeat_interleave(side)
    return model.decode(z.to(next(model.parameters()).device)).reshape(-1, 1, 28, 28)


def plot_latent_images(model, path, side=PLANE_SIDE):
    """The latent plane as `decode_plane` gives it."""
    plotting.save_images(path, decode_plane(model, side), side, scale=0.3)


@torch.no_grad()
def draw_posteriors(run, model, images, labels):
    """Where q(z|x) of the test digits lies; of more than two latent dimensions the first two."""
    mean, logvar = model.encode(to_unit(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.args.seed)
        z = model.reparameterize(mean.cpu(), logvar.cpu())
    plotting.save_scatter(
        run.folder / "latent_means.png", mean[:, :2].cpu(), labels.cpu(), "posterior means of the test digits"
    )
    plotting.save_posterior(run.folder / "posterior.png", z[:, :2])


def draw_images(run, model, test_set):
    """Every figure of what the trained model does."""
    for draw in (draw_reconstructions, draw_walk, draw_posteriors):
        draw(run, model, *test_set)
    noise = torch.Generator().manual_seed(run.args.seed)
    plotting.save_images(run.folder / "samples.png", model.sample(100, noise), columns=10)
    plot_latent_images(model, run.folder / "latent_plane.png")
    digits = metrics.classify(decode_plane(model, FINE_SIDE)).reshape(FINE_SIDE, FINE_SIDE)
    plane = decode_plane(model, PLANE_SIDE)
    plotting.save_territories(run.folder / "territories.png", plane, PLANE_SIDE, digits)


def write_metrics(run, model, train_set, test_set):
    """Final figures; those of different pixels are on different scales, stochastic ones on the literature's."""
    (train_images, train_labels), (images, labels) = train_set, test_set
    # A dry run is to be quick.
    few = run.args.dry_run
    num_samples = min(run.args.bound_samples, 5) if few else run.args.bound_samples
    # A run to choose by does without the figures that take long and are not chosen by.
    thorough = not run.args.held_out
    unit, sizes = "nats per image", dict(train_images=len(train_images), test_images=len(images))
    results = {}
    for how in PROTOCOLS if thorough else ("stochastic",):
        suffix, pixels = PROTOCOLS[how]
        x = binarize(images, how, torch.Generator(run.device).manual_seed(0))
        reconstruction, kl = evaluate(model, x)
        bound = -importance_bound(model, x, num_samples).mean().item()
        for name, value, formula, more in (
            ("negative_elbo", reconstruction + kl, ELBO_FORMULA, {}),
            ("reconstruction", reconstruction, "-log p(x|z), one draw of z for each image", {}),
            ("kl", kl, "1/2 sum_j (sigma_j^2 + mu_j^2 - 1 - log sigma_j^2)", {}),
            (
                "bound",
                bound,
                "-log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k from the encoder's q(z|x), mean over images",
                dict(samples=num_samples),
            ),
        ):
            results[f"test_{name}{suffix}"] = runs.metric(
                value, unit, formula, pixels=pixels, **more, **sizes
            )
        if how == "stochastic" and model.z_size == 2 and thorough:
            spacing = 0.2 if few else 0.04
            results["test_nll"] = runs.metric(
                -plane_log_likelihood(model, x, spacing).mean().item(),
                unit,
                "-log of the integral of p(x|z) p(z) over the latent plane, a sum over a grid, mean over images",
                grid_spacing=spacing,
                pixels=pixels,
                **sizes,
            )
    best = max(run.history["test_elbo"])
    results["best_test_negative_elbo"] = runs.metric(
        -best,
        unit,
        ELBO_FORMULA,
        epoch=run.history["test_elbo"].index(best),
        pixels=PROTOCOLS[run.options["binarize"]][1],
        **sizes,
    )

    means, train_means = posterior_means(model, images), posterior_means(model, train_images)
    results["active_units"] = runs.metric(
        float(active_units(means)),
        f"latent dimensions of {model.z_size}",
        "variance over the grey test images of the posterior mean > 0.01",
        **sizes,
    )
    representations = {"neighbour_accuracy": ("posterior means, of grey images", means, train_means)}
    if thorough:
        pixels = ("grey pixels", to_unit(images), to_unit(train_images))
        representations["neighbour_accuracy_pixels"] = pixels
    for name, (what, points, references) in representations.items():
        results[name] = runs.metric(
            metrics.neighbour_accuracy(points, labels, references, train_labels),
            "share of test images",
            f"the nearest training image has the same label, by Euclidean distance of {what}",
            **sizes,
        )
    results |= metrics.judge_sampler(run, model.sample)[1]
    run.finish(**results)


def draw_ablation(folder, folders):
    """ablation.png and kl_weights.png, of the runs in `folders`, by variant."""
    rows = {row["variant"]: row for row in runs.read_csv(folder / "ablation.csv")}
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
    plotting.save_ablation(
        folder / "ablation.png", groups, [(xlabel, series(**keys)) for xlabel, keys in panels]
    )
    weights = {DEFAULTS["kl_coeff"]: folders["default"]} | {
        VARIANTS[name][1]["kl_coeff"]: place
        for name, place in folders.items()
        if name != "default" and list(VARIANTS[name][1]) == ["kl_coeff"]
    }
    models = {weight: load_model(weights[weight] / "model.pt") for weight in sorted(weights)}
    side = 5
    plotting.save_grid_table(
        folder / "kl_weights.png",
        {
            f"weight {weight:g}": (model.sample(side**2), decode_plane(model, side))
            for weight, model in models.items()
        },
        ["samples", "latent plane"],
        side,
    )


def load_model(path, device="cpu"):
    """The VAE of a model.pt, in eval mode."""
    return runs.load_network(path, (STEP,), VAE_model, device)


def main():
    parser = runs.make_parser(__doc__, DEFAULTS)
    parser.add_argument(
        "--kl-coeff", type=runs.non_negative, help=f"weight of the KL term ({DEFAULTS['kl_coeff']})"
    )
    parser.add_argument(
        "--latent-dim",
        type=runs.whole_number(2),
        help=f"latent dimensions, two or more ({DEFAULTS['latent_dim']})",
    )
    parser.add_argument(
        "--bound-samples",
        type=runs.whole_number(1),
        default=NUM_BOUND_SAMPLES,
        metavar="K",
        help=f"samples of each image in the importance-weighted bound ({NUM_BOUND_SAMPLES})",
    )
    args = parser.parse_args()
    options = runs.choose_options(parser, args, DEFAULTS, VARIANTS)
    if args.ablation or args.seeds:
        more = (ABLATION_LENGTH, ABLATION_BOUND, NOT_COMPARABLE)
        folders = ablation.run_all(__file__, STEP, args, VARIANTS, *more)
        if args.ablation:
            draw_ablation(runs.results_folder(STEP, args), folders)
        return
    run = runs.Run(STEP, args, options)
    train_set, full_test_set = load_mnist(args.data_dir, run.device, args.held_out)
    if args.sample_only:
        draw_images(run, load_model(run.folder / "model.pt", run.device), full_test_set)
        print(f"samples in {run.folder}")
        return

    train_set, test_set = run.limit(*train_set), run.limit(*full_test_set)
    network = dict(input_dim=NUM_PIXELS, hidden_dims=[*options["hidden_dims"], 2 * options["latent_dim"]])
    model = VAE_model(**network).to(run.device)
    train(run, model, train_set, test_set)
    runs.save_model(run.folder / "model.pt", STEP, model, network)
    write_metrics(run, model.eval(), train_set, test_set)
    draw_losses(run)
    draw_images(run, model, full_test_set)


if __name__ == "__main__":
    runs.run_main(main)
