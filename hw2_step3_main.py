"""Step 3: a variational autoencoder on MNIST (Kingma & Welling 2014, arXiv 1312.6114).

Encoder and decoder are trained together on the evidence lower bound of Eq. 2.

    python hw2_step3_main.py                  train with the defaults below
    python hw2_step3_main.py --dry-run        a few batches, to look around
    python hw2_step3_main.py --sample-only    draw from the trained decoder

Writes into results/step3_vae/:
    loss.png              negative ELBO and its two terms over the epochs, training and test
    reconstructions.png   test digits over their reconstructions
    latent_plane.png      the latent plane, decoded at quantiles of the prior
    latent_means.png      the posterior means of the test digits, coloured by digit
    samples.png           digits decoded from the prior
    losses.csv, metrics.json, config.json, model.pt
"""

import torch

from models.VAE import VAE_model, kl_divergence, reconstruction_loss
from utils import ablation, plotting, runs
from utils.data import batches, binarize, load_mnist, to_unit

STEP = "step3_vae"
NUM_PIXELS = 28 * 28

DEFAULTS = dict(
    num_epochs=100,  # passes over the 60,000 training images
    batch_size=128,
    learning_rate=1e-3,  # falling to zero along a cosine
    kl_coeff=1.0,  # weight of the KL term; 1 is the ELBO
    latent_dim=2,  # two, so that the latent plane can be looked at
    hidden_dims=(256, 256, 256),  # of the encoder, the decoder mirrors them; out of the assignment's set
    binarize="stochastic",  # training pixels: a fresh Bernoulli(x) draw at each step, or "none" for grey
)

VARIANTS = {
    "grey": ("does it matter that the training pixels are binary?", dict(binarize="none")),
    "weak-kl": ("what does the KL term do?", dict(kl_coeff=0.1)),
    "latent-20": ("what do more latent dimensions buy?", dict(latent_dim=20)),
    "small-layers": ("how small may the layers be?", dict(hidden_dims=(128, 64, 32))),
}

PLANE_SIDE = 20
ELBO_FORMULA = "-log p(x|z) + KL(q(z|x) || p(z)), mean over images, one draw of z each"


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


def train(run, model, train_set, test_set):
    """Minimise `loss_func` over uint8 images."""
    options = run.options
    num_epochs, batch_size, how = (options[key] for key in ("num_epochs", "batch_size", "binarize"))
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
    run.start(model=model, optimizer=optimizer, schedule=schedule)
    if run.epoch == run.batch == 0:
        log_epoch(run, model, train_set, test_set, epoch=0)

    for epoch in run.epochs(num_epochs):
        for x, _ in run.progress(batches(*train_set, batch_size, run.order())):
            loss = loss_func(model, binarize(x, how), options["kl_coeff"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add(len(x), loss=loss.item())
        schedule.step()
        log_epoch(run, model, train_set, test_set, epoch)


def log_epoch(run, model, train_set, test_set, epoch):
    row = dict(loss=run.means().get("loss"))
    # As many training images as test images, after the epoch, so that the two compare.
    for name, (images, _) in (("train", train_set), ("test", test_set)):
        reconstruction, kl = evaluate(model, images[: len(test_set[0])], run.options["binarize"])
        row |= {
            f"{name}_elbo": -reconstruction - kl,
            f"{name}_reconstruction": reconstruction,
            f"{name}_kl": kl,
        }
    run.log(epoch=epoch, **row)
    run.say(epoch, **row)


@torch.no_grad()
def evaluate(model, images, how, batch_size=1000):
    """Reconstruction term and KL in nats, means over uint8 images, with one draw of z for each."""
    totals = torch.zeros(2)
    for x in images.split(batch_size):
        totals += len(x) * torch.stack(loss_terms(model, binarize(x, how))).cpu()
    return (totals / len(images)).tolist()


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
def draw_reconstructions(run, model, images):
    """Twenty test digits in two rows, each over its reconstruction from the posterior mean."""
    columns = 10
    x = to_unit(images[: 2 * columns])
    mean, _ = model.encode(x)
    decoded = model.decode(mean).reshape(x.shape)
    rows = [half for pair in zip(x.split(columns), decoded.split(columns)) for half in pair]
    plotting.save_images(
        run.folder / "reconstructions.png",
        torch.cat(rows),
        columns,
        ["original", "reconstruction"] * (len(rows) // 2),
    )


@torch.no_grad()
def plot_latent_images(model, path, side=PLANE_SIDE):
    """Decode a side x side grid of quantiles of the prior, z_1 to the right and z_2 upwards.

    Further latent dimensions stay at zero, the middle of the prior.
    """
    quantiles = plotting.gaussian_quantiles(side)
    z = torch.zeros(side * side, model.z_size)
    z[:, 0] = quantiles.repeat(side)
    z[:, 1] = quantiles.flip(0).repeat_interleave(side)
    images = model.decode(z.to(next(model.parameters()).device)).reshape(-1, 1, 28, 28)
    plotting.save_images(path, images, side, scale=0.3)


@torch.no_grad()
def draw_means(run, model, images, labels):
    mean, _ = model.encode(to_unit(images))
    plotting.save_scatter(
        run.folder / "latent_means.png", mean[:, :2].cpu(), labels.cpu(), "posterior means of the test digits"
    )


def draw_samples(run, model):
    noise = torch.Generator().manual_seed(run.args.seed)
    plotting.save_images(run.folder / "samples.png", model.sample(100, noise), columns=10)
    plot_latent_images(model, run.folder / "latent_plane.png")


def write_metrics(run, model, train_set, test_set):
    """Final figures on both scales: binary pixels, that of the literature, and grey ones."""
    metrics = {}
    for how, protocol in (("stochastic", "dynamically binarised"), ("none", "grey pixels as targets")):
        sizes = dict(pixels=protocol, train_images=len(train_set[0]), test_images=len(test_set[0]))
        reconstruction, kl = evaluate(model, test_set[0], how)
        for name, value, formula in (
            ("negative_elbo", reconstruction + kl, ELBO_FORMULA),
            ("reconstruction", reconstruction, "-log p(x|z)"),
            ("kl", kl, "1/2 sum_j (sigma_j^2 + mu_j^2 - 1 - log sigma_j^2)"),
        ):
            key = f"test_{name}" if how == "stochastic" else f"test_{name}_grey"
            metrics[key] = runs.metric(value, "nats per image", formula, **sizes)
    best = max(run.history["test_elbo"])
    metrics["best_test_negative_elbo"] = runs.metric(
        -best,
        "nats per image",
        ELBO_FORMULA,
        epoch=run.history["test_elbo"].index(best),
        pixels=run.options["binarize"],
        train_images=len(train_set[0]),
        test_images=len(test_set[0]),
    )
    run.finish(**metrics)


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
    args = parser.parse_args()
    options = runs.choose_options(parser, args, DEFAULTS, VARIANTS)
    if args.ablation or args.seeds:
        return ablation.run_all(__file__, STEP, args, VARIANTS)
    run = runs.Run(STEP, args, options)
    if args.sample_only:
        draw_samples(run, load_model(run.folder / "model.pt", run.device))
        print(f"samples in {run.folder}")
        return

    train_set, (test_images, test_labels) = load_mnist(args.data_dir, run.device, args.held_out)
    train_set, test_set = run.limit(*train_set), run.limit(test_images, test_labels)
    network = dict(input_dim=NUM_PIXELS, hidden_dims=[*options["hidden_dims"], 2 * options["latent_dim"]])
    model = VAE_model(**network).to(run.device)
    train(run, model, train_set, test_set)
    runs.save_model(run.folder / "model.pt", STEP, model, network)
    write_metrics(run, model.eval(), train_set, test_set)
    draw_losses(run)
    draw_reconstructions(run, model, test_images)
    draw_means(run, model, test_images, test_labels)
    draw_samples(run, model)


if __name__ == "__main__":
    runs.run_main(main)
