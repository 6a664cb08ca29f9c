"""Train the digit classifier of the metrics: `python -m utils.train_classifier`.

It learns from grey digits and from both binarisations of them, shifted by up to a pixel, so that it can judge the
samples of all three steps.

Writes into results/classifier/:
    floors.json    the metrics of 10,000 training images for each kind of pixels, as a reference for those of samples
    loss.png, losses.csv, metrics.json, config.json, model.pt
"""

import sys
from typing import Annotated

import torch
from torch.nn import functional as F

from models.classifier import Classifier
from utils import cli, files, plotting
from utils.data import NUM_HELD_OUT, batches, binarize
from utils.metrics import CLASSIFIER_STEP, NUM_SIGMA_IMAGES, compare

ENCODINGS = ("none", "threshold", "stochastic")
LARGEST_SHIFT = 1  # pixels


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
    steps = num_epochs * len(batches(*train_set, batch_size=batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    run.track(classifier=classifier, optimizer=optimizer, schedule=schedule)

    for epoch in run.epochs(num_epochs):
        for images, labels in run.batches(*train_set, batch_size=batch_size):
            encoding = ENCODINGS[torch.randint(len(ENCODINGS), ())]
            shift = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (2,)).tolist()
            x = binarize(images, encoding).roll(shift, (2, 3))
            with run.autocast():
                logits = classifier(x)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.record(loss=loss)
        row = dict(loss=run.means()["loss"], accuracy=accuracy(classifier, *test_set, "none"))
        run.log_epoch(epoch, **row)


@torch.no_grad()
def accuracy(classifier, images, labels, how, batch_size=1000):
    """Return the share of uint8 images whose digit the classifier sees, in eval mode."""
    classifier.eval()
    draw = torch.Generator(images.device).manual_seed(0)
    hits = sum(
        (classifier(binarize(x, how, draw)).argmax(1) == y).sum().item()
        for x, y in batches(images, labels, batch_size=batch_size)
    )
    classifier.train()
    return hits / len(images)


def write_floors(run, classifier, train_set, test_set):
    """Write floors.json: the metrics of as many training images as there are test images."""
    (train_images, _), (test_images, _) = train_set, test_set
    count = len(test_images)
    floors = {}
    for how in ENCODINGS:
        draw = torch.Generator(run.device).manual_seed(0)
        samples = binarize(train_images[:count], how, draw)
        sigma_images = binarize(train_images[-NUM_HELD_OUT:][:NUM_SIGMA_IMAGES], how, draw)
        floors[how] = compare(samples, binarize(test_images, how, draw), sigma_images, classifier)
    files.write_json(run.folder / "floors.json", floors)


def draw_losses(path, history):
    panels = [
        ("cross-entropy (nats)", {"training": history["loss"]}, {}),
        ("accuracy", {"test, grey": history["accuracy"]}, {}),
    ]
    plotting.save_curves(path, history["epoch"], panels)


def train_and_evaluate(run, train_set, test_set):
    test_set = run.limit(*test_set)
    classifier = Classifier().to(run.device, memory_format=torch.channels_last)
    train(run, classifier, train_set, test_set, **run.options)
    run.save_model(classifier)
    run.draw("loss.png", draw_losses, run.history)
    accuracies = {
        f"accuracy_{how}": files.metric(
            accuracy(classifier, *test_set, how),
            "share of test images",
            "the likeliest digit is the label",
            pixels=how,
            test_images=len(test_set[0]),
        )
        for how in ENCODINGS
    }
    write_floors(run, classifier.eval(), train_set, test_set)
    run.finish(**accuracies)


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    return cli.main(
        argv,
        script=__file__,
        description=__doc__,
        step=CLASSIFIER_STEP,
        training=train,
        train_and_evaluate=train_and_evaluate,
        variants={},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
