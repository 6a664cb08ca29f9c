"""Step 3: a variational autoencoder on MNIST (Kingma & Welling 2014, arXiv 1312.6114).

Encoder q(z|x) and decoder p(x|z) are trained together on the evidence lower bound, Eq. 2 of the assignment:

    ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)).

    python hw2_step3_main.py                                   train with the defaults below
    python hw2_step3_main.py --dry-run                         train on a few batches, to look around
    python hw2_step3_main.py --hidden-dims 128 64 32           train other networks, into a folder of their own
    python hw2_step3_main.py --sample-only                     draw the figures of the trained model
    python hw2_step3_main.py --ablation                        train the default with three seeds, each variant with two

Writes into results/step3_vae/:
    loss.png              negative ELBO and its two terms over the epochs, training and test
    samples.png           images decoded from the prior
    priors.png            images of the prior, of a prior fitted to the codes, and of codes of test images
    latent_plane.png      the latent plane, decoded at quantiles of the prior
    latent_means.png      the posterior means of the test digits, coloured by digit
    reconstructions.png   test images above their reconstructions
    walk.png              from one test digit to another, in the latent space and in pixels
    posterior.png         the bound's gaps: one true posterior and its q, then many images (two latent dimensions)
    losses.csv, batches.csv, per_image.npz, metrics.json, config.json, model.pt, prior.pt
and after --ablation:
    ablation.png          metrics of all variants, means over the seeds
    kl_weights.png        samples and latent plane at each weight of the KL term
    ablation.csv          the metrics as a table
"""

import math
import sys
from typing import Annotated, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from models.common import NUM_PIXELS
from models.VAE import VAE_model, loss_terms
from utils import cli, data, files, machine, plotting, prior, vae_results
from utils.options import Fraction, number
from utils.vae_results import evaluate

STEP = "step3_vae"
Binarize = Literal["stochastic", "threshold", "none"]

VARIANTS = {
    "rate-1e-4": ("the lower end of the handout's learning rates", dict(learning_rate=1e-4)),
    "rate-1e-3": ("are the usual steps large enough?", dict(learning_rate=1e-3)),
    "rate-1e-2": ("the upper end of the handout's learning rates", dict(learning_rate=1e-2)),
    "batch-64": ("does twice the number of steps pay?", dict(batch_size=64)),
    "batch-256": ("is the usual larger batch as good?", dict(batch_size=256)),
    "layers-256-128-64": ("layers that narrow towards the latent plane?", dict(hidden_dims=(256, 128, 64))),
    "layers-16-16-16": ("how small may the layers be?", dict(hidden_dims=(16, 16, 16))),
    "layers-32-32-32": ("twice as wide?", dict(hidden_dims=(32, 32, 32))),
    "layers-64-64-64": ("and twice as wide?", dict(hidden_dims=(64, 64, 64))),
    "layers-128-128-128": ("do the widest layers need all their units?", dict(hidden_dims=(128, 128, 128))),
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
    "long-20": ("and 20 trained longer?", dict(latent_dim=20, num_epochs=240, kl_warm_up=0.3, distorted=0.5)),
    "grey-20": ("torch's own example", dict(latent_dim=20, binarize="none", num_epochs=10)),
}

# Each run has eight epochs, unless its variant is about the length, and few samples in the importance bound.
ABLATION = dict(length=("--epochs", "8"), flags=("--bound-samples", "20"), left_out=("long-20", "grey-20"))


def loss_func(model, x, coeff):
    """Return reconstruction + coeff * KL in nats per image, for coeff = 1 the negative ELBO of Eq. 2.

    Other weights make it the loss of a beta-VAE (Higgins et al. 2017). Both terms are summed over pixels or latent
    dimensions, and averaged over the images x, (N, 1, 28, 28) or (N, 784) in [0, 1].
    """
    reconstruction, kl = loss_terms(model, x)
    return reconstruction + coeff * kl


# Each argument after * is also a flag (num_epochs is --epochs). Annotated has its type, its --help text and sometimes
# a range. Fraction is a number from 0 to 1 (utils/options.py).
def train(
    run,
    train_set,
    test_set,
    *,
    num_epochs: Annotated[int, "passes over the training images"] = 120,
    batch_size: Annotated[int, "images in a batch"] = 128,
    learning_rate: Annotated[float, "learning rate of Adam, falling to zero along a cosine"] = 3e-3,
    clip_norm: Annotated[float, "longer gradients are scaled down to this norm"] = 200.0,
    kl_coeff: Annotated[float, "weight of the KL term; with 1 the loss is -ELBO"] = 1.0,
    kl_warm_up: Annotated[Fraction, "share of the training in which the KL weight rises from 0"] = 0.0,
    binarize: Annotated[Binarize, "Bernoulli(x) draws, x > 0.5, or x"] = "stochastic",
    distorted: Annotated[Fraction, "share of training images that are rotated, scaled and sheared"] = 0.0,
    distorted_until: Annotated[Fraction, "share of the training after which no image is distorted"] = 0.9,
    latent_dim: Annotated[int, (2, math.inf), "latent dimensions, two for the latent plane"] = 2,
    hidden_dims: Annotated[tuple[int, ...], "units of the encoder's layers"] = (256, 256, 256),
):
    """Minimise `loss_func` over uint8 images (N, 1, 28, 28); return the model."""
    train_images, _ = train_set
    num_steps = num_epochs * math.ceil(len(train_images) / batch_size)
    model = VAE_model(NUM_PIXELS, [*hidden_dims, 2 * latent_dim]).to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * run.fraction_done(step / num_steps))) / 2
    )
    # `run` (utils/run.py) shuffles the images, counts batches from 1 in run.iteration, averages what run.record gets
    # and stops at NaN. Checkpoints hold what is named here, and --resume restores it. run.is_new: no batch so far.
    run.resume_or_start(model=model, optimizer=optimizer, schedule=schedule)
    if run.is_new:
        log_epoch(run, model, train_set, test_set)

    for _ in run.epochs(num_epochs):
        for (images,) in run.batches(train_images, batch_size=batch_size):
            fraction_done = run.fraction_done((run.iteration - 1) / num_steps)
            if fraction_done < distorted_until:
                images = data.distort(images, distorted)
            x = data.binarize(images, binarize)
            loss = loss_func(model, x, kl_weight(kl_coeff, kl_warm_up, fraction_done))
            optimizer.zero_grad()
            loss.backward()
            # Now and then one image has a log-variance far above the others, and exp(logvar) a huge gradient.
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            schedule.step()
            run.record(loss=loss)
        log_epoch(run, model, train_set, test_set)
    return model


def kl_weight(kl_coeff, warm_up, fraction_done):
    """Return the weight of the KL term, which rises during the warm-up (Sonderby et al. 2016, arXiv 1602.02282)."""
    return kl_coeff if warm_up == 0 else kl_coeff * min(1, fraction_done / warm_up)


def log_epoch(run, model, train_set, test_set):
    """Add a row to losses.csv and print it: both terms for the test images and as many training images."""
    row = dict(loss=run.pop_means().get("loss"))
    for name, (images, _) in (("train", train_set), ("test", test_set)):
        with machine.seeded(run.device):  # the same draws after every epoch
            x = data.binarize(images[: len(test_set[0])], run.options["binarize"])
            reconstruction, kl = evaluate(model, x)
        row[f"{name}_elbo"] = -reconstruction - kl
        row[f"{name}_reconstruction"] = reconstruction
        row[f"{name}_kl"] = kl
    run.log(epoch=run.epochs_done, **row)
    shown = {f"{name} -ELBO": -row[f"{name}_elbo"] for name in ("train", "test")}
    run.print_epoch(shown, "nats per image")


def plot_latent_images(model, path="latent_plane.png", n=vae_results.PLANE_SIDE, device=None):
    """Draw the latent plane, decoded at n x n quantiles of the prior. The handout's call names n second."""
    if isinstance(path, int):
        path, n = "latent_plane.png", path
    plotting.save_latent_plane(path, vae_results.decode_plane(model, n), n)


def load_model(path, device="cpu"):
    """Return the VAE of a model.pt, in eval mode."""
    return files.load_network(path, (STEP,), VAE_model, device)


def train_and_evaluate(run, train_set, test_set):
    test_subset = run.limit(*test_set)  # all of it; a few batches in a dry run
    model = train(run, train_set, test_subset, **run.options).eval()
    encoder_dims = [*run.options["hidden_dims"], 2 * run.options["latent_dim"]]
    run.save_model(model, input_dim=NUM_PIXELS, hidden_dims=encoder_dims)
    run.draw("loss.png", vae_results.draw_losses, run.tables["losses"], run.tables["batches"])
    fitted, entries = prior.fit(run, model, train_set[0])
    vae_results.draw_figures(run, model, *test_set, fitted)
    vae_results.write_metrics(run, model, train_set, test_subset, fitted, entries)


def sample(run, path, test_set):
    fitted = prior.load_prior(path) if run.args.prior == "fitted" else None
    vae_results.draw_figures(run, load_model(path, run.device), *test_set, fitted)


def draw_ablation(folder, folders):
    vae_results.draw_ablation(folder, folders, VARIANTS, load_model)


def add_flags(group):
    what = "samples for each image in the importance-weighted bound (500, or 20 after fewer than 10 epochs)"
    group.add_argument("--bound-samples", type=number(1), metavar="K", help=what)
    what = "prior of samples.png; fitted: a mixture, to the codes"
    group.add_argument("--prior", choices=["standard", "fitted"], default="standard", help=what)


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    return cli.main(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
