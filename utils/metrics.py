"""Metrics of samples: `judge(images)["frechet_distance"]["value"]` compares images with the test images of MNIST.

The metrics use one fixed digit classifier, `results/classifier/model.pt`, from `results/train_classifier.py`. So
their values compare with one another, and not with other papers' values. For scale, each metric of 10,000 samples has a
`floor`: the same metric of 10,000 real training images. A model can score better than this reference.
"""

import functools
import hashlib
import io
import math
import time

import numpy as np
import torch

from models.classifier import Classifier
from models.common import IMAGE_SHAPE, NUM_CLASSES, checked
from utils import files, machine
from utils.data import DATASETS, NUM_HELD_OUT, binarize, load_data
from utils.files import ROOT
from utils.machine import progress

CLASSIFIER_STEP = "classifier"
NUM_JUDGED = 10_000  # samples, as many as there are test images
NUM_JUDGED_QUICKLY = 200  # in a dry run, and for a network that draws slowly
NUM_DRAWS = 5  # of stochastic pixels (and z), over which the final metrics of steps 2 and 3 are means
NEIGHBOURS = 5  # the k of precision, recall and coverage
# Grey samples are judged by these once more after thresholding, which all three steps have in common.
ONE_SCALE = ("frechet_distance", "classifier_score", "precision", "recall", "coverage")
NUM_SIGMA_IMAGES = 1000  # held-out images that choose the Parzen window's width
SIGMAS = torch.logspace(-1, 0, 10, dtype=torch.float32).tolist()  # widths of the Parzen window to choose from
CHUNK = 1000  # images that are drawn, encoded or compared at once


def judge(images, pixels="none", held_out=False, data_dir=ROOT / "data", dataset="MNIST"):
    """Return every metric of samples (N, 1, 28, 28) in [0, 1] as entries for metrics.json; 10,000 are usual.

    The real images are the test images or, if `held_out`, the last 10,000 training images. Their `pixels` are 'none'
    (grey), 'threshold' or 'stochastic'. Fewer than 10,000 samples are compared with as many real images, and have no
    floor. Without a classifier of the data set there is Parzen's metric alone.
    """
    images = checked("images", images, ("N", *IMAGE_SHAPE), images).float()
    low, high = images.min(), images.max()
    if len(images) <= NEIGHBOURS or not (low >= 0 and high <= 1):  # which NaN is not, either
        takes = f"at least {NEIGHBOURS + 1} images in [0, 1]"
        raise ValueError(f"images takes {takes}, not {len(images)} from {low:.3g} to {high:.3g}")
    (train_images, _), (test_images, _) = load_data(data_dir, dataset, images.device)
    held_out_images, draw = train_images[-NUM_HELD_OUT:], torch.Generator().manual_seed(0)
    real = binarize((held_out_images if held_out else test_images)[: len(images)], pixels, draw)
    sigma_images = binarize(held_out_images[:NUM_SIGMA_IMAGES], pixels, draw)
    classifier = load_classifier(images.device, dataset) if has_classifier(dataset) else None
    has_floors = classifier and len(images) == NUM_JUDGED and not held_out
    floors = files.read_json(classifier_folder(dataset) / "floors.json")[pixels] if has_floors else {}
    against = f"{len(real)} {'held-out training' if held_out else 'test'} images, pixels {pixels}"
    entries = compare(images, real, sigma_images, classifier)
    for name, entry in entries.items():
        entry |= dict(samples=len(images), against=against, floor=floors.get(name))
    return entries


def judge_sampler(run, sample, pixels="none", count=NUM_JUDGED):
    """Draw `count` images, few in a dry run, with `sample(count, generator)`; return them and their metrics."""
    machine.say("quality of samples")
    noise, started = torch.Generator().manual_seed(0), time.perf_counter()
    sample(64, noise).cpu()
    seconds = time.perf_counter() - started
    images = draw_in_chunks(sample, NUM_JUDGED_QUICKLY if run.args.dry_run else count, noise)
    entries = judge_for(run, images, pixels)
    if pixels == "none":
        entries |= judge_binary(run, images)
    what, hardware = "wall time of drawing 64 images", machine.hardware(run.device)
    entries["sampling_time"] = files.metric(seconds, "seconds", what, hardware=hardware)
    return images, entries


def judge_for(run, images, pixels):
    """Return `judge` of a run's samples."""
    return judge(images, pixels, run.args.held_out, run.args.data_dir, run.args.dataset)


def judge_binary(run, images, name="", how="threshold"):
    """Return metrics of samples whose pixels are made binary by `how`: a "threshold", or "stochastic" draws.

    All steps have thresholded pixels in common. Draws are the samples of a model that gives each pixel a probability.
    `name` and `how` end the keys.
    """
    if len(images) <= NEIGHBOURS:  # in a dry run of very small batches
        return {}
    thresholds = torch.full_like(images, 0.5)
    if how == "stochastic":
        draw = torch.Generator().manual_seed(0)
        thresholds = torch.rand(images.shape, generator=draw, dtype=torch.float32).to(images)
    entries = judge_for(run, (images > thresholds).float().cpu(), how)
    return {f"{key}{name}_{how}": entries[key] for key in ONE_SCALE if key in entries}


def draw_in_chunks(sample, count, generator):
    """Draw images with `sample(count, generator)`, few at once to save memory: (count, 1, 28, 28) on the CPU."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    return torch.cat([sample(size, generator).cpu() for size in progress(sizes, "images drawn")])


IN_FEATURES = f"the k-NN neighbourhood, k = {NEIGHBOURS}, in features"
FRECHET = "|m_s - m_r|^2 + tr(C_s + C_r - 2 (C_s C_r)^(1/2)) of the classifier's features"
# Unit and formula of each metric.
DESCRIPTIONS = dict(
    frechet_distance=("squared features", FRECHET),
    classifier_score=("effective digits, 1 to 10", "exp(mean KL(p(y|x) || p(y)))"),
    largest_share=("share of samples", "share of the most frequent digit, by the classifier"),
    smallest_share=("share of samples", "share of the rarest digit, by the classifier"),
    precision=("share of samples", f"samples in {IN_FEATURES}, of a real image"),
    recall=("share of real images", f"real images in {IN_FEATURES}, of a sample"),
    coverage=("share of real images", f"real images with a sample in {IN_FEATURES}"),
    parzen=("nats per image", "mean log-density under Gaussians of width sigma at the samples"),
    parzen_sigma=("pixel intensity", "of logspace(-1, 0, 10), the best on held-out training images"),
)


def compare(samples, real, sigma_images, classifier=None):
    """Return entries for metrics.json about samples (N, 1, 28, 28) in [0, 1]; without a classifier, Parzen's alone."""
    entries, values = {}, {}
    if classifier:
        features, of_class = _features(samples, classifier)
        real_features, _ = _features(real, classifier)
        distance = functools.partial(frechet_distance, b=real_features)
        judged = dict(frechet_distance=(distance, features), classifier_score=(classifier_score, of_class))
        for name, (statistic, x) in judged.items():
            error = jackknife_error(statistic, x)
            entries[name] = files.metric(statistic(x), *DESCRIPTIONS[name], standard_error=error)
        digits = of_class.argmax(1)
        counts = digits.bincount(minlength=NUM_CLASSES)
        values = dict(largest_share=digits == counts.argmax(), smallest_share=digits == counts.argmin())
        values |= neighbour_metrics(features, real_features)
    values["parzen"], values["parzen_sigma"] = parzen_log_likelihood(samples, real, sigma_images)
    return entries | {name: files.metric(value, *DESCRIPTIONS[name]) for name, value in values.items()}


def save_per_image(folder, x, values):
    """Write per_image.npz: values of test images by name, (draws, N) each, and a check sum of their pixels x."""
    pixels, buffer = hashlib.sha256(x.bool().cpu().numpy().tobytes()).hexdigest(), io.BytesIO()
    arrays = {name: each.float().cpu().numpy() for name, each in values.items()}
    np.savez_compressed(buffer, pixels=pixels, **arrays)
    files.write_atomically(folder / "per_image.npz", buffer.getvalue())


def jackknife_error(statistic, x, groups=10):
    """Return the standard error of `statistic(x)`, a float, by leaving out one of ten groups of rows after another.

    Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 11.5, with groups in place of single rows.
    """
    parts = x.chunk(groups)
    rest = [torch.cat(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
    values = torch.tensor([statistic(each) for each in rest], dtype=torch.float64)
    return ((len(parts) - 1) * values.var(correction=0)).sqrt().item()


def classifier_folder(dataset):
    folder = ROOT / "results" / CLASSIFIER_STEP
    return folder if dataset == DATASETS[0] else folder / "runs" / f"dataset={dataset}"


def has_classifier(dataset):
    return (classifier_folder(dataset) / "model.pt").exists()


@functools.cache
def load_classifier(device="cpu", dataset="MNIST"):
    """Return the trained classifier of a data set in eval mode; raise UserError if none has been trained."""
    path = classifier_folder(dataset) / "model.pt"
    return files.load_network(path, (CLASSIFIER_STEP,), Classifier, device).float()


def say_what_is_left_out(dataset):
    """Print what a run leaves out if there is no classifier of its data set."""
    if not has_classifier(dataset):
        what = "most metrics of samples, quality.png and frames in comparison.png are left out"
        command = f"python results/train_classifier.py --dataset {dataset}"
        machine.say(f"there is no classifier of {dataset}: {what}; {command} trains one")


def probabilities(images, dataset="MNIST"):
    """Return the classifier's probability of each class for images (N, 1, 28, 28) in [0, 1]: (N, 10), on the CPU."""
    return _features(images, load_classifier(images.device, dataset))[1]


@torch.no_grad()
def _features(images, classifier):
    """Return features (N, 64) and probabilities (N, 10) of images, in double precision on the CPU."""
    parts = progress(images.float().split(CHUNK), "classifier")
    features = torch.cat([classifier.features(x) for x in parts])
    return features.cpu().double(), classifier.to_logits(features).cpu().double().softmax(1)


def frechet_distance(a, b):
    """Return the squared Frechet distance of Gaussians with the moments of features a (N, d) and b (M, d).

    Heusel et al. 2017 (arXiv 1706.08500), Eq. 6. The distance falls with the number of samples, so compare equal ones.
    """
    mean_a, mean_b, cov_a, cov_b = a.mean(0), b.mean(0), a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def classifier_score(probabilities):
    """Return exp(E KL(p(y|x) || p(y))) of p(y|x), (N, 10): the Inception score of Salimans et al. 2016, section 4."""
    marginal = probabilities.mean(0)
    kl = torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(probabilities, marginal)
    return kl.sum(1).mean().exp().item()


def neighbour_metrics(samples, real, k=NEIGHBOURS):
    """Return precision, recall and coverage of features, samples (N, d) and real (M, d), N and M above k.

    Each is a tensor with a value of every sample or real image, whose mean is the metric. The k-NN neighbourhood of a
    point reaches to its k-th nearest neighbour. Precision and recall: Kynkaanniemi et al. 2019 (arXiv 1904.06991),
    Eq. 2. Coverage: Naeem et al. 2020 (arXiv 2002.09797), section 3.
    """
    sample_radius = _radius(samples, k)
    precise, recalled, covered = samples.new_zeros(len(samples), dtype=torch.bool), [], []
    parts = list(zip(real.split(CHUNK), _radius(real, k).split(CHUNK)))
    for chunk, real_radius in progress(parts, "nearest neighbours"):
        distance = torch.cdist(chunk, samples)  # (chunk, N)
        in_neighbourhood = distance <= real_radius[:, None]
        precise |= in_neighbourhood.any(0)
        covered.append(in_neighbourhood.any(1))
        recalled.append((distance <= sample_radius).any(1))
    return dict(precision=precise, recall=torch.cat(recalled), coverage=torch.cat(covered))


def _radius(x, k):
    """Return the distance of each point to its k-th nearest other point, (N,); the nearest is the point itself."""
    parts = progress(x.split(CHUNK), "nearest neighbours")
    return torch.cat([torch.cdist(chunk, x).kthvalue(k + 1, dim=1).values for chunk in parts])


def parzen_log_likelihood(samples, test, validation, sigmas=SIGMAS):
    """Return the log-density of each test image (M, ...) under a Parzen window at the samples (N, ...).

    Goodfellow et al. 2014, section 5. It ranks models wrongly: centres of k-means score above training images (Theis
    et al. 2016, arXiv 1511.01844). Returns densities (M,) in nats, and sigma, the best for the validation images.
    """
    samples, test, validation = (images.flatten(1) for images in (samples, test, validation))
    tried = progress(sigmas, "width of the Parzen window")
    best = max(tried, key=lambda sigma: _log_density(validation, samples, sigma).mean())
    return _log_density(test, samples, best), best


def _log_density(x, centres, sigma):
    """Return log mean_centre N(x; centre, sigma^2 I) for each row of x, (N,)."""
    norm = math.log(len(centres)) + x.shape[1] / 2 * math.log(2 * math.pi * sigma**2)
    distances = (torch.cdist(chunk, centres) for chunk in progress(x.split(CHUNK), "Parzen window"))
    return torch.cat([(each.square() / (-2 * sigma**2)).logsumexp(1) - norm for each in distances])


def nearest(samples, images):
    """Return the index of the image nearest to each sample in pixels, Euclidean: (N,)."""
    samples, images = samples.flatten(1), images.flatten(1)
    chunks = progress(samples.split(CHUNK), "nearest images")
    return torch.cat([torch.cdist(chunk, images).argmin(1) for chunk in chunks])
