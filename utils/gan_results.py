"""Warnings, figures and final metrics of step 1."""

import copy
import math
from functools import partial

import torch

from models.common import IMAGE_SHAPE, NUM_CLASSES
from utils import files, metrics, plotting
from utils.data import to_symmetric, to_unit
from utils.plotting import COLUMNS, NUM_SAMPLES

NUM_SNAPSHOT = COLUMNS  # images of the same noise that are kept after an epoch, a row of samples_by_epoch.png
STRIP_ROWS = 8  # epochs shown in samples_by_epoch.png
NUM_WALKS, WALK_STEPS = 4, 12
SATURATED = 0.95  # D(x) above it, with D(G(z)) as close to 0, means a saturated discriminator

DISCRIMINATOR_OPTIMUM = math.log(4)  # its smallest loss for p_g = p_data, in nats
# The generator's loss, where {} is the discriminator's output for G(z), and its optimum for p_g = p_data in nats.
G_LOSSES = {
    "non-saturating": ("-log {}", "log 2", math.log(2)),
    "saturating": ("log(1 - {})", "-log 2", -math.log(2)),
    "relativistic": ("-log {}", "log 2", math.log(2)),
}


def labels(loss):
    """Return the names of what a batch records. A relativistic D compares an image with one of the other kind."""
    real, fake = ("D(x, G(z))", "D(G(z), x)") if loss == "relativistic" else ("D(x)", "D(G(z))")
    return dict(d_loss="D loss", g_loss="G loss", d_real=real, d_fake=fake)


@torch.no_grad()
def sample_images(generator, count, noise=None):
    """Draw images in [0, 1], (count, 1, 28, 28), also from a generator without a method `sample`, in [-1, 1].

    `noise` is a CPU `torch.Generator`, by default a new one with seed 0.
    """
    noise = noise or torch.Generator().manual_seed(0)
    if hasattr(generator, "sample"):
        return generator.sample(count, noise)
    return decode(generator, torch.randn(count, noise_size(generator), generator=noise))


def noise_size(generator):
    """Return the dimensions of the noise, from the weights of the first linear layer (units, dim_z)."""
    return next(generator.parameters()).shape[1]


@torch.no_grad()
def decode(generator, z):
    """Turn noise z (N, dim_z) into images (N, 1, 28, 28) in [0, 1]."""
    return ((generator(z.to(next(generator.parameters()))) + 1) / 2).reshape(-1, *IMAGE_SHAPE)


def find_trouble(generator, d_real, d_fake, dataset="MNIST"):
    """Return warnings about an epoch with these means of D(x) and D(G(z)): a saturated discriminator, mode collapse."""
    warnings = []
    if d_real > SATURATED and d_fake < 1 - SATURATED:
        warnings.append("saturated discriminator: it is sure of every image and teaches little")
    samples = sample_images(generator, 200)
    # Half the pixels with ink are white in real digits, fewer in the grey fog of early samples.
    sharp = (samples > 0.9).sum() > 0.2 * (samples > 0.1).sum()
    if sharp and metrics.has_classifier(dataset):
        counts = metrics.probabilities(samples, dataset).argmax(1).bincount()
        if counts.max() > 0.5 * len(samples):
            share = counts.max() / len(samples)
            warnings.append(f"collapsed generator: {share:.0%} of its samples are a {counts.argmax()}")
    return warnings


@torch.no_grad()
def log_quality(run, generator, discriminator, images, test_images):
    """Add a row to quality.csv: the generator's updates, metrics of a few samples, D without dropout on both sets."""
    if not metrics.has_classifier(run.args.dataset):
        return
    count = metrics.NUM_JUDGED_QUICKLY if run.args.dry_run else 2000
    entries = metrics.judge_for(run, sample_images(generator, count).cpu(), "none")
    row = {name: entries[name]["value"] for name in metrics.ONE_SCALE}
    row |= dict(updates=run.iteration // run.options["d_freq"], samples=count)
    without_dropout = copy.deepcopy(discriminator).eval()
    for name, each in (("d_train", images), ("d_test", test_images)):
        parts = each[: metrics.NUM_JUDGED].split(metrics.CHUNK)
        outputs = torch.cat([without_dropout(to_symmetric(part).flatten(1)) for part in parts])
        row[name] = outputs.sigmoid().mean().item()
    run.log("quality", epoch=run.epochs_done, **row)


def draw_losses(path, history, options):
    """Draw the losses and the discriminator's mean outputs, with the optima of Goodfellow et al. 2014, section 4.1."""
    per_epoch, x, xlabel = history["epoch"].count(1), history["iteration"], "batch"
    if history["epoch"][-1] >= plotting.FEW_EPOCHS:
        x, xlabel = [iteration / per_epoch for iteration in x], "epoch"
    losses = {"discriminator": history["d_loss"], "generator": history["g_loss"]}
    _, name, optimum = G_LOSSES[options["loss"]]
    optima = {"optimum, log 4": DISCRIMINATOR_OPTIMUM, f"optimum, {name}": optimum}
    _, _, real, fake = labels(options["loss"]).values()
    outputs = {f"${real}$, real images": history["d_real"], f"${fake}$, generated": history["d_fake"]}
    panels = [("loss (nats)", losses, optima)]
    panels += [("discriminator's mean output", outputs, {"optimum, 1/2": 0.5})]
    plotting.save_curves(path, x, panels, xlabel, min(per_epoch, 1 + len(x) // 10))


def draw_quality(path, quality):
    """Draw the metrics of samples over the epochs; `quality` has the columns of quality.csv."""
    panels = [
        ("Fréchet distance", {"": quality["frechet_distance"]}, {}),
        ("classifier score", {"": quality["classifier_score"]}, {}),
        ("share of images", {name: quality[name] for name in ("precision", "recall", "coverage")}, {}),
    ]
    xlabel = f"epoch ({quality['samples'][-1]:,.0f} samples each)"
    plotting.save_curves(path, quality["epoch"], panels, xlabel)


def draw_samples(run, generator):
    """Draw samples.png, images of noise that depends on the seed."""
    noise = torch.Generator().manual_seed(run.args.seed)
    sample = partial(sample_images, generator)
    samples = metrics.draw_in_chunks(sample, run.args.count or NUM_SAMPLES, noise)
    run.draw("samples.png", plotting.save_images, samples, COLUMNS)


def draw_figures(run, generator, images):
    """Draw all but loss.png and samples.png; `images` are the uint8 training images."""
    if "quality" in run.tables:
        run.draw("quality.png", draw_quality, run.tables["quality"])
    rows = {f"epoch {epoch}": run.snapshots[epoch] / 255 for epoch in spread(list(run.snapshots))}
    run.draw("samples_by_epoch.png", plotting.save_rows, rows)
    run.draw("neighbours.png", draw_neighbours, generator, images, run.args.seed)
    # Equal steps from one noise vector to another, along an arc, so that each step is normal noise again.
    noise = torch.Generator().manual_seed(run.args.seed)
    start, end = torch.randn(2, NUM_WALKS, 1, noise_size(generator), generator=noise)
    angle = torch.linspace(0, math.pi / 2, WALK_STEPS)[:, None]
    z = angle.cos() * start + angle.sin() * end  # (walks, steps, dim_z)
    run.draw("walk.png", plotting.save_images, decode(generator, z.flatten(0, 1)), WALK_STEPS)


def spread(epochs):
    """Choose up to STRIP_ROWS of a list, the first and the last among them, early ones closer together."""
    last = len(epochs) - 1
    after_0 = (round(last ** (row / (STRIP_ROWS - 2))) for row in range(STRIP_ROWS - 1))
    return [epochs[index] for index in sorted({0, *after_0}) if index <= last]


def draw_neighbours(path, generator, images, seed):
    """Draw samples, each above the training image nearest to it in pixels. A copied image would be seen."""
    samples = sample_images(generator, 3 * COLUMNS, torch.Generator().manual_seed(seed))
    real = to_unit(images)
    plotting.save_rows(path, dict(sample=samples, nearest=real[metrics.nearest(samples, real)]))


def draw_ablation(path, folders, load_model):
    """Draw D(x), D(G(z)) and samples of every run, and the metrics in ablation.csv; `folders` has runs by name."""
    size = plotting.WIDTH, min(0.36 * len(folders), 8.6) + 0.6  # all strips fit on a page
    shared = dict(squeeze=False, sharex="col", sharey="col", width_ratios=[1, 3])
    with plotting.new_figure(path, *size, len(folders), 2, **shared) as (figure, axes):
        for (left, right), (name, folder) in zip(axes, folders.items()):
            rows = files.read_csv(folder / "epochs.csv")
            epochs = [row["epoch"] for row in rows]
            for key, label in (("d_real", "$D(x)$"), ("d_fake", "$D(G(z))$")):
                left.plot(epochs, [row[key] for row in rows], linewidth=1, label=label)
            left.tick_params(length=2, pad=1, labelleft=False)
            left.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=2)
            plotting.draw_images(sample_images(load_model(folder / "model.pt"), 12), 12, axis=right)
        left.tick_params(labelleft=True)
        left.set(xlabel="epoch")
        figure.align_ylabels(axes[:, 0])
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    table = files.read_csv(path.with_suffix(".csv"))
    if "frechet_distance_mean" not in table[0]:
        return  # there is no classifier of the data set
    panels = {key.replace("_", " ").replace("frechet", "Fréchet"): {"": key} for key in metrics.ONE_SCALE}
    # Runs that failed would hide the others' differences.
    too_far = 10 * table[0]["frechet_distance_mean"]  # the default's
    left_out = [row["variant"] for row in table if (row["frechet_distance_mean"] or 0) >= too_far]
    shown = [row for row in table if row["variant"] not in left_out]
    what = "left out, with ten times the default's Fréchet distance or more: "
    note = what + ", ".join(left_out) if left_out else ""
    metrics_path = path.with_name("ablation_metrics.png")
    plotting.save_ablation(metrics_path, shown, panels, ["Fréchet distance"], note)


def write_metrics(run, generator, images):
    """Write metrics.json: the quality of samples, and means over the last epoch. A GAN has no likelihood."""
    _, _, real, fake = labels(run.options["loss"]).values()
    g_formula, _, g_optimum = G_LOSSES[run.options["loss"]]
    descriptions = dict(
        d_loss=("nats", f"-log {real} - log(1 - {fake})", DISCRIMINATOR_OPTIMUM),
        g_loss=("nats", g_formula.format(fake), g_optimum),
        d_real=("probability", real, 0.5),
        d_fake=("probability", fake, 0.5),
    )
    over, epochs = "the last epoch, dropout active in the discriminator", run.tables["epochs"]
    _, results = metrics.judge_sampler(run, partial(sample_images, generator))
    for name, (unit, formula, optimum) in descriptions.items():
        if epochs[name][-1] is not None:  # a large d_freq may leave the generator without an update
            more = dict(optimum=optimum, over=over, train_images=len(images))
            results[name] = files.metric(epochs[name][-1], unit, formula, **more)
    if run.options["kinds"] and metrics.has_classifier(run.args.dataset):
        results["kind_purity"] = kind_purity(generator, run.options["kinds"], run.args.dataset)
    run.finish(("frechet_distance", "classifier_score", "recall"), **results)


def kind_purity(generator, kinds, dataset):
    """Return the entry for how often the digit of a sample is the most frequent one of its kind of noise."""
    z = torch.randn(2000, noise_size(generator), generator=torch.Generator().manual_seed(0))
    digits = metrics.probabilities(decode(generator, z), dataset).argmax(1)
    counts = torch.zeros(kinds, NUM_CLASSES)
    counts.index_put_((z[:, -kinds:].argmax(1), digits), torch.ones(len(z)), accumulate=True)
    formula = "the classifier sees the digit that it sees most often in samples of this kind of noise"
    by_kind = (counts.amax(1) / counts.sum(1).clamp(min=1)).tolist()
    share = counts.amax(1).sum().item() / len(z)
    return files.metric(share, "share of samples", formula, samples=len(z), by_kind=by_kind)
