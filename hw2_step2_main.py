"""Step 2: PixelCNN on binarised MNIST, unconditional and class-conditional.

The network predicts each pixel from the pixels before it in raster order (van den Oord et al. 2016a,
arXiv 1601.06759). With --conditional the label enters every masked layer (2016b, arXiv 1606.05328).

    python hw2_step2_main.py                                         train with the defaults below
    python hw2_step2_main.py --conditional                           train the class-conditional network
    python hw2_step2_main.py --minutes 5                             train for five minutes, whatever the machine
    python hw2_step2_main.py --dry-run                               train on a few batches, to look around
    python hw2_step2_main.py --ablation                              train the variants, three minutes each
    python hw2_step2_main.py --conditional --sample-only --digit 7 --count 20     draw twenty sevens
    torchrun --standalone --nproc_per_node=2 hw2_step2_main.py       share the training between two processes or GPUs

Writes into results/step2_pixelcnn/ or results/step2_conditional_pixelcnn/:
    loss.png             negative log-likelihood (NLL) over the epochs, of test and training images
    samples.png          samples; the class-conditional network draws a row of each digit
    completions.png      test digits whose lower half the network has drawn
    drawing.gif          samples that appear pixel by pixel, and the probabilities that the network predicts
    nll_map.png          mean NLL of each pixel
    receptive_field.png  the pixels that a prediction depends on, and the blind spot
    losses.csv, batches.csv, per_image.npz, metrics.json, config.json, model.pt
and with --conditional:
    samples_digit.png    samples of the digit chosen with --digit
    comparison.png       real, unconditional and conditional images side by side
and after --ablation:
    ablation.csv         metrics of all variants
"""

import math
import sys
from typing import Annotated, Literal, Optional

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from models.AR import ConditionalPixelCNN, PixelCNN
from utils import cli, data, files, machine, parallel, pixelcnn_results
from utils.muon import Muon, split_parameters
from utils.options import Fraction, build, number
from utils.pixelcnn_results import bits_per_pixel, evaluate, network_inputs

STEP, CONDITIONAL_STEP = "step2_pixelcnn", "step2_conditional_pixelcnn"

VARIANTS = {
    "plain": ("what do the residual connections do?", dict(block="plain")),
    "gated": ("do gates earn their cost?", dict(block="gated", channels=24)),
    "no-pointwise": ("and the 1 x 1 layers of the blocks?", dict(pointwise=False)),
    "adam": ("does Muon earn its place?", dict(muon_rate=None)),
    "relu": ("does hard-swish matter, or is ReLU as good?", dict(activation="relu")),
    "first-7": ("does the wide first layer matter?", dict(first_kernel_size=7)),
    "no-position": ("does it help to know where in the image one is?", dict(positional=False)),
    "3x3": ("smaller kernels and more channels?", dict(kernel_size=3, channels=40)),
    "7x7": ("larger kernels and fewer channels?", dict(kernel_size=7, channels=24)),
    "wide": ("more channels in fewer blocks?", dict(channels=48, num_blocks=4)),
    "deep": ("fewer channels in more blocks?", dict(channels=24, num_blocks=12)),
    "batch-16": ("smaller batches and more steps?", dict(batch_size=16)),
    "batch-64": ("larger batches and fewer steps?", dict(batch_size=64)),
    "stochastic": ("how good is it on the scale of the literature?", dict(binarize="stochastic")),
    "long": ("what do width and a longer training buy?", dict(num_epochs=14, channels=48, distorted=0.5)),
    "large": (
        "how far does it go on a GPU?",
        dict(num_epochs=100, num_blocks=12, channels=96, batch_size=64, learning_rate=1e-3, distorted=0.5),
    ),
}

# Each run takes three minutes, three seeds of the default and one of each variant. Left out: other pixels, more time,
# other hardware.
ABLATION = dict(length=("--minutes", "3"), num_seeds=(3, 1), left_out=("stochastic", "long", "large"))
NETWORK = PixelCNN  # whose arguments are flags, too
SEVERAL_PROCESSES = True  # torchrun may start it


# Each argument after * is also a flag (num_epochs is --epochs), and so are those of PixelCNN. Annotated has its type
# and its --help text. Fraction is a number from 0 to 1 (utils/options.py).
def train(
    run,
    network,
    train_set,
    test_set,
    *,
    num_epochs: Annotated[int, "passes over the training images"] = 3,
    batch_size: Annotated[int, "images in a batch"] = 32,
    learning_rate: Annotated[float, "peak learning rate of Adam"] = 3e-3,
    muon_rate: Annotated[Optional[float], "peak rate of Muon; none: Adam trains all weights"] = 0.02,
    warm_up: Annotated[int, "steps in which the learning rates rise"] = 200,
    clip_norm: Annotated[float, "longer gradients are scaled down to this norm"] = 50.0,
    binarize: Annotated[Literal["threshold", "stochastic"], "x > 0.5, or Bernoulli(x) draws"] = "threshold",
    distorted: Annotated[Fraction, "share of training images that are rotated, scaled and sheared"] = 0.0,
    distorted_until: Annotated[Fraction, "share of the training after which no image is distorted"] = 0.8,
    precision: Annotated[Literal["auto", "float32", "bfloat16"], "auto: bfloat16 where it is fast"] = "auto",
):
    """Minimise the binary cross-entropy, which is the NLL, over uint8 images (N, 1, 28, 28)."""
    train_images, train_labels = train_set
    num_steps = num_epochs * math.ceil(len(train_images) / batch_size)

    def rate_factor(step):
        linear_rise = (step + 1) / warm_up
        linear_fall = 1 - run.fraction_done(step / num_steps)  # with --minutes, a fraction of the time
        return min(linear_rise, linear_fall)

    kernels, others = split_parameters(network)  # for Muon and for Adam, see utils/muon.py
    optimizer = Muon(kernels, others, muon_rate, learning_rate)
    schedule = LambdaLR(optimizer, rate_factor)
    criterion = nn.BCEWithLogitsLoss(reduction="sum")
    # `run` (utils/run.py) shuffles the images, counts batches from 1 in run.iteration, averages what run.record gets
    # and stops at NaN. Checkpoints hold what is named here, and --resume restores it. run.is_new: no batch so far.
    run.resume_or_start(network=network, optimizer=optimizer, schedule=schedule)
    parallel_network = parallel.wrap(network)  # the network itself, unless torchrun started several processes
    if run.is_new:
        log_epoch(run, network, train_set, test_set)

    for _ in run.epochs(num_epochs):
        for images, labels in run.batches(train_images, train_labels, batch_size=batch_size):
            if run.fraction_done((run.iteration - 1) / num_steps) < distorted_until:
                images = data.distort(images, distorted)
            x = data.binarize(images, binarize)
            with machine.autocast(run.device, precision):
                # x is input and target at once: the masks hide each pixel from its own prediction.
                logits = parallel_network(*network_inputs(network, x, labels))  # x, or x and one-hot labels
            loss = criterion(logits.float(), x) / len(x)  # the mean NLL of an image, in nats
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            schedule.step()
            run.record(loss=loss)
        log_epoch(run, network, train_set, test_set)


@parallel.first_process
def log_epoch(run, network, train_set, test_set):
    """Measure the NLL of the test images and of as many training images; add it to losses.csv and print it.

    Before the training the test images alone are measured. The evaluation has the precision of the training.
    """
    epoch, count = run.epochs_done, len(test_set[0])
    sets = {"train": train_set, "test": test_set} if epoch else {"test": test_set}
    row = dict(batch_nll=run.pop_means().get("loss"), train_nll=None)
    with machine.autocast(run.device, run.options["precision"]):
        for name, (images, labels) in sets.items():
            row[f"{name}_nll"] = evaluate(network, images[:count], labels[:count], run.options["binarize"])
    run.log(epoch=epoch, **row, test_bits=bits_per_pixel(row["test_nll"]))
    run.print_epoch({f"{name} NLL": row[f"{name}_nll"] for name in sets}, "nats per image")


def build_network(conditional, **architecture):
    """Return the class-conditional or the unconditional network."""
    return build(ConditionalPixelCNN if conditional else PixelCNN, **architecture)


def load_model(path, device="cpu", steps=(STEP, CONDITIONAL_STEP)):
    """Return the network of a model.pt of one of these steps, unconditional or conditional, in eval mode."""
    return files.load_network(path, steps, build_network, device)


def train_and_evaluate(run, train_set, test_set):
    conditional = run.args.conditional
    test_subset = run.limit(*test_set)  # all of it; a few batches in a dry run
    architecture = run.arguments(PixelCNN)  # of run.options, the arguments of PixelCNN
    network = build_network(conditional, **architecture).to(run.device, memory_format=torch.channels_last)
    train(run, network, train_set, test_subset, **run.arguments(train))
    if not parallel.leave():
        return  # the first process does the rest
    network.eval()
    run.save_model(network, conditional=conditional, **architecture)
    losses, batches = run.tables["losses"], run.tables["batches"]
    run.draw("loss.png", pixelcnn_results.draw_losses, losses, batches, run.options["binarize"])
    pixelcnn_results.draw_samples(run, network, test_set, load_unconditional(run))
    pixelcnn_results.write_metrics(run, network, train_set, test_subset)


def sample(run, path, test_set):
    network = load_model(path, run.device, (run.step,))
    trained_on = files.options_of(path).get("binarize")
    if trained_on is None:
        machine.say(f"{path} does not say its pixels: we take --binarize {run.options['binarize']}")
    run.options["binarize"] = trained_on or run.options["binarize"]
    pixelcnn_results.draw_samples(run, network, test_set, load_unconditional(run))


def load_unconditional(run):
    """Return the unconditional network of the same variant, for comparison.png, or None where there is none."""
    if not run.args.conditional:
        return None
    parts = [] if run.args.dataset == data.DATASETS[0] else [f"dataset={run.args.dataset}"]
    try:
        path = cli.default_folder(STEP, run.args.variant, parts) / "model.pt"
        return load_model(path, run.device, (STEP,))
    except files.UserError as error:
        machine.say(f"comparison.png lacks unconditional samples: {error}")
        return None


def add_flags(group):
    group.add_argument("--conditional", action="store_true", help="train the class-conditional network")
    what = "digit of samples_digit.png, with --conditional (3)"
    group.add_argument("--digit", type=int, choices=range(10), metavar="D", help=what)
    what = "with --sample-only: draw completions of these test digits"
    group.add_argument("--complete", type=number(0), nargs="+", metavar="INDEX", help=what)


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    return cli.main(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
