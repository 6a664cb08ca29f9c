"""Step 1: a generative adversarial network on MNIST (Goodfellow et al. 2014, arXiv 1406.2661).

Two fully connected networks play the game of Eq. 1: the discriminator learns to tell images from the
generator's, the generator learns to pass.

    python hw2_step1_main.py                  train with the defaults below
    python hw2_step1_main.py --dry-run        a few batches, to look around
    python hw2_step1_main.py --sample-only    draw from the trained generator
    python hw2_step1_main.py --ablation       every variant, three seeds, 2.5 minutes each

Writes into results/step1_gan/:
    loss.png                    both losses, D(x) and D(G(z)) over the iterations, with the optimum's lines
    samples.png                 images of the trained generator
    samples_by_epoch.png        images of the same noise, from before the training to its end
    neighbours.png              images of the generator above the training images nearest to them
    optimal_discriminator.png   a trained discriminator over the formula of the optimal one, in one dimension
    losses.csv, metrics.json, config.json, model.pt (the generator)
    ablation.csv, ablation.png  figures, curves and samples of all variants, with --ablation
"""

import json
import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.GAN import Discriminator, Generator, train_discriminator, train_generator
from utils import ablation, metrics, plotting, runs, theory
from utils.data import batches, load_mnist, to_symmetric, to_unit

STEP = "step1_gan"

DEFAULTS = dict(
    num_epochs=100,  # passes over the 60,000 training images
    batch_size=128,  # the handout's
    dim_z=100,  # dimensions of the noise, the handout's
    d_learning_rate=4e-4,
    g_learning_rate=1e-3,  # above the discriminator's, whose task is the easier one: the largest gain of the ablation
    d_freq=1,  # discriminator updates for one generator update; with five of them one digit takes over
    g_channels=(64, 128, 256),  # the assignment's
    d_channels=(256, 128, 64),  # the assignment's
    dropout=0.1,  # of the discriminator's hidden units; as good as none, and better than more
    loss="non-saturating",  # or "saturating" or "relativistic"
    penalty=0.01,  # weight of R1 + R2 against a discriminator that grows too sure; does no harm where none does
    penalty_every=4,  # discriminator updates for one with the penalty, which then weighs so many times more
    real_label=1.0,  # below 1 it is one-sided label smoothing
    ema_decay=0.9995,  # of the average of the generator's weights, which is what is sampled
)

VARIANTS = {
    "wide-generator": (
        "does a generator with twice the channels draw better?",
        dict(g_channels=(128, 256, 512)),
    ),
    "deep-generator": ("does one more layer help the generator?", dict(g_channels=(64, 128, 256, 512))),
    "deep-discriminator": (
        "does one more layer make the discriminator a better teacher, or too strong?",
        dict(d_channels=(512, 256, 128, 64)),
    ),
    "no-dropout": ("what does the discriminator's dropout do beside the penalty?", dict(dropout=0.0)),
    "dropout-30": ("is three times the dropout better?", dict(dropout=0.3)),
    "dropout-50": ("does more dropout hold the discriminator back too much?", dict(dropout=0.5)),
    "no-penalty": ("what do R1 and R2 do (Mescheder et al. 2018, arXiv 1801.04406)?", dict(penalty=0.0)),
    "equal-rates": ("what if both networks learn at the same rate?", dict(g_learning_rate=4e-4)),
    "fast-discriminator": (
        "what if the discriminator learns faster than the generator?",
        dict(d_learning_rate=1e-3, g_learning_rate=4e-4),
    ),
    "d-freq-2": ("is a discriminator updated twice as often a better teacher?", dict(d_freq=2)),
    "d-freq-5": ("and one updated five times as often?", dict(d_freq=5)),
    "no-average": ("what does the average of the generator's weights do?", dict(ema_decay=0.0)),
    "label-smoothing": ("what does one-sided label smoothing do?", dict(real_label=0.9)),
    "relativistic": (
        "is a relativistic loss with R1 and R2 (Huang et al. 2024, arXiv 2501.05441) better?",
        dict(loss="relativistic"),
    ),
    "saturating": ("does the generator's side of Eq. 1 as it stands train at all?", dict(loss="saturating")),
    "public": (
        "how good is a public solution's configuration?",
        dict(
            g_channels=(64, 126, 256, 512),
            dropout=0.5,
            d_learning_rate=1e-4,
            g_learning_rate=2e-4,
            d_freq=5,
            penalty=0.0,
            ema_decay=0.0,
        ),
    ),
    "plain": (
        "how good are the base networks with dropout and equal rates, and nothing else?",
        dict(d_learning_rate=2e-4, g_learning_rate=2e-4, dropout=0.3, penalty=0.0, ema_decay=0.0),
    ),
}

# What the generator minimises by each loss: formula and optimum in nats, where p_g = p_data. The relativistic loss
# takes the difference of the logits of a real image and a fake one for D.
GENERATOR_LOSSES = {
    "non-saturating": ("-log D(G(z))", math.log(2)),
    "saturating": ("log(1 - D(G(z)))", -math.log(2)),
    "relativistic": ("-log D(G(z), x)", math.log(2)),
}

SAMPLE_COLUMNS = 10
STRIP_ROWS = 8  # epochs shown in samples_by_epoch.png
STRIP_COLUMNS = 12  # samples of each run in ablation.png
NUM_WATCHED = 200  # samples that are looked at after each epoch
SATURATED = 0.95  # D(x) above it, with D(G(z)) as close to 0, is worth a warning
COLLAPSED = 0.5  # so is one digit's share of the samples above it
ABLATION_LENGTH = ["--minutes", "2.5"]  # the same wall time for every variant


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
    loss,
    penalty,
    penalty_every,
    real_label,
    ema_decay,
):
    """Train on (N, 1, 28, 28) uint8 images; returns the averaged generator."""
    device = run.device
    generator = Generator(dim_z, g_channels).to(device)
    discriminator = Discriminator(d_channels, dropout).to(device)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=g_learning_rate, betas=(0.5, 0.999), fused=True)
    d_optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=d_learning_rate, betas=(0.5, 0.999), fused=True
    )
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
            weight = penalty * penalty_every if iteration % penalty_every == 0 else 0.0
            _, outputs_real, outputs_fake, d_loss_fake = train_discriminator(
                discriminator,
                d_optimizer,
                x,
                fake_images,
                criterion,
                device,
                real_label,
                relativistic=loss == "relativistic",
                penalty=weight,
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
                g_loss, _ = train_generator(
                    generator,
                    g_optimizer,
                    outputs,
                    criterion,
                    device,
                    saturating=loss == "saturating",
                    outputs_real=discriminator(x) if loss == "relativistic" else None,
                )
                averaged.update_parameters(generator)
                row["g_loss"] = g_loss.item()
            run.add(len(x), **row)
            run.log(iteration=iteration, epoch=epoch, **row)
        monitor_images(run, averaged.module, epoch)
        means = run.means()
        run.say(epoch, *find_trouble(averaged.module, **means), **means)
    return averaged.module


def monitor_images(run, generator, epoch):
    """Keep images of the same noise for samples_by_epoch.png."""
    images = generator.eval().sample(SAMPLE_COLUMNS).cpu()
    run.snapshots[epoch] = (images * 255).to(torch.uint8)


def find_trouble(generator, d_real, d_fake, **_):
    """Remarks on an epoch whose means of D(x) and D(G(z)) are given: one network too strong, or a single digit."""
    remarks = []
    if d_real > SATURATED and d_fake < 1 - SATURATED:
        remarks.append("saturated discriminator: it is sure of every image and teaches little")
    shares = metrics.digit_shares(metrics.classify(generator.eval().sample(NUM_WATCHED)))
    if shares.max() > COLLAPSED:
        remarks.append(f"collapsed generator: {shares.max():.0%} of its samples are a {shares.argmax()}")
    return remarks


def monitor_losses(run):
    """loss.png, with what the theory expects where p_g = p_data (Goodfellow et al. 2014, section 4.1)."""
    history = run.history
    iterations_per_epoch = history["epoch"].count(1)  # --minutes cuts the last epoch short
    x = [iteration / iterations_per_epoch for iteration in history["iteration"]]
    losses = {"discriminator": history["d_loss"], "generator": history["g_loss"]}
    _, g_optimum = GENERATOR_LOSSES[run.options["loss"]]
    optimum = {
        "discriminator's optimum, log 4": math.log(4),
        f"generator's optimum, {'-' if g_optimum < 0 else ''}log 2": g_optimum,
    }
    ends = {
        name: sum(history[name][-iterations_per_epoch:]) / iterations_per_epoch - 0.5
        for name in ("d_real", "d_fake")
    }
    outputs = {
        f"$D(x)$, last epoch 1/2 {ends['d_real']:+.3f}": history["d_real"],
        f"$D(G(z))$, last epoch 1/2 {ends['d_fake']:+.3f}": history["d_fake"],
    }
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


def draw_neighbours(run, generator, images):
    """neighbours.png: samples, and below each the training image nearest to it in pixels; a copy would show."""
    samples = generator.sample(3 * SAMPLE_COLUMNS, torch.Generator().manual_seed(run.args.seed))
    real = to_unit(images)
    nearest = real[metrics.nearest(samples, real)]
    rows = [each.split(SAMPLE_COLUMNS) for each in (samples, nearest)]
    pairs = torch.cat([row for pair in zip(*rows) for row in pair])
    names = ["sample", "nearest"] * len(rows[0])
    plotting.save_images(run.folder / "neighbours.png", pairs, SAMPLE_COLUMNS, names)


def draw_theory(run):
    """optimal_discriminator.png: p_data / (p_data + p_g) and what a network learns, on densities that are known."""
    x = torch.linspace(-4, 4, 200)
    p_data = theory.P_DATA
    panels = [
        (
            title,
            theory.trained_discriminator(p_data, p_g, x),
            theory.optimal_discriminator(p_data, p_g, x),
            [density.log_prob(x).exp() for density in (p_data, p_g)],
        )
        for title, p_g in ((r"$p_g \neq p_{data}$", theory.P_G), ("$p_g = p_{data}$", p_data))
    ]
    plotting.save_optimal_discriminator(run.folder / "optimal_discriminator.png", x, panels)


def write_metrics(run, generator, images):
    """How good samples are, and means over the last iterations; a GAN has no likelihood to report."""
    sizes = [len(batch) for batch in images.split(run.options["batch_size"])]
    over = f"the last {len(sizes)} iterations, dropout active in the discriminator"
    protocol = dict(train_images=len(images), over=over)

    def mean(name):
        pairs = [(v, n) for v, n in zip(run.history[name][-len(sizes) :], sizes) if v is not None]
        # With a large --d-freq an epoch may be without an update of the generator.
        return sum(value * size for value, size in pairs) / sum(size for _, size in pairs) if pairs else None

    g_formula, g_optimum = GENERATOR_LOSSES[run.options["loss"]]
    _, quality = metrics.judge_sampler(run, generator.sample)
    figures = dict(
        d_loss=runs.metric(
            mean("d_loss"), "nats", "-log D(x) - log(1 - D(G(z)))", optimum=math.log(4), **protocol
        ),
        g_loss=runs.metric(mean("g_loss"), "nats", g_formula, optimum=g_optimum, **protocol),
        d_real=runs.metric(mean("d_real"), "probability", "D(x)", optimum=0.5, **protocol),
        d_fake=runs.metric(mean("d_fake"), "probability", "D(G(z))", optimum=0.5, **protocol),
    )
    run.finish(**quality, **{name: each for name, each in figures.items() if each["value"] is not None})


def draw_ablation(folders, path):
    """ablation.png: D(x), D(G(z)) and samples of every run, `folders` mapping its name to where it is."""
    strips = []
    for name, folder in folders.items():
        rows = runs.read_csv(folder / "losses.csv")
        iterations_per_epoch = sum(row["epoch"] == 1 for row in rows)
        x = [row["iteration"] / iterations_per_epoch for row in rows]
        curves = {"$D(x)$": [row["d_real"] for row in rows], "$D(G(z))$": [row["d_fake"] for row in rows]}
        distance = json.loads((folder / "metrics.json").read_text())["frechet_distance"]["value"]
        samples = load_model(folder / "model.pt").sample(STRIP_COLUMNS)
        strips.append((f"{name}\nFréchet {distance:.0f}", x, curves, samples))
    plotting.save_strips(path, strips, xlabel="epoch", ylim=(0, 1))


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
        folders = ablation.run_all(__file__, STEP, args, VARIANTS, ABLATION_LENGTH)
        if args.ablation:
            draw_ablation(folders, runs.results_folder(STEP, args) / "ablation.png")
        return
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
    monitor_losses(run)
    draw_strip(run)
    draw_samples(run, generator)
    draw_neighbours(run, generator, images)
    draw_theory(run)
    write_metrics(run, generator, images)


if __name__ == "__main__":
    runs.run_main(main)
