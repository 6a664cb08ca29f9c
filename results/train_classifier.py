"""Train the digit classifier of the metrics: `python results/train_classifier.py`.

It learns from grey digits and from both binarisations, shifted by up to a pixel, so that it can judge all three steps.
It writes the files of any run, and floors.json with the metrics of 10,000 real images, into results/classifier/.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.classifier import Classifier
from utils import cli, files, machine, plotting
from utils.data import NUM_HELD_OUT, binarize
from utils.metrics import CHUNK, CLASSIFIER_STEP, NUM_SIGMA_IMAGES, compare

STEP, VARIANTS = CLASSIFIER_STEP, {}
ENCODINGS = ("none", "threshold", "stochastic")


def train(
    run,
    classifier,
    train_set,
    test_set,
    *,
    num_epochs: Annotated[int, "passes over the training images"] = 12,
    batch_size: Annotated[int, "images in a batch"] = 128,
    learning_rate: Annotated[float, "peak of one cycle (Smith & Topin 2018, arXiv 1708.07120)"] = 2e-3,
):
    """Minimise the cross-entropy over uint8 images; every batch has one of the encodings and one shift."""
    optimizer = torch.optim.Adam(classifier.parameters())
    steps = num_epochs * math.ceil(len(train_set[0]) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    run.resume_or_start(classifier=classifier, optimizer=optimizer, schedule=schedule)

    for _ in run.epochs(num_epochs):
        for images, labels in run.batches(*train_set, batch_size=batch_size):
            encoding = ENCODINGS[torch.randint(len(ENCODINGS), ())]
            shift = torch.randint(-1, 2, (2,)).tolist()  # pixels
            x = binarize(images, encoding).roll(shift, (2, 3))
            with machine.autocast(run.device, "auto"):
                logits = classifier(x)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.record(loss=loss)
        row = run.pop_means() | dict(accuracy=accuracy(classifier, *test_set, "none"))
        run.log(epoch=run.epochs_done, **row)
        run.print_epoch(row)


@torch.no_grad()
def accuracy(classifier, images, labels, how):
    """Return the share of uint8 images whose digit the classifier sees, in eval mode."""
    classifier.eval()
    x = binarize(images, how, torch.Generator().manual_seed(0))
    hits = torch.cat([classifier(chunk).argmax(1) for chunk in x.split(CHUNK)]) == labels
    classifier.train()
    return hits.sum().item() / len(labels)


def train_and_evaluate(run, train_set, test_set):
    """Train the classifier; write its accuracy and, in floors.json, the metrics of real training images."""
    test_set = run.limit(*test_set)
    classifier = Classifier().to(run.device, memory_format=torch.channels_last)
    train(run, classifier, train_set, test_set, **run.options)
    run.save_model(classifier)
    history = run.tables["losses"]
    loss = ("cross-entropy (nats)", {"training": history["loss"]}, {})
    share = ("accuracy", {"test, grey": history["accuracy"]}, {})
    run.draw("loss.png", plotting.save_curves, history["epoch"], [loss, share], log=loss[:1])

    count, what = len(test_set[0]), ("share of test images", "the likeliest digit is the label")
    parts = train_set[0][:count], train_set[0][-NUM_HELD_OUT:][:NUM_SIGMA_IMAGES], test_set[0]
    floors, entries = {}, {}
    for how in ENCODINGS:
        value = accuracy(classifier, *test_set, how)
        entries[f"accuracy_{how}"] = files.metric(value, *what, pixels=how, test_images=count)
        draw = torch.Generator().manual_seed(0)
        samples, sigma_images, real = (binarize(images, how, draw) for images in parts)
        judged = compare(samples, real, sigma_images, classifier.eval())
        floors[how] = {name: entry["value"] for name, entry in judged.items()}
    files.write_json(run.folder / "floors.json", floors)
    run.finish(**entries)


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    return cli.main(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
