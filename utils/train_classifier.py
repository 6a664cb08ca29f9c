"""The digit classifier that the metrics rest on: `python -m utils.train_classifier`.

It learns from grey digits and from both binarisations of them, shifted by up to a pixel, so that it can judge the
samples of all three steps.

Writes into results/classifier/:
    floors.json    the metrics of 10,000 training images, by encoding, which no model can be asked to beat
    loss.png, losses.csv, metrics.json, config.json, model.pt
"""

import torch
from torch.nn import functional as F

from models.classifier import Classifier
from utils import plotting, runs
from utils.data import NUM_HELD_OUT, batches, binarize, load_mnist
from utils.metrics import CLASSIFIER_STEP, NUM_SIGMA_IMAGES, compare

DEFAULTS = dict(
    num_epochs=12,  # passes over the 60,000 training images
    batch_size=128,
    learning_rate=2e-3,  # peak of one cycle (Smith & Topin 2018, arXiv 1708.07120)
    largest_shift=1,  # pixels
)
ENCODINGS = ("none", "threshold", "stochastic")


def train(run, classifier, train_set, test_set):
    """Minimise the cross-entropy over uint8 images; every batch has one of the encodings and one shift."""
    options = run.options
    optimizer = torch.optim.Adam(classifier.parameters())
    steps = options["num_epochs"] * len(batches(*train_set, options["batch_size"]))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options["learning_rate"], steps)
    run.start(classifier=classifier, optimizer=optimizer, schedule=schedule)

    for epoch in run.epochs(options["num_epochs"]):
        for images, labels in run.progress(batches(*train_set, options["batch_size"], run.order())):
            encoding = ENCODINGS[torch.randint(len(ENCODINGS), ())]
            largest = options["largest_shift"]
            shift = torch.randint(-largest, largest + 1, (2,)).tolist()
            x = binarize(images, encoding).roll(shift, (2, 3))
            with run.autocast():
                logits = classifier(x)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.add(len(x), loss=loss.item())
        row = dict(loss=run.means()["loss"], accuracy=accuracy(classifier, *test_set, "none"))
        run.log(epoch=epoch, **row)
        run.say(epoch, **row)


@torch.no_grad()
def accuracy(classifier, images, labels, how, batch_size=1000):
    """Share of uint8 images whose digit the classifier sees, in eval mode."""
    classifier.eval()
    draw = torch.Generator(images.device).manual_seed(0)
    hits = sum(
        (classifier(binarize(x, how, draw)).argmax(1) == y).sum().item()
        for x, y in batches(images, labels, batch_size)
    )
    classifier.train()
    return hits / len(images)


def write_floors(run, classifier, train_set, test_set):
    """floors.json: what `metrics.compare` says of as many training images as there are test images."""
    (train_images, _), (test_images, _) = train_set, test_set
    count = len(test_images)
    floors = {}
    for how in ENCODINGS:
        draw = torch.Generator(run.device).manual_seed(0)
        samples = binarize(train_images[:count], how, draw)
        sigma_images = binarize(train_images[-NUM_HELD_OUT:][:NUM_SIGMA_IMAGES], how, draw)
        floors[how] = compare(samples, binarize(test_images, how, draw), sigma_images, classifier)
    runs.write_json(run.folder / "floors.json", floors)


def main():
    parser = runs.make_parser(__doc__, DEFAULTS)
    args = parser.parse_args()
    run = runs.Run(CLASSIFIER_STEP, args, runs.choose_options(parser, args, DEFAULTS, {}))
    train_set, test_set = load_mnist(args.data_dir, run.device, args.held_out)
    train_set, test_set = run.limit(*train_set), run.limit(*test_set)
    classifier = Classifier().to(run.device, memory_format=torch.channels_last)
    train(run, classifier, train_set, test_set)
    runs.save_model(run.folder / "model.pt", CLASSIFIER_STEP, classifier, {})
    accuracies = {
        f"accuracy_{how}": runs.metric(
            accuracy(classifier, *test_set, how),
            "share of test images",
            "the likeliest digit is the label",
            pixels=how,
            test_images=len(test_set[0]),
        )
        for how in ENCODINGS
    }
    run.finish(**accuracies)
    write_floors(run, classifier.eval(), train_set, test_set)
    panels = [
        ("cross-entropy (nats)", {"training": run.history["loss"]}, {}),
        ("accuracy", {"test, grey": run.history["accuracy"]}, {}),
    ]
    plotting.save_curves(run.folder / "loss.png", run.history["epoch"], panels)


if __name__ == "__main__":
    runs.run_main(main)
