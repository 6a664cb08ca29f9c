"""Step 1: a generative adversarial network on MNIST (Goodfellow et al. 2014, arXiv 1406.2661).

Two fully connected networks play the game of Eq. 1: the discriminator learns to tell images from the
generator's, the generator learns to pass.

    python hw2_step1_main.py                  train with the defaults below
    python hw2_step1_main.py --dry-run        a few batches, to look around
    python hw2_step1_main.py --sample-only    draw from the trained generator

Writes into results/step1_gan/:
    loss.png               both losses, D(x) and D(G(z)) over the iterations, with the optimum's lines
    samples.png            images of the trained generator
    samples_by_epoch.png   images of the same noise, from before the training to its end
    losses.csv, metrics.json, config.json, model.pt (the generator)
"""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.GAN import Discriminator, Generator, train_discriminator, train_generator
from utils import ablation, plotting, runs
from utils.data import batches, load_mnist, to_symmetric

STEP = "step1_gan"

DEFAULTS = dict(
    num_epochs=100,  # passes over the 60,000 training images
    batch_size=128,  # the handout's
    dim_z=100,  # dimensions of the noise, the handout's
    d_learning_rate=4e-4,
    g_learning_rate=1e-3,  # above the discriminator's, whose task is the easier one
    d_freq=1,  # discriminator updates for one generator update
    g_channels=(64, 128, 256),  # the assignment's
    d_channels=(256, 128, 64),  # the assignment's
    dropout=0.3,  # of the discriminator's hidden units
    real_label=1.0,  # below 1 it is one-sided label smoothing
    ema_decay=0.999,  # of the average of the generator's weights, which is what is sampled
)

VARIANTS = {
    "wide-generator": (
        "does a generator with twice the channels draw better?",
        dict(g_channels=(128, 256, 512)),
    ),
    "deep-generator": ("does one more layer help the generator?", dict(g_channels=(64, 128, 256, 512))),
    "no-dropout": ("what does the discriminator's dropout do?", dict(dropout=0.0)),
    "equal-rates": ("what if both networks learn at the same rate?", dict(g_learning_rate=4e-4)),
    "d-freq-2": ("is a discriminator updated twice as often a better teacher?", dict(d_freq=2)),
    "label-smoothing": ("what does one-sided label smoothing do?", dict(real_label=0.9)),
}

SAMPLE_COLUMNS = 10
STRIP_ROWS = 8  # epochs shown in samples_by_epoch.png


def train_main_loop(
    run,
    images,
    labels,
    batch_size,
    dim_z,
    num_epochs,
    d_learning_rate,
    g_learning_rate,
    d_freq,
    g_channels,
    d_channels,
    dropout,
    real_label,
    ema_decay,
):
    """Train on (N, 1, 28, 28) uint8 images; returns the averaged generator."""
    device = run.device
    generator = Generator(dim_z, g_channels).to(device)
    discriminator = Discriminator(d_channels, dropout).to(device)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=g_learning_rate, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=d_learning_rate, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    run.start(
        generator=generator,
        discriminator=discriminator,
        averaged=averaged,
        g_optimizer=g_optimizer,
        d_optimizer=d_optimizer,
    )
    if run.epoch == run.batch == 0:
        monitor_images(run, averaged.module, epoch=0)

    for epoch in run.epochs(num_epochs):
        loader = batches(images, labels, batch_size, run.order())
        for x, _ in run.progress(loader):
            iteration = run.epoch * len(loader) + run.batch + 1
            x = to_symmetric(x)
            fake_images = generator(torch.randn(len(x), dim_z, device=device))
            _, outputs_real, outputs_fake, d_loss_fake = train_discriminator(
                discriminator, d_optimizer, x, fake_images, criterion, device, real_label
            )
            row = dict(
                # The loss of Eq. 1, whatever label the discriminator was trained towards.
                d_loss=(criterion(outputs_real, torch.ones_like(outputs_real)) + d_loss_fake).item(),
                g_loss=None,
                d_real=outputs_real.sigmoid().mean().item(),
                d_fake=outputs_fake.sigmoid().mean().item(),
            )
            if iteration % d_freq == 0:
                outputs = discriminator(fake_images)
                g_loss, _ = train_generator(generator, g_optimizer, outputs, criterion, device)
                averaged.update_parameters(generator)
                row["g_loss"] = g_loss.item()
            run.add(len(x), **row)
            run.log(iteration=iteration, epoch=epoch, **row)
        monitor_images(run, averaged.module, epoch)
        run.say(epoch, **run.means())
    return averaged.module


def monitor_images(run, generator, epoch):
    """Keep images of the same noise for samples_by_epoch.png."""
    images = generator.eval().sample(SAMPLE_COLUMNS).cpu()
    run.snapshots[epoch] = (images * 255).to(torch.uint8)


def monitor_losses(run):
    """loss.png, with what the theory expects where p_g = p_data (Goodfellow et al. 2014, section 4.1)."""
    history = run.history
    iterations_per_epoch = max(history["iteration"]) // run.epoch
    x = [iteration / iterations_per_epoch for iteration in history["iteration"]]
    losses = {"discriminator": history["d_loss"], "generator": history["g_loss"]}
    optimum = {"discriminator's optimum, log 4": math.log(4), "generator's optimum, log 2": math.log(2)}
    outputs = {"$D(x)$": history["d_real"], "$D(G(z))$": history["d_fake"]}
    panels = [
        ("loss (nats)", losses, optimum),
        ("discriminator's mean output", outputs, {"optimum, 1/2": 0.5}),
    ]
    plotting.save_curves(run.folder / "loss.png", x, panels, smooth=iterations_per_epoch)


def draw_samples(run, generator):
    noise = torch.Generator().manual_seed(run.args.seed)
    plotting.save_images(
        run.folder / "samples.png", generator.sample(10 * SAMPLE_COLUMNS, noise), SAMPLE_COLUMNS
    )


def draw_strip(run):
    """samples_by_epoch.png: a row for each of up to STRIP_ROWS epochs, early ones closer together."""
    last = max(run.snapshots)
    shown = sorted(
        {round(last * (row / (STRIP_ROWS - 1)) ** 2) for row in range(STRIP_ROWS)} | {min(1, last)}
    )
    images = torch.cat([run.snapshots[epoch] for epoch in shown]) / 255
    plotting.save_images(
        run.folder / "samples_by_epoch.png", images, SAMPLE_COLUMNS, [f"epoch {epoch}" for epoch in shown]
    )


def write_metrics(run, images):
    """Means over the images of the last epoch; a GAN has no likelihood to report."""
    sizes = [len(batch) for batch in images.split(run.options["batch_size"])]
    protocol = dict(train_images=len(images), over=f"epoch {run.epoch}, dropout active in the discriminator")

    def mean(name):
        pairs = [(v, n) for v, n in zip(run.history[name][-len(sizes) :], sizes) if v is not None]
        return sum(value * size for value, size in pairs) / sum(size for _, size in pairs)

    run.finish(
        d_loss=runs.metric(
            mean("d_loss"), "nats", "-log D(x) - log(1 - D(G(z)))", optimum=math.log(4), **protocol
        ),
        g_loss=runs.metric(mean("g_loss"), "nats", "-log D(G(z))", optimum=math.log(2), **protocol),
        d_real=runs.metric(mean("d_real"), "probability", "D(x)", optimum=0.5, **protocol),
        d_fake=runs.metric(mean("d_fake"), "probability", "D(G(z))", optimum=0.5, **protocol),
    )


def load_model(path, device="cpu"):
    """The generator of a model.pt, in eval mode."""
    return runs.load_network(path, (STEP,), Generator, device)


def main():
    parser = runs.make_parser(__doc__, DEFAULTS)
    parser.add_argument(
        "--d-freq",
        type=runs.whole_number(1),
        help=f"discriminator updates for one generator update ({DEFAULTS['d_freq']})",
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

    (images, labels), _ = load_mnist(args.data_dir, run.device, args.held_out)
    images, labels = run.limit(images, labels)
    generator = train_main_loop(run, images, labels, **options)
    network = dict(dim_z=options["dim_z"], channels=options["g_channels"])
    runs.save_model(run.folder / "model.pt", STEP, generator, network)
    write_metrics(run, images)
    monitor_losses(run)
    draw_strip(run)
    draw_samples(run, generator)


if __name__ == "__main__":
    runs.run_main(main)
