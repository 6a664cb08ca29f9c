"""Likelihoods, samples, figures and final metrics of step 2."""

import io
import math
import time
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from models import ar_sampler
from models.AR import ConditionalPixelCNN
from models.common import IMAGE_SHAPE, NUM_CLASSES, NUM_PIXELS
from utils import files, machine, metrics, plotting
from utils.data import binarize
from utils.machine import progress
from utils.metrics import CHUNK, NUM_DRAWS
from utils.plotting import COLUMNS, NUM_SAMPLES

DIGIT = 3  # in samples_digit.png, unless --digit names another
NUM_COMPARED = 25  # images of each kind in comparison.png
SURE = 0.9  # smallest probability of its class that leaves an image there without a frame
PIXELS_A_FRAME = 14  # of drawing.gif
GIF_PALETTE = Image.new("P", (1, 1))  # few greys make a small file
GIF_PALETTE.putpalette(plotting.GREYS([*torch.linspace(0, 1, 16), math.nan], bytes=True)[:, :3].tobytes())
ROWS_GIVEN = 14  # of the digits to be completed
SEEN_FROM = (14, 3)  # row and column of the pixel whose receptive field is drawn
NUM_TIMED = 8  # images by which the sampler is tried


def network_inputs(network, x, labels):
    """Return the network's arguments: images x (N, 1, 28, 28), and one-hot labels if it is conditional."""
    x = x.to(next(network.parameters()))
    return (x, F.one_hot(labels, NUM_CLASSES).to(x)) if isinstance(network, ConditionalPixelCNN) else (x,)


def binarize_test(images, how, num_draws=1):
    """Binarise uint8 test images, (num_draws * N, 1, 28, 28). Every call and every device has the same draws."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([binarize(images, how, generator) for _ in range(num_draws)])


@torch.no_grad()
def pixel_nll(network, x, labels, batch_size=250):
    """Return -log p(x_i | x_1, ..., x_{i-1}) of every pixel in nats, (N, 1, 28, 28), for images x in {0, 1}."""
    nll, parts = [], [*zip(x.split(batch_size), labels.split(batch_size))]
    for some, their_labels in progress(parts, "likelihoods"):
        logits = network(*network_inputs(network, some, their_labels)).float()
        nll.append(F.binary_cross_entropy_with_logits(logits, some, reduction="none"))
    return torch.cat(nll)


def evaluate(network, images, labels, how):
    """Return the mean NLL of uint8 images in nats per image, in eval mode."""
    was_training = network.training
    nats = pixel_nll(network.eval(), binarize_test(images, how), labels).sum().item()
    network.train(was_training)
    return nats / len(images)


def bits_per_pixel(nll):
    return nll / (NUM_PIXELS * math.log(2))  # nats per image


def receptive_field(network, x, labels, pixel):
    """Return the mean over images of |d logit / d x_j|, (28, 28), for the logit of one pixel and every x_j."""
    x = x.clone().requires_grad_()
    logits = network(*network_inputs(network, x, labels))
    (gradient,) = torch.autograd.grad(logits[:, 0, pixel[0], pixel[1]].sum(), x)
    return gradient.abs().mean((0, 1))


def sample_images(network, labels, generator=None, given=None):
    """Draw an image in {0, 1} for each of `labels` (N,), which only a conditional network is told.

    A network without a method `sample` draws by its forward pass. `given` are uppermost rows, (N, 1, rows, 28).
    """
    if hasattr(network, "sample"):
        what = labels if isinstance(network, ConditionalPixelCNN) else len(labels)
        return network.sample(what, generator, **({} if given is None else {"given": given}))
    shape = len(labels), *IMAGE_SHAPE
    _, *y = network_inputs(network, torch.zeros(shape), labels)
    return ar_sampler.draw_images(network, shape, generator, given=given, y=y)


def sample_evenly(network, count, generator):
    """Draw (count, 1, 28, 28) images; a conditional network is asked for the digits in turn."""
    return sample_images(network, torch.arange(count) % NUM_CLASSES, generator)


@torch.no_grad()
def num_judged(network):
    """Return how many samples to judge: few, and a line says so, if each pixel needs a pass of the whole network."""
    x, *y = network_inputs(network, torch.zeros(NUM_TIMED, *IMAGE_SHAPE), torch.arange(NUM_TIMED))
    if ar_sampler.can_cache(network, x.shape, y):
        return metrics.NUM_JUDGED
    started, few = time.perf_counter(), metrics.NUM_JUDGED_QUICKLY
    network(x, *y)
    minutes = few / NUM_TIMED * NUM_PIXELS * (time.perf_counter() - started) / 60
    machine.say(f"a pixel needs a pass of the whole network: {few} samples to judge take {minutes:.1f} min")
    return few


def draw_losses(path, history, batches, how):
    """Draw the NLL over the epochs, of a short training over its batches. The value before it is in the legend."""
    before, *after = history["test_nll"]
    label = f"NLL, {how} pixels\n(nats per image)"
    if history["epoch"][-1] < plotting.FEW_EPOCHS:
        return plotting.save_batches(path, batches, label, {"test images at the end": after[-1]})
    test = f"test images ({before:.0f} before training)"
    curves = {"training images": history["train_nll"], test: [None, *after]}
    plotting.save_curves(path, history["epoch"], [(label, curves, {})])


def draw_samples(run, network, test_set, unconditional=None):
    """Draw the figures that need samples; `unconditional` is a network to compare a conditional one with, or None."""
    args, conditional = run.args, isinstance(network, ConditionalPixelCNN)
    real, test_labels = binarize_test(test_set[0], run.options["binarize"]), test_set[1]
    if max(args.complete or [0]) >= len(real):
        raise files.UserError(f"--complete takes numbers below {len(real)}, not {max(args.complete)}")
    num_judged(network)  # says if drawing takes long
    noise = torch.Generator().manual_seed(args.seed)

    def draw(labels, network=network):
        parts = progress(labels.split(CHUNK), "images drawn")
        return torch.cat([sample_images(network, some, noise) for some in parts])

    labels = torch.arange(args.count or NUM_SAMPLES)  # with --count the digits in turn, else a row of each
    labels = labels % NUM_CLASSES if args.count else labels // COLUMNS
    samples = draw(labels)
    names = range(NUM_CLASSES) if conditional and not args.count else ()
    run.draw("samples.png", plotting.save_images, samples, COLUMNS, names)
    chosen = args.complete or np.unique(test_labels.cpu(), return_index=True)[1]  # the first of each digit
    run.draw("completions.png", draw_completions, network, real[chosen], test_labels[chosen], noise)
    shown = np.unique(labels, return_index=True)[1]
    run.draw("drawing.gif", draw_drawing, network, samples[shown], labels[shown])
    if not conditional:
        return
    digit = DIGIT if args.digit is None else args.digit
    of_digit, title = draw(torch.full_like(labels, digit)), f"samples of the digit {digit}"
    run.draw("samples_digit.png", plotting.save_images, of_digit, COLUMNS, title=title)
    grids = {"real": real[:NUM_COMPARED]}
    if unconditional is not None:
        grids["unconditional"] = draw(torch.zeros(NUM_COMPARED), unconditional)
    grids["class-conditional"] = samples[torch.randperm(len(samples), generator=noise)[:NUM_COMPARED]]
    run.draw("comparison.png", draw_comparison, grids, args.dataset)


@plotting.our_style()
@torch.no_grad()
def draw_drawing(path, network, samples, labels):
    """Write a moving picture: samples (N, 1, 28, 28) of labels (N,) and the probabilities of white, pixel by pixel."""
    logits = network(*network_inputs(network, samples, labels.to(samples.device)))
    rows = torch.cat([samples.float(), logits.float().sigmoid()]).cpu()
    figure, frames = plotting.draw_images(rows, len(samples), ["drawn", "probability of white"]), []
    for count in range(0, NUM_PIXELS + 1, PIXELS_A_FRAME):
        drawn = torch.arange(NUM_PIXELS).reshape(IMAGE_SHAPE) < count
        shown = torch.where(drawn, rows, math.nan)
        figure.axes[0].images[0].set_data(plotting.grid_of(shown, len(samples)))
        figure.axes[0].set_title(f"{count} of {NUM_PIXELS} pixels")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=200)  # two dots per pixel of an image
        frames.append(Image.open(buffer).convert("RGB").quantize(palette=GIF_PALETTE, dither=0))
    buffer = io.BytesIO()
    times = [150] * (len(frames) - 1) + [2000]  # milliseconds; the last frame stays
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    files.write_atomically(path, buffer.getvalue())


def draw_comparison(path, grids, dataset):
    """Draw grids of images by title. A frame marks images of which the classifier is not sure."""
    columns, marked, note = {title: [images] for title, images in grids.items()}, {}, ""
    if metrics.has_classifier(dataset):
        note = f"in a frame: the digit classifier is less than {100 * SURE:.0f} % sure of its digit"
        for title, images in grids.items():
            unsure = metrics.probabilities(images, dataset).max(1).values < SURE
            marked[title] = unsure.nonzero().flatten().tolist()
    plotting.save_grid_table(path, columns, math.isqrt(NUM_COMPARED), marked=marked, note=note)


def draw_completions(path, network, originals, labels, noise):
    """Draw test digits (N, 1, 28, 28), their upper halves, and ten completions of each half by the network."""
    given = originals[:, :, :ROWS_GIVEN]
    of_each = labels.repeat_interleave(COLUMNS), noise, given.repeat_interleave(COLUMNS, 0)
    completed = sample_images(network, *of_each).unflatten(0, (-1, COLUMNS))
    halves = F.pad(given, (0, 0, 0, 28 - ROWS_GIVEN), value=0.5)
    rows = torch.cat([originals[:, None], halves[:, None], completed], 1).flatten(0, 1)
    headings = {"real": 0, "half": 1, "completions": (COLUMNS + 3) / 2}
    plotting.save_images(path, rows, COLUMNS + 2, labels.tolist(), scale=0.28, headings=headings)


def write_metrics(run, network, train_set, test_set):
    """Write metrics.json, in single precision unless an entry says otherwise, and draw the figures that go with it."""
    conditional = isinstance(network, ConditionalPixelCNN)
    how, (images, labels) = run.options["binarize"], test_set
    protocol = dict(binarization=how, train_images=len(train_set[0]), test_images=len(images))
    x = binarize_test(images, how)
    machine.say("likelihoods of test and training images")
    nll = nll_of_draws(network, images, labels, how)
    train_nll = nll_of_draws(network, *(each[: len(images)] for each in train_set), how)
    totals, train_totals = (each.sum((2, 3, 4)) for each in (nll, train_nll))  # nats per image, (draws, N)
    run.draw("nll_map.png", plotting.save_map, nll.mean((0, 1, 2)), f"test NLL (nats per pixel, {how})")
    field = receptive_field(network, x[:100], labels[:100], SEEN_FROM)
    run.draw("receptive_field.png", plotting.save_map, field, "mean |d logit / d pixel|", SEEN_FROM)
    given = "x_1, ..., x_{i-1}" + (", y" if conditional else "")
    what = "nats per image", f"-sum_i log p(x_i | {given}), mean over images"
    bits = "bits per pixel", "test_nll / (784 log 2)"
    values, more = independent_values(totals), dict(draws=len(nll), **protocol)
    over = dict(over=f"first {len(images)} training images", **more)
    results = dict(
        test_nll=files.metric(values, *what, **more),
        test_bits=files.metric(bits_per_pixel(values), *bits, **more),
        train_nll=files.metric(independent_values(train_totals), *what, **over),
    )
    per_image = dict(nll=totals)
    if conditional:
        of_labels, mixture_nll = label_metrics(run, network, x, labels, protocol)
        results, per_image["mixture_nll"] = results | of_labels, mixture_nll[None]
    metrics.save_per_image(run.folder, binarize_test(images, how, len(nll)), per_image)
    samples, quality = metrics.judge_sampler(run, partial(sample_evenly, network), how, num_judged(network))
    results |= quality
    if metrics.has_classifier(run.args.dataset):
        results |= classifier_metrics(samples, x, conditional, run.args.dataset)
    run.finish(("test_nll", "train_nll", "recognised"), **results)


def nll_of_draws(network, images, labels, how):
    """Return the NLL of every pixel, (draws, N, 1, 28, 28), for NUM_DRAWS draws of stochastic pixels."""
    num_draws = NUM_DRAWS if how == "stochastic" else 1
    x = binarize_test(images, how, num_draws)
    return pixel_nll(network, x, labels.repeat(num_draws)).unflatten(0, (num_draws, -1))


def independent_values(totals):
    """Return the values to average: the mean NLL of each draw, or of a single draw the NLL of each image."""
    return totals.mean(1) if len(totals) > 1 else totals[0]


def classifier_metrics(samples, real, conditional, dataset):
    """Return how often the digit classifier is unsure, and how often it sees the digit of `sample_evenly`."""
    of_class, of_class_real = (metrics.probabilities(x, dataset).max(1) for x in (samples, real))
    unit, count = "share of samples", len(samples)
    what = f"the digit classifier gives no digit a probability of {SURE:.0%}"
    floor = (of_class_real.values < SURE).double().mean().item()
    results = dict(unsure=files.metric(of_class.values < SURE, unit, what, floor=floor, samples=count))
    if conditional:
        hits = of_class.indices == torch.arange(count) % NUM_CLASSES
        by_digit = hits.reshape(-1, NUM_CLASSES).double().mean(0).tolist()
        what = "the digit classifier sees the digit that was asked for"
        results["recognised"] = files.metric(hits, unit, what, samples=count, by_digit=by_digit)
    return results


def label_metrics(run, network, x, labels, protocol):
    """Return the metrics of a network as a classifier and as a mixture over labels, and the mixture's NLL, (N,)."""
    with machine.autocast(run.device, run.options["precision"]):
        given_y = (pixel_nll(network, x, torch.full_like(labels, y)) for y in range(NUM_CLASSES))
        log_likelihoods = -torch.stack([nll.sum((1, 2, 3)) for nll in given_y], 1)  # log p(x | y), (N, 10)
    guesses = log_likelihoods.argmax(1)  # the most likely labels, by Bayes' rule
    mixture_nll = math.log(NUM_CLASSES) - log_likelihoods.logsumexp(1)
    precision = "in the precision of the training"
    guess = f"argmax_y log p(x | y) is the label; {precision}"
    mixture = f"-log 1/10 sum_y p(x | y), which is told no label, mean over images; {precision}"
    entries = dict(
        bayes_accuracy=files.metric(guesses == labels, "share of test images", guess, **protocol),
        mixture_nll=files.metric(mixture_nll, "nats per image", mixture, **protocol),
    )
    return entries, mixture_nll
