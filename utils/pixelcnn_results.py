"""Likelihoods, figures and final metrics of step 2."""

import math
from functools import partial

import torch
from torch.nn import functional as F
from tqdm import tqdm

from models.AR import ConditionalPixelCNN
from utils import figures, files, machine, metrics, parallel, plotting
from utils.data import binarize

NUM_CLASSES = 10
NUM_DRAWS = 5  # of stochastic pixels, in the final metrics
NUM_PIXELS = 28 * 28
HEADLINE = ("test_nll", "train_nll", "recognised")  # printed at the end
COLUMNS = 10  # samples in a row of a figure
DIGIT = 3  # in samples_digit.png, unless --digit names another
NUM_COMPARED = 25  # images of each kind in comparison.png
SURE = 0.9  # smallest probability of its class that leaves an image there without a frame
NUM_PROBED = 1000  # test images over which the receptive field is measured
PIXELS_A_FRAME = 14  # of drawing.gif
ROWS_GIVEN = 14  # of the digits to be completed
SEEN_FROM = (14, 3)  # row and column of the pixel whose receptive field is drawn


def network_inputs(network, x, labels):
    """Return the network's arguments: images x (N, 1, 28, 28), and one-hot labels if it is conditional."""
    if isinstance(network, ConditionalPixelCNN):
        return x, F.one_hot(labels, NUM_CLASSES).float()
    return (x,)


def binarize_test(images, how, num_draws=1):
    """Binarise uint8 test images, (num_draws * N, 1, 28, 28). Every call and every device has the same draws."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([binarize(images, how, generator) for _ in range(num_draws)])


@torch.no_grad()
def pixel_nll(network, x, labels, batch_size=250):
    """Return -log p(x_i | x_1, ..., x_{i-1}) of every pixel in nats, (N, 1, 28, 28), for images x in {0, 1}."""
    nll = []
    silent = None if parallel.is_first() else True  # None: silent unless the output is a terminal
    chunks = tqdm(x.split(batch_size), "evaluation", unit="batch", disable=silent, leave=False)
    for some, their_labels in zip(chunks, labels.split(batch_size)):
        logits = network(*network_inputs(network, some, their_labels)).float()
        nll.append(F.binary_cross_entropy_with_logits(logits, some, reduction="none"))
    return torch.cat(nll)


def evaluate(network, images, labels, how):
    """Return the mean NLL of uint8 images in nats per image, in eval mode; torchrun's processes share the work."""
    was_training = network.training
    x, labels = parallel.shard(binarize_test(images, how), labels)
    nats = pixel_nll(network.eval(), x, labels).sum().item()
    network.train(was_training)
    return parallel.total([nats], images.device)[0] / len(images)


def bits_per_pixel(nll):
    """Convert nats per image to bits per pixel."""
    return nll / (NUM_PIXELS * math.log(2))


def label_log_likelihoods(network, x):
    """Return log p(x | y) for each label y, (N, 10) in nats; the largest belongs to the most likely label (Bayes)."""
    columns = []
    for label in range(NUM_CLASSES):
        labels = torch.full((len(x),), label, device=x.device)
        columns.append(-pixel_nll(network, x, labels).sum((1, 2, 3)))
    return torch.stack(columns, 1)


def receptive_field(network, x, labels, pixel, batch_size=100):
    """Return the mean over images of |d logit / d x_j|, (28, 28), for the logit of one pixel and every x_j."""
    total = torch.zeros_like(x[0, 0])
    for some, their_labels in zip(x.split(batch_size), labels.split(batch_size)):
        some = some.clone().requires_grad_()
        logits = network(*network_inputs(network, some, their_labels))
        (gradient,) = torch.autograd.grad(logits[:, 0, pixel[0], pixel[1]].sum(), some)
        total += gradient.abs().sum((0, 1))
    return total / len(x)


def sample_evenly(network, count, generator):
    """Draw (count, 1, 28, 28) images; a conditional network is asked for the digits in turn."""
    conditional = isinstance(network, ConditionalPixelCNN)
    return network.sample(torch.arange(count) % NUM_CLASSES if conditional else count, generator)


def draw_losses(path, history, how):
    """Draw the NLL over the epochs. The much higher value before the training stands in the legend."""
    curves = {"training images": history["train_nll"]}
    before, *after = history["test_nll"]
    curves[f"test images ({before:.0f} before training)"] = [None, *after]
    plotting.save_curves(path, history["epoch"], [(f"NLL, {how} pixels\n(nats per image)", curves, {})])


def draw_samples(run, network, test_set, unconditional=None):
    """Draw the figures that need samples; `unconditional` is a network to compare a conditional one with, or None."""
    images, labels = test_set
    conditional = isinstance(network, ConditionalPixelCNN)
    noise = torch.Generator().manual_seed(run.args.seed)
    count = run.args.count or 10 * COLUMNS
    digits = torch.arange(NUM_CLASSES).repeat_interleave(COLUMNS)
    samples = network.sample(digits if conditional else count, noise)
    names = range(NUM_CLASSES) if conditional else ()
    run.draw("samples.png", plotting.save_images, samples, COLUMNS, names)
    real = binarize_test(images, run.options["binarize"])
    run.draw("completions.png", draw_completions, network, real, labels, noise)
    run.draw("drawing.gif", draw_drawing, network, samples[:: max(1, len(samples) // COLUMNS)][:COLUMNS])
    if not conditional:
        return
    digit = DIGIT if run.args.digit is None else run.args.digit
    chosen = network.sample(torch.full((count,), digit), noise)
    title = f"samples of the digit {digit}"
    run.draw("samples_digit.png", plotting.save_images, chosen, COLUMNS, title=title)
    grids = {"real": real[:NUM_COMPARED]}
    if unconditional is not None:
        grids["unconditional"] = unconditional.sample(NUM_COMPARED, noise)
    chosen = torch.randperm(len(samples), generator=noise)[:NUM_COMPARED]
    grids["class-conditional"] = samples[chosen]
    run.draw("comparison.png", draw_comparison, grids, run.args.dataset)


@torch.no_grad()
def draw_drawing(path, network, samples):
    """Draw how samples, number i of the digit i, appear pixel by pixel beside the predicted probability of white."""
    logits = network(*network_inputs(network, samples, torch.arange(len(samples), device=samples.device)))
    panels = {"pixels drawn": samples, "predicted probability of white": logits.float().sigmoid()}
    counts = torch.arange(0, NUM_PIXELS + 1, PIXELS_A_FRAME).reshape(-1, 1, 1, 1, 1)
    drawn = torch.arange(NUM_PIXELS).reshape(28, 28) < counts  # (frames, 1, 1, 28, 28)
    frames = {title: torch.where(drawn, images.cpu(), math.nan) for title, images in panels.items()}
    figures.save_gif(path, frames, columns=5)


def draw_comparison(path, grids, dataset):
    """Draw grids of images by title. A frame marks images of which the classifier is not sure."""
    marked = {}
    if metrics.load_classifier(dataset=dataset):
        for title, images in grids.items():
            sureness = metrics.probabilities(images, dataset).max(1).values
            marked[title] = (sureness < SURE).nonzero().flatten().tolist()
    columns = {title: [images] for title, images in grids.items()}
    plotting.save_grid_table(path, columns, math.isqrt(NUM_COMPARED), marked=marked)


def draw_completions(path, network, real, labels, noise):
    """Draw the first test digit of each class, its upper half, and ten completions of the half by the network."""
    first = [(labels == label).nonzero()[0].item() for label in labels.unique()]
    originals, names = real[first], labels[first]
    repeated = names.repeat_interleave(COLUMNS)
    whose = repeated if isinstance(network, ConditionalPixelCNN) else len(repeated)
    given = originals[:, :, :ROWS_GIVEN].repeat_interleave(COLUMNS, 0)
    completed = network.sample(whose, noise, given=given).unflatten(0, (-1, COLUMNS))
    halves = originals.clone()
    halves[:, :, ROWS_GIVEN:] = 0.5
    rows = torch.cat([originals[:, None], halves[:, None], completed], 1).flatten(0, 1)
    headings = {"real": 0, "half": 1, "completions": (COLUMNS + 3) / 2}
    plotting.save_images(path, rows, COLUMNS + 2, names.tolist(), scale=0.28, headings=headings)


def write_metrics(run, network, train_set, test_set):
    """Write metrics.json, in single precision unless an entry says otherwise, and draw the figures that go with it."""
    conditional = isinstance(network, ConditionalPixelCNN)
    how, (images, labels) = run.options["binarize"], test_set
    protocol = dict(binarization=how, train_images=len(train_set[0]), test_images=len(images))
    x = binarize_test(images, how)
    machine.say("likelihoods of test and training images")
    nll = nll_of_draws(network, images, labels, how)
    train_nll = nll_of_draws(network, *(each[: len(images)] for each in train_set), how)
    run.draw("nll_map.png", plotting.save_map, nll.mean((0, 1, 2)), f"test NLL (nats per pixel, {how})")
    run.draw("nll_digits.png", draw_nll_digits, nll.mean(0), labels, how)
    field = receptive_field(network, x[:NUM_PROBED], labels[:NUM_PROBED], SEEN_FROM)
    run.draw("receptive_field.png", plotting.save_receptive_field, field, SEEN_FROM)
    given = "x_1, ..., x_{i-1}" + (", y" if conditional else "")
    formula, unit = f"-sum_i log p(x_i | {given}), mean over images", "nats per image"
    over = f"first {len(images)} training images"
    values, more = independent_values(nll), dict(draws=len(nll), **protocol)
    results = dict(
        test_nll=files.metric(values, unit, formula, **more),
        test_bits=files.metric(bits_per_pixel(values), "bits per pixel", "test_nll / (784 log 2)", **more),
        train_nll=files.metric(independent_values(train_nll), unit, formula, over=over, **more),
    )
    if conditional:
        results |= label_metrics(run, network, x, labels, protocol)
    samples, quality = metrics.judge_sampler(run, partial(sample_evenly, network), how)
    results |= quality
    if metrics.load_classifier(dataset=run.args.dataset):
        results |= classifier_metrics(samples, x, conditional, run.args.dataset)
    run.finish(HEADLINE, **results)


def classifier_metrics(samples, real, conditional, dataset):
    """Return how often the digit classifier is unsure, and how often it sees the digit of `sample_evenly`."""
    unsure, unsure_real = (metrics.probabilities(x, dataset).max(1).values < SURE for x in (samples, real))
    what = f"the digit classifier gives no digit a probability of {SURE:.0%}"
    more = dict(samples=len(samples))
    floor = unsure_real.double().mean().item()
    results = dict(unsure=files.metric(unsure, "share of samples", what, floor=floor, **more))
    if conditional:
        recognised = metrics.classify(samples, dataset) == torch.arange(len(samples)) % NUM_CLASSES
        more["by_digit"] = recognised.reshape(-1, NUM_CLASSES).double().mean(0).tolist()
        what = "the digit classifier sees the digit that was asked for"
        results["recognised"] = files.metric(recognised, "share of samples", what, **more)
    return results


def nll_of_draws(network, images, labels, how):
    """Return the NLL of every pixel, (draws, N, 1, 28, 28), for NUM_DRAWS draws of stochastic pixels."""
    num_draws = NUM_DRAWS if how == "stochastic" else 1
    x = binarize_test(images, how, num_draws)
    return pixel_nll(network, x, labels.repeat(num_draws)).unflatten(0, (num_draws, -1))


def independent_values(nll):
    """Return the values to average: the mean NLL of each draw, or of a single draw the NLL of each image."""
    totals = nll.sum((2, 3, 4))
    return totals.mean(1) if len(totals) > 1 else totals[0]


def label_metrics(run, network, x, labels, protocol):
    """Return the metrics of a conditional network as a classifier and as a mixture over labels; draw bayes.png."""
    with machine.autocast(run.device, run.options["precision"]):
        log_likelihoods = label_log_likelihoods(network, x)
    guesses = log_likelihoods.argmax(1)
    run.draw("bayes.png", plotting.save_confusion, labels, guesses, "label with the highest log p(x|y)")
    mixture_nll = math.log(NUM_CLASSES) - log_likelihoods.logsumexp(1)
    precision = "in the precision of the training"
    guess = f"argmax_y log p(x | y) is the label; {precision}"
    mixture = f"-log 1/10 sum_y p(x | y), which is told no label, mean over images; {precision}"
    return dict(
        bayes_accuracy=files.metric(guesses == labels, "share of test images", guess, **protocol),
        mixture_nll=files.metric(mixture_nll, "nats per image", mixture, **protocol),
    )


def draw_nll_digits(path, nll, labels, how):
    """Draw the mean NLL of each digit; nll is (N, 1, 28, 28)."""
    labels, nats = labels.cpu(), nll.sum((1, 2, 3)).cpu()
    sums = torch.zeros(NUM_CLASSES).index_add(0, labels, nats)
    means = (sums / labels.bincount(minlength=NUM_CLASSES).clamp(min=1)).tolist()
    plotting.save_bars(path, range(NUM_CLASSES), means, "digit", f"test NLL\n(nats per image, {how})")
