"""How good samples are: `judge(images)` compares a tensor of images with the test images of MNIST.

    from utils.metrics import judge
    figures = judge(images)  # (N, 1, 28, 28) floats in [0, 1], of whatever model; 10,000 are usual
    figures["frechet_distance"]["value"]

The metrics rest on the features and verdicts of one fixed digit classifier, `results/classifier/model.pt`
(`utils.train_classifier` trains it), so that their values compare with one another and not with other papers'.
Beside each of 10,000 samples stands its floor, a reference and not a bound: the same metric of as many training images.
"""

import functools
import json
import math
import time

import torch
from tqdm import tqdm

from models.classifier import NUM_CLASSES, Classifier
from utils import runs
from utils.data import binarize, load_mnist

CLASSIFIER_STEP = "classifier"
CLASSIFIER_FOLDER = runs.ROOT / "results" / CLASSIFIER_STEP
IMAGE_SHAPE = (1, 28, 28)
NUM_JUDGED = 10_000  # samples, as many as there are test images
NUM_JUDGED_QUICKLY = 200  # in a dry run
NEIGHBOURS = 5  # the k of precision, recall, density and coverage
NUM_SIGMA_IMAGES = 1000  # held-out images that choose the Parzen window's width
CHUNK = 1000


def judge(images, pixels="none", held_out=False, data_dir=runs.ROOT / "data", num_real=None):
    """Every metric of samples (N, 1, 28, 28) in [0, 1], as entries for metrics.json; 10,000 are usual.

    Args:
        pixels: encoding of the real images to compare with, 'none' for grey, or 'threshold' or 'stochastic'.
        held_out: compare with the last 10,000 training images in place of the test images.
        num_real: compare with the first so many alone, where time matters more than the figures. They depend
            on the number, so there is no floor then.

    Raises:
        ValueError: the images have another shape, values that are not finite or outside [0, 1], or are too few.
    """
    _require_images(images)
    _, (reference, _) = load_mnist(data_dir, images.device, held_out)
    reference = reference[:num_real]
    sigma_images = load_mnist(data_dir, images.device, held_out=True)[1][0][:NUM_SIGMA_IMAGES]
    draw = torch.Generator(images.device).manual_seed(0)
    values = compare(
        images,
        binarize(reference, pixels, draw),
        binarize(sigma_images, pixels, draw),
        load_classifier(images.device),
    )
    against = f"{len(reference)} {'held-out training' if held_out else 'test'} images, pixels {pixels}"
    comparable = len(images) == NUM_JUDGED and not (held_out or num_real)
    floors = _floors().get(pixels, {}) if comparable else {}
    return {
        name: runs.metric(
            value, *DESCRIPTIONS[name], samples=len(images), against=against, floor=floors.get(name)
        )
        for name, value in values.items()
    }


def judge_sampler(run, sample, pixels="none"):
    """Draw 10,000 images with `sample(count, generator)` and judge them: (the images, entries for metrics.json).

    The entries have the time that drawing takes, too. A dry run is quick: few samples against as many real images.
    """
    noise = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    sample(64, noise).cpu()
    seconds = time.perf_counter() - started
    few = NUM_JUDGED_QUICKLY if run.args.dry_run else None
    count = few or NUM_JUDGED
    starts = tqdm(range(0, count, CHUNK), "drawing samples", unit="chunk", disable=None, leave=False)
    images = torch.cat([sample(min(CHUNK, count - start), noise).cpu() for start in starts])
    entries = judge(images, pixels, run.args.held_out, run.args.data_dir, num_real=few)
    entries["sampling_time"] = runs.metric(
        seconds, "seconds", "wall time of drawing 64 images", hardware=runs.hardware(run.device)
    )
    return images, entries


def _require_images(images):
    if not torch.is_tensor(images) or not images.is_floating_point():
        raise ValueError("judge takes a tensor of floats in [0, 1]: divide bytes by 255")
    if images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"judge takes images (N, 1, 28, 28), not {tuple(images.shape)}")
    if len(images) <= NEIGHBOURS:
        raise ValueError(f"judge takes at least {NEIGHBOURS + 1} images, not {len(images)}")
    if not torch.isfinite(images).all():
        raise ValueError("judge takes finite pixels: some are not")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"judge takes pixels in [0, 1], not from {low:.3g} to {high:.3g}")


# Unit and formula of each metric.
DESCRIPTIONS = dict(
    frechet_distance=(
        "squared features",
        "|m_s - m_r|^2 + tr(C_s + C_r - 2 (C_s C_r)^(1/2)) of the classifier's features",
    ),
    classifier_score=("effective digits, 1 to 10", "exp(mean KL(p(y|x) || p(y)))"),
    largest_share=("share of samples", "share of the most frequent digit, by the classifier"),
    smallest_share=("share of samples", "share of the rarest digit, by the classifier"),
    share_distance=("total variation, 0 to 0.9", "1/2 sum_y |share_y - 1/10|"),
    precision=(
        "share of samples",
        f"samples within the ball of a real image, to its neighbour no. {NEIGHBOURS}, in features",
    ),
    recall=(
        "share of real images",
        f"real images within the ball of a sample, to its neighbour no. {NEIGHBOURS}, in features",
    ),
    density=("ratio", f"balls of real images around a sample / {NEIGHBOURS}, mean over samples"),
    coverage=("share of real images", "real images with a sample in their ball"),
    parzen=("nats per image", "mean log-density under Gaussians of width sigma at the samples"),
    parzen_error=("nats per image", "standard error of the Parzen log-likelihood's mean"),
    parzen_sigma=("pixel intensity", "of logspace(-1, 0, 10), the best on held-out training images"),
)


def compare(samples, real, sigma_images, classifier):
    """The metrics as a dict of floats, for (N, 1, 28, 28) samples and real images in [0, 1]."""
    sample_features, probabilities = _features(samples, classifier)
    real_features, _ = _features(real, classifier)
    shares = digit_shares(probabilities.argmax(1))
    parzen, error, sigma = parzen_log_likelihood(samples, real, sigma_images)
    return dict(
        frechet_distance=frechet_distance(sample_features, real_features),
        classifier_score=classifier_score(probabilities),
        largest_share=shares.max().item(),
        smallest_share=shares.min().item(),
        share_distance=(shares - 1 / NUM_CLASSES).abs().sum().item() / 2,
        **neighbour_metrics(sample_features, real_features),
        parzen=parzen,
        parzen_error=error,
        parzen_sigma=sigma,
    )


# ---------------------------------------------------------------------------------------------------------
# The classifier


@functools.cache
def load_classifier(device="cpu"):
    """The trained digit classifier, in eval mode."""
    return runs.load_network(CLASSIFIER_FOLDER / "model.pt", (CLASSIFIER_STEP,), Classifier, device)


def classify(images):
    """The digit that the classifier sees in each image, (N,) integers, for (N, 1, 28, 28) in [0, 1]."""
    images = images.cpu()  # in double precision, which not every accelerator has
    return _features(images, load_classifier(images.device))[1].argmax(1)


@torch.no_grad()
def _features(images, classifier):
    """Features (N, 64) and probabilities (N, 10) of images, in double precision."""
    features = torch.cat([classifier.features(x) for x in images.split(CHUNK)])
    return features.double(), classifier.to_logits(features).double().softmax(1)


@functools.cache
def _floors():
    """The metrics of real training images by encoding, as `utils.train_classifier` has written them."""
    try:
        return json.loads((CLASSIFIER_FOLDER / "floors.json").read_text())
    except FileNotFoundError:
        return {}


# ---------------------------------------------------------------------------------------------------------
# The metrics


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians with the moments of features a (N, d) and b (M, d).

    Heusel et al. 2017 (arXiv 1706.08500), Eq. 6, on other features than theirs. It falls with the number of
    samples, so compare equal numbers.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def classifier_score(probabilities):
    """exp(E KL(p(y|x) || p(y))), 1 for samples that all look alike or like nothing, 10 for ten clear digits.

    The Inception score (Salimans et al. 2016, arXiv 1606.03498, section 4) with p(y|x), (N, 10), of the digit
    classifier.
    """
    marginal = probabilities.mean(0)
    kl = torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(probabilities, marginal)
    return kl.sum(1).mean().exp().item()


def digit_shares(labels):
    """Share of each digit among labels (N,): (10,)."""
    return labels.bincount(minlength=NUM_CLASSES).double() / len(labels)


def neighbour_metrics(samples, real, k=NEIGHBOURS):
    """Precision, recall, density and coverage of features, samples (N, d) and real (M, d), N and M above k.

    Precision and recall: Kynkaanniemi et al. 2019 (arXiv 1904.06991), Eq. 2; density and coverage, which are
    less moved by outliers: Naeem et al. 2020 (arXiv 2002.09797), section 3.
    """
    sample_radius, real_radius = _radius(samples, k), _radius(real, k)
    balls_around, recalled, covered = torch.zeros(len(samples), device=samples.device), 0, 0
    for start in range(0, len(real), CHUNK):
        chunk = slice(start, start + CHUNK)
        distance = torch.cdist(real[chunk], samples)  # (chunk, N)
        in_real_ball = distance <= real_radius[chunk, None]
        balls_around += in_real_ball.sum(0)
        covered += in_real_ball.any(1).sum().item()
        recalled += (distance <= sample_radius).any(1).sum().item()
    return dict(
        precision=(balls_around > 0).double().mean().item(),
        recall=recalled / len(real),
        density=balls_around.double().mean().item() / k,
        coverage=covered / len(real),
    )


def _radius(x, k):
    """Distance of each point to its k-th nearest other point, (N,)."""
    # The nearest is the point itself.
    return torch.cat([torch.cdist(chunk, x).kthvalue(k + 1, dim=1).values for chunk in x.split(CHUNK)])


def parzen_log_likelihood(samples, test, validation, sigmas=None):
    """Mean log-density of test images under a Parzen window at the samples: (mean, standard error, sigma).

    Images in [0, 1]; nats per image; sigma is the width out of `sigmas`, by default logspace(-1, 0, 10), that
    is best on the validation images. The protocol of Goodfellow et al. 2014 (section 5). The estimate is far from
    the true log-likelihood with any feasible number of samples, and ranks models wrongly: the centres of
    k-means score above the training images themselves (Theis et al. 2016, arXiv 1511.01844). So read
    it beside the score of the training images, and trust the other metrics more.
    """
    sigmas = torch.logspace(-1, 0, 10).tolist() if sigmas is None else sigmas
    samples, test, validation = (images.flatten(1) for images in (samples, test, validation))
    densities = _log_densities(validation, samples, sigmas).mean(1)
    best = sigmas[densities.argmax()]
    (density,) = _log_densities(test, samples, [best])
    return density.mean().item(), (density.std() / math.sqrt(len(density))).item(), best


def _log_densities(x, centres, sigmas):
    """log of the mean of N(x; centre, sigma^2 I) over the centres, for each sigma and row of x: (sigmas, rows)."""
    norms = [math.log(len(centres)) + x.shape[1] / 2 * math.log(2 * math.pi * sigma**2) for sigma in sigmas]
    densities = []
    for chunk in x.split(CHUNK):
        squares = torch.cdist(chunk, centres).square()
        densities.append(
            torch.stack(
                [(squares / (-2 * sigma**2)).logsumexp(1) - norm for sigma, norm in zip(sigmas, norms)]
            )
        )
    return torch.cat(densities, 1)


def nearest(samples, images):
    """Index of the image nearest to each sample in pixels, Euclidean: (N,)."""
    samples, images = samples.flatten(1), images.flatten(1)
    return torch.cat([torch.cdist(chunk, images).argmin(1) for chunk in samples.split(CHUNK)])


def neighbour_accuracy(points, labels, references, reference_labels):
    """Share of points (N, ...) whose nearest reference (M, ...), Euclidean, has their label: a float."""
    return (reference_labels[nearest(points, references)] == labels).float().mean().item()
