"""Step 1: a generative adversarial network on MNIST (Goodfellow et al. 2014, arXiv 1406.2661).

Two fully connected networks play the game of the assignment's Eq. 1,

    min_G max_D  E[log D(x)] + E[log(1 - D(G(z)))].

The discriminator D learns to tell real images x from generated ones G(z), and the generator G learns to fool it.

    python hw2_step1_main.py                       train with the defaults below
    python hw2_step1_main.py --dry-run             train on a few batches, to look around
    python hw2_step1_main.py --dropout 0.4         train with another hyperparameter, into a folder of its own
    python hw2_step1_main.py --sample-only         draw from the trained generator
    python hw2_step1_main.py --ablation            train the default with three seeds, each variant with two

Writes into results/step1_gan/:
    loss.png                    both losses, D(x) and D(G(z)) over the epochs, and their values for p_g = p_data
    samples.png                 images of the trained generator
    quality.png                 metrics of the samples over the epochs
    samples_by_epoch.png        images of the same noise, from before the training to its end
    neighbours.png              generated images above the training images nearest to them
    walk.png                    from one noise vector to another, a row for each pair
    losses.csv, epochs.csv, quality.csv, metrics.json, config.json, model.pt (the generator)
and after --ablation:
    ablation.png                D(x), D(G(z)) and samples of all variants
    ablation_metrics.png        metrics of the samples, means over the seeds, without those off the scale
    ablation.csv                the same and other metrics as a table
"""

import copy
import sys
from functools import partial
from typing import Annotated, Literal

import torch
from torch import nn

from models.GAN import Discriminator, Generator, relativistic_logits, train_discriminator, train_generator
from utils import cli, files, gan_results
from utils.data import to_symmetric
from utils.options import LARGEST, Fraction, build

STEP = "step1_gan"

VARIANTS = {
    "wide-generator": ("does a generator of twice the width draw better?", dict(g_channels=(128, 256, 512))),
    "deep-generator": ("does a fourth layer help the generator?", dict(g_channels=(64, 128, 256, 256))),
    "deep-discriminator": ("is a deeper one a better teacher?", dict(d_channels=(256, 256, 128, 64))),
    "no-dropout": ("what does the discriminator's dropout do beside the penalty?", dict(dropout=0.0)),
    "dropout-30": ("is three times the dropout better?", dict(dropout=0.3)),
    "dropout-50": ("does more dropout hold the discriminator back too much?", dict(dropout=0.5)),
    "no-penalty": ("what do R1 and R2 do (Mescheder et al. 2018, arXiv 1801.04406)?", dict(penalty=0.0)),
    "penalty-0.1": ("is ten times the penalty better?", dict(penalty=0.1)),
    "penalty-1": ("is a hundred times the penalty too much?", dict(penalty=1.0)),
    "high-rates": ("what if both take larger steps?", dict(d_learning_rate=2e-3, g_learning_rate=2e-3)),
    "low-rates": ("what if both take smaller steps?", dict(d_learning_rate=4e-4, g_learning_rate=4e-4)),
    "fast-generator": ("what if the discriminator takes smaller steps?", dict(d_learning_rate=4e-4)),
    "fast-discriminator": ("what if the generator takes smaller steps?", dict(g_learning_rate=4e-4)),
    "d-freq-2": ("is a discriminator updated twice as often a better teacher?", dict(d_freq=2)),
    "no-average": ("what does the average of the generator's weights do?", dict(ema_decay=0.0)),
    "relativistic": ("is the loss of Huang et al. (arXiv 2501.05441) better?", dict(loss="relativistic")),
    "noise-100": ("is the usual noise of 100 dimensions better?", dict(dim_z=100)),
    "kinds-10": ("does noise with ten kinds keep digits apart?", dict(dim_z=26, kinds=10)),
    "plain": (
        "how good is a GAN without our additions?",
        dict(
            batch_size=128,
            d_learning_rate=2e-4,
            g_learning_rate=2e-4,
            dropout=0.3,
            penalty=0.0,
            ema_decay=0.0,
            dim_z=100,
        ),
    ),
}


# Each argument after * is also a flag (num_epochs is --epochs). Annotated has its type, its --help text and sometimes
# a range. Fraction is a number from 0 to 1 (utils/options.py).
def train_main_loop(
    run,
    images,
    test_images,
    *,
    num_epochs: Annotated[int, "passes over the training images"] = 50,
    batch_size: Annotated[int, "images in a batch"] = 32,
    d_learning_rate: Annotated[float, "learning rate of the discriminator"] = 1e-3,
    g_learning_rate: Annotated[float, "learning rate of the generator"] = 1e-3,
    d_freq: Annotated[int, "updates of the discriminator for each of the generator"] = 1,
    loss: Annotated[Literal["non-saturating", "saturating", "relativistic"], "loss"] = "non-saturating",
    penalty: Annotated[float, "weight of the gradient penalty R1 + R2"] = 0.01,
    penalty_every: Annotated[int, "every n-th update of the discriminator has the penalty"] = 4,
    ema_decay: Annotated[Fraction, "decay of the average of the generator's weights; 0: none"] = 0.9998,
    dropout: Annotated[Fraction, "dropout in the discriminator D"] = 0.1,
    dim_z: Annotated[int, "dimensions of the noise z"] = 16,
    kinds: Annotated[int, (0, LARGEST), "the last so many coordinates of z become one-hot; 0: none"] = 0,
    g_channels: Annotated[tuple[int, ...], "units of G's hidden layers"] = (64, 128, 256),
    d_channels: Annotated[tuple[int, ...], "units of D's hidden layers"] = (256, 128, 64),
):
    """Train on uint8 images (N, 1, 28, 28); return the generator with averaged (EMA) weights."""
    generator = build(Generator, dim_z=dim_z, channels=g_channels, kinds=kinds).to(run.device)
    discriminator = build(Discriminator, channels=d_channels, dropout=dropout).to(run.device)
    ema = copy.deepcopy(generator)  # its weights are a moving average, which draws better samples
    adam = dict(betas=(0.5, 0.999), fused=True)  # betas of Radford et al. 2016, arXiv 1511.06434
    g_optimizer = torch.optim.Adam(generator.parameters(), g_learning_rate, **adam)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), d_learning_rate, **adam)
    criterion = nn.BCEWithLogitsLoss()
    # `run` (utils/run.py) shuffles the images, counts batches from 1 in run.iteration, averages what run.record gets
    # and stops at NaN. Checkpoints hold what is named here, and --resume restores it. run.is_new: no batch so far.
    networks = dict(generator=generator, discriminator=discriminator, ema=ema)
    run.resume_or_start(**networks, g_optimizer=g_optimizer, d_optimizer=d_optimizer)
    if run.is_new:
        monitor_images(run, ema, discriminator, images, test_images)

    for _ in run.epochs(num_epochs):
        for (batch,) in run.batches(images, batch_size=batch_size):
            x = to_symmetric(batch)
            fake_images = generator(torch.randn(len(x), dim_z, device=run.device))  # D's step detaches them
            # The penalty costs a second backward pass, so every n-th update has it, n-fold (lazy regularisation).
            penalty_weight = penalty * penalty_every if run.iteration % penalty_every == 0 else 0.0
            d_loss, outputs_real, outputs_fake, _ = train_discriminator(
                discriminator, d_optimizer, x, fake_images, criterion, run.device,
                relativistic=(loss == "relativistic"), penalty=penalty_weight,
            )  # fmt: skip
            g_loss = None
            if run.iteration % d_freq == 0:
                # g_optimizer holds the generator's weights alone, so D stays as it is.
                g_loss, _ = train_generator(
                    generator, g_optimizer, discriminator(fake_images), criterion, run.device,
                    saturating=(loss == "saturating"),
                    outputs_real=discriminator(x) if loss == "relativistic" else None,
                )  # fmt: skip
                update_average(ema, generator, ema_decay, num_updates=run.iteration // d_freq)
            if loss == "relativistic":
                outputs_real, outputs_fake = relativistic_logits(outputs_real, outputs_fake)
            d_real, d_fake = outputs_real.sigmoid().mean(), outputs_fake.sigmoid().mean()
            run.record_row(d_loss=d_loss, g_loss=g_loss, d_real=d_real, d_fake=d_fake)
        monitor_images(run, ema, discriminator, images, test_images)
    return ema


@torch.no_grad()
def update_average(ema, generator, decay, num_updates):
    """Update the exponential moving average (EMA) of the generator's weights after so many updates of the generator.

    The decay rises: it is 0 at first, 2/11 then, and 0.9 after 81 updates. So early averages follow the weights, and
    early samples show what was learnt.
    """
    kept = min(decay, num_updates / (9 + num_updates)) if num_updates > 1 else 0.0
    for average, weight in zip(ema.parameters(), generator.parameters()):
        average.lerp_(weight, 1 - kept)
    for average, value in zip(ema.buffers(), generator.buffers()):  # which only a generator of your own has
        average.copy_(value)


def monitor_images(run, generator, discriminator, images, test_images):
    """Keep images of the same noise for figures of the training; print the means of the epoch, with warnings.

    Every ten epochs and at the end also measure the quality of samples and what D, without dropout, gives images of
    the training and the test set, for quality.csv and quality.png.
    """
    epoch = run.epochs_done
    run.snapshot(gan_results.sample_images(generator, gan_results.NUM_SNAPSHOT))
    if epoch == 0:
        return
    if epoch % 10 == 0 or run.is_last():
        gan_results.log_quality(run, generator, discriminator, images, test_images)
    means, labels = run.pop_means(), gan_results.labels(run.options["loss"])
    run.log("epochs", epoch=epoch, **{name: means.get(name) for name in labels})
    warnings = gan_results.find_trouble(generator, means["d_real"], means["d_fake"], run.args.dataset)
    run.print_epoch({labels[name]: value for name, value in means.items()}, *warnings)


def monitor_losses(run):
    """Draw loss.png: the losses and mean outputs of D, beside their values for p_g = p_data."""
    run.draw("loss.png", gan_results.draw_losses, run.tables["losses"], run.options)


def load_model(path, device="cpu"):
    """Return the generator of a model.pt, in eval mode."""
    return files.load_network(path, (STEP,), partial(build, Generator), device)


def train_and_evaluate(run, train_set, test_set):
    (images, _), (test_images, _) = train_set, test_set
    if run.options["kinds"] > run.options["dim_z"]:
        raise files.UserError(f"--kinds {run.options['kinds']} is more than --dim-z {run.options['dim_z']}")
    generator = train_main_loop(run, images, test_images, **run.options)
    dim_z, channels, kinds = (run.options[name] for name in ("dim_z", "g_channels", "kinds"))
    run.save_model(generator, dim_z=dim_z, channels=channels, kinds=kinds)
    monitor_losses(run)
    gan_results.draw_samples(run, generator)
    gan_results.draw_figures(run, generator, images)
    gan_results.write_metrics(run, generator, images)


def sample(run, path, test_set):
    gan_results.draw_samples(run, load_model(path, run.device))


def draw_ablation(folder, folders):
    gan_results.draw_ablation(folder / "ablation.png", folders, load_model)


train = train_main_loop  # the name that utils/cli.py looks for


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    return cli.main(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
