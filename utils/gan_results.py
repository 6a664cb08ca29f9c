"""Warnings, figures and final metrics of step 1."""

import math

import torch

from utils import figures, files, metrics, plotting, theory
from utils.data import to_unit

HEADLINE = ("frechet_distance", "classifier_score", "recall")  # printed at the end
COLUMNS = 10  # samples in a row of a figure
NUM_SAMPLES = 100  # in samples.png, unless --count says otherwise
NUM_SNAPSHOT = 50  # images of the same noise that are kept after an epoch
STRIP_ROWS = 8  # epochs shown in samples_by_epoch.png
ABLATION_COLUMNS = 12  # samples of each run in ablation.png
LABELS = dict(d_loss="D loss", g_loss="G loss", d_real="D(x)", d_fake="D(G(z))")  # the losses of a batch
NUM_WATCHED = 200  # samples that are checked for mode collapse after each epoch
NUM_MEASURED = 2000  # samples for quality.csv, every ten epochs
QUALITY = ("frechet_distance", "classifier_score", "precision", "recall")  # columns of quality.csv
SATURATED = 0.95  # D(x) above it, with D(G(z)) as close to 0, means a saturated discriminator
COLLAPSED = 0.5  # one digit in a larger share of the samples means mode collapse
SHARP = 0.2  # share of white pixels among those with ink; real digits have 0.5, early samples are grey fog
DISCRIMINATOR_OPTIMUM = math.log(4)  # its smallest loss for p_g = p_data, in nats
# Formulas of both losses, and the generator's optimum in nats. The relativistic D takes the difference of two logits.
LOSSES = {
    "non-saturating": ("-log D(x) - log(1 - D(G(z)))", "-log D(G(z))", math.log(2)),
    "saturating": ("-log D(x) - log(1 - D(G(z)))", "log(1 - D(G(z)))", -math.log(2)),
    "relativistic": ("-log D(x, G(z)) - log(1 - D(G(z), x))", "-log D(G(z), x)", math.log(2)),
}


def find_trouble(generator, d_real, d_fake, dataset="MNIST"):
    """Return warnings about an epoch with these means of D(x) and D(G(z)): a saturated discriminator, mode collapse."""
    warnings = []
    if d_real > SATURATED and d_fake < 1 - SATURATED:
        warnings.append("saturated discriminator: it is sure of every image and teaches little")
    samples = generator.sample(NUM_WATCHED)
    sharp = (samples > 0.9).sum() > SHARP * (samples > 0.1).sum()
    if sharp and metrics.load_classifier(dataset=dataset):
        shares = metrics.digit_shares(metrics.classify(samples, dataset))
        if shares.max() > COLLAPSED:
            warnings.append(f"collapsed generator: {shares.max():.0%} of its samples are a {shares.argmax()}")
    return warnings


def log_quality(run, generator, epoch):
    """Add a row to quality.csv: metrics of NUM_MEASURED samples, which quickly show how the training goes."""
    args = run.args
    if metrics.load_classifier(dataset=args.dataset):
        count = metrics.NUM_JUDGED_QUICKLY if args.dry_run else NUM_MEASURED
        samples = generator.sample(count).cpu()
        entries = metrics.judge(samples, "none", args.held_out, args.data_dir, count, args.dataset)
        run.log("quality", epoch=epoch, **{name: entries[name]["value"] for name in QUALITY})


def draw_losses(path, history, options):
    """Draw the losses and the discriminator's mean outputs, with the optima of Goodfellow et al. 2014, section 4.1."""
    iterations_per_epoch = history["epoch"].count(1)  # --minutes cuts the last epoch short
    x = [iteration / iterations_per_epoch for iteration in history["iteration"]]
    losses = {"discriminator": history["d_loss"], "generator": history["g_loss"]}
    _, _, g_optimum = LOSSES[options["loss"]]
    sign = "-" if g_optimum < 0 else ""
    optima = {"optimum, log 4": DISCRIMINATOR_OPTIMUM, f"optimum, {sign}log 2": g_optimum}
    outputs = {"$D(x)$, real images": history["d_real"], "$D(G(z))$, generated": history["d_fake"]}
    half = {"optimum, 1/2": 0.5}
    panels = [("loss (nats)", losses, optima), ("discriminator's mean output", outputs, half)]
    plotting.save_curves(path, x, panels, smooth=iterations_per_epoch)


def draw_quality(path, quality):
    """Draw the metrics of samples over the epochs; `quality` has the columns of quality.csv."""
    panels = [
        ("Fréchet distance", {"": quality["frechet_distance"]}, {}),
        ("classifier score", {"": quality["classifier_score"]}, {}),
        ("share of images", {name: quality[name] for name in ("precision", "recall")}, {}),
    ]
    plotting.save_curves(path, quality["epoch"], panels)


def draw_samples(run, generator):
    """Draw samples.png, images of noise that depends on the seed."""
    samples = generator.sample(run.args.count or NUM_SAMPLES, torch.Generator().manual_seed(run.args.seed))
    run.draw("samples.png", plotting.save_images, samples, COLUMNS)


def draw_figures(run, generator, images):
    """Draw the figures beside loss.png and samples.png; `images` are the uint8 training images."""
    if "quality" in run.tables:
        run.draw("quality.png", draw_quality, run.tables["quality"])
    run.draw("samples_by_epoch.png", draw_samples_by_epoch, run.snapshots)
    run.draw("training.gif", figures.save_training_gif, run.snapshots, COLUMNS)
    run.draw("neighbours.png", draw_neighbours, generator, images, run.args.seed)
    run.draw("optimal_discriminator.png", draw_optimal_discriminator)


def draw_samples_by_epoch(path, snapshots):
    """Draw a row of images of the same noise for each of up to STRIP_ROWS epochs, early ones closer together."""
    epochs, last = list(snapshots), len(snapshots) - 1
    after_0 = (round(last ** (row / (STRIP_ROWS - 2))) for row in range(STRIP_ROWS - 1))
    shown = [epochs[index] for index in sorted({0, *after_0})]
    images = torch.cat([snapshots[epoch][:COLUMNS] for epoch in shown]) / 255
    plotting.save_images(path, images, COLUMNS, [f"epoch {epoch}" for epoch in shown])


def draw_neighbours(path, generator, images, seed):
    """Draw samples, each above the training image nearest to it in pixels. A copied image would be seen."""
    samples = generator.sample(3 * COLUMNS, torch.Generator().manual_seed(seed))
    real = to_unit(images)
    pairs = samples, real[metrics.nearest(samples, real)]
    rows = torch.stack([images.unflatten(0, (-1, COLUMNS)) for images in pairs], 1)
    plotting.save_images(path, rows.flatten(0, 2), COLUMNS, ["sample", "nearest"] * len(rows))


def draw_optimal_discriminator(path):
    """Draw p_data / (p_data + p_g), and what a network learns, for densities that are known."""
    x, p_data = torch.linspace(-4, 4, 200), theory.P_DATA
    panels = []
    for title, p_g in ((r"$p_g \neq p_{data}$", theory.P_G), ("$p_g = p_{data}$", p_data)):
        trained = theory.trained_discriminator(p_data, p_g, x)
        densities = [density.log_prob(x).exp() for density in (p_data, p_g)]
        panels.append((title, trained, theory.optimal_discriminator(p_data, p_g, x), densities))
    plotting.save_optimal_discriminator(path, x, panels)


def draw_ablation(path, folders, load_model):
    """Draw D(x), D(G(z)) and samples of every run, and beside `path` the metrics in ablation.csv.

    `folders` maps the name of a run to its folder.
    """
    strips = []
    for name, folder in folders.items():
        rows = files.read_csv(folder / "epochs.csv")
        x = [row["epoch"] for row in rows]
        curves = {"$D(x)$": [row["d_real"] for row in rows], "$D(G(z))$": [row["d_fake"] for row in rows]}
        strips.append((name, x, curves, load_model(folder / "model.pt").sample(ABLATION_COLUMNS)))
    values = [value for _, _, curves, _ in strips for curve in curves.values() for value in curve]
    ylim = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values)) / 10
    plotting.save_strips(path, strips, xlabel="epoch", ylim=ylim)
    table = files.read_csv(path.with_suffix(".csv"))
    if "frechet_distance_mean" in table[0]:  # which needs a classifier of the data set
        panels = {key.replace("_", " ").replace("frechet", "Fréchet"): {"": key} for key in QUALITY}
        where, distance = path.with_name("ablation_metrics.png"), "frechet_distance_mean"
        # Beside a failed generator, one would see no difference between the others.
        table = [row for row in table if (row[distance] or 0) < 10 * table[0][distance]]
        plotting.save_ablation(where, table, panels, log=["Fréchet distance"])


def write_metrics(run, generator, images):
    """Write metrics.json: the quality of samples, and means over the last epoch. A GAN has no likelihood."""
    d_formula, g_formula, g_optimum = LOSSES[run.options["loss"]]
    descriptions = dict(
        d_loss=("nats", d_formula, DISCRIMINATOR_OPTIMUM),
        g_loss=("nats", g_formula, g_optimum),
        d_real=("probability", "D(x)", 0.5),
        d_fake=("probability", "D(G(z))", 0.5),
    )
    protocol = dict(over="the last epoch, dropout active in the discriminator", train_images=len(images))
    _, results = metrics.judge_sampler(run, generator.sample)
    for name, (unit, formula, optimum) in descriptions.items():
        value = run.tables["epochs"][name][-1]
        if value is not None:  # a large d_freq may leave the generator without an update
            results[name] = files.metric(value, unit, formula, optimum=optimum, **protocol)
    run.finish(HEADLINE, **results)
