"""Step 2: PixelCNN on binarised MNIST, unconditional and class-conditional.

The network predicts each pixel from the pixels before it in raster order (van den Oord et al. 2016a,
arXiv 1601.06759); with --conditional the label enters every masked layer (2016b, arXiv 1606.05328).

    python hw2_step2_main.py                          train with the defaults below
    python hw2_step2_main.py --conditional --digit 3  the class-conditional network, and a grid of threes
    python hw2_step2_main.py --dry-run                a few batches, to look around
    python hw2_step2_main.py --sample-only            draw from the trained network

Writes into results/step2_pixelcnn/ or results/step2_conditional_pixelcnn/:
    loss.png           negative log-likelihood of training and test images over the epochs
    samples.png        samples; with --conditional a row of each digit
    samples_digit.png  with --conditional: samples of the digit chosen with --digit
    comparison.png     with --conditional: real, unconditional and conditional images side by side
    losses.csv, metrics.json, config.json, model.pt
"""

import math
import time

import torch
from torch import nn
from torch.nn import functional as F

from models.AR import ConditionalPixelCNN, PixelCNN
from utils import ablation, plotting, runs
from utils.data import batches, binarize, load_mnist

STEP, CONDITIONAL_STEP = "step2_pixelcnn", "step2_conditional_pixelcnn"

ARCHITECTURE = dict(
    num_layers=8,  # type-B layers between the type-A layer and the head
    channels=32,  # feature maps of each
    kernel_size=7,  # of every layer but the head's two
    head_channels=64,  # feature maps between the two 1 x 1 layers
    residual=True,  # each type-B layer adds to its input
)

DEFAULTS = dict(
    num_epochs=12,  # passes over the 60,000 training images; with more of them it overfits
    batch_size=32,  # a quarter of the handout's, so four times its steps in an epoch
    learning_rate=3e-3,  # peak, reached after the warm-up and falling to zero at the end
    warm_up=200,  # steps in which the learning rate rises
    binarize="threshold",  # x > 0.5; or "stochastic", a fresh Bernoulli(x) draw at each step
    **ARCHITECTURE,
)

VARIANTS = {
    "plain": ("what do the residual connections do?", dict(residual=False, learning_rate=1e-3)),
    "narrow-kernels": ("do 5 x 5 kernels and more channels do as well?", dict(kernel_size=5, channels=48)),
    "large": (
        "how far does it go on a GPU?",
        dict(num_epochs=100, num_layers=12, channels=96, learning_rate=1e-3),
    ),
}

NUM_CLASSES = 10
NUM_PIXELS = 28 * 28


def build_network(conditional, **architecture):
    return ConditionalPixelCNN(NUM_CLASSES, **architecture) if conditional else PixelCNN(**architecture)


def predict(network, x, labels):
    """Logits of every pixel; the labels, (N,) integers, are for a conditional network alone."""
    if isinstance(network, ConditionalPixelCNN):
        return network(x, F.one_hot(labels, NUM_CLASSES).float())
    return network(x)


def train(run, network, train_set, test_set):
    """Minimise the binary cross-entropy, which is the negative log-likelihood, over uint8 images."""
    options = run.options
    num_epochs, batch_size, how = (options[key] for key in ("num_epochs", "batch_size", "binarize"))
    steps = num_epochs * math.ceil(len(train_set[0]) / batch_size)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=options["learning_rate"], betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / options["warm_up"], 1 - step / steps)
    )
    criterion = nn.BCEWithLogitsLoss()
    run.start(network=network, optimizer=optimizer, schedule=schedule)
    if run.epoch == run.batch == 0:
        log_epoch(run, network, test_set, epoch=0)

    for epoch in run.epochs(num_epochs):
        for x, labels in run.progress(batches(*train_set, batch_size, run.order())):
            x = binarize(x, how)
            with run.autocast():
                logits = predict(network, x, labels)
            loss = criterion(logits.float(), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            # The criterion averages over pixels as well; an image's likelihood is their sum.
            run.add(len(x), train_nll=loss.item() * NUM_PIXELS)
        log_epoch(run, network, test_set, epoch)


def log_epoch(run, network, test_set, epoch):
    """A row of losses.csv, evaluated in the precision of the training, which saves time and differs little."""
    with run.autocast():
        test_nll = evaluate(network, *test_set, run.options["binarize"])
    row = dict(train_nll=run.means().get("train_nll"), test_nll=test_nll, test_bits=bits_per_pixel(test_nll))
    run.log(epoch=epoch, **row)
    run.say(epoch, **row)


@torch.no_grad()
def evaluate(network, images, labels, how, batch_size=250):
    """Negative log-likelihood in nats per image, the mean over uint8 images.

    Stochastic binarisation draws the same pixels at every call, so that epochs and networks compare.
    """
    network.eval()
    draw = torch.Generator(images.device).manual_seed(0)
    total = 0.0
    for x, y in batches(images, labels, batch_size):
        x = binarize(x, how, draw)
        total += F.binary_cross_entropy_with_logits(predict(network, x, y).float(), x, reduction="sum").item()
    network.train()
    return total / len(images)


def bits_per_pixel(nll):
    return nll / (NUM_PIXELS * math.log(2))


def draw_losses(run):
    history = run.history
    nll = {"training": history["train_nll"], "test": history["test_nll"]}
    # Before and in the first epoch the loss is so high that the rest of the curve would be flat.
    later = {name: [None, None, *values[2:]] for name, values in nll.items()}
    unit = f"(nats per image, {run.options['binarize']})"
    panels = [
        (f"negative log-likelihood\n{unit}", nll, {}),
        (f"the same, from epoch 2 on\n{unit}", later, {}),
    ]
    plotting.save_curves(run.folder / "loss.png", history["epoch"], panels)


def draw_samples(run, network, conditional, digit, real_images):
    """samples.png, and for the conditional network the figures that choose digits; real_images in {0, 1}."""
    noise = torch.Generator().manual_seed(run.args.seed)
    folder, columns = run.folder, 10
    if not conditional:
        samples = network.sample(10 * columns, noise)
        plotting.save_images(folder / "samples.png", samples, columns)
        return
    samples = network.sample(torch.arange(NUM_CLASSES).repeat_interleave(columns), noise)
    plotting.save_images(
        folder / "samples.png", samples, columns, [str(label) for label in range(NUM_CLASSES)]
    )
    chosen = network.sample(torch.full((10 * columns,), digit), noise)
    plotting.save_images(folder / "samples_digit.png", chosen, columns, title=f"samples of the digit {digit}")
    grids = {"real": real_images[: 10 * columns]}
    unconditional = runs.ROOT / "results" / STEP / "model.pt"
    if unconditional.exists():
        grids["unconditional"] = load_model(unconditional, run.device, (STEP,)).sample(10 * columns, noise)
    else:
        print("comparison.png lacks unconditional samples: run this script without --conditional first")
    grids["class-conditional"] = samples[torch.randperm(len(samples), generator=noise)]
    plotting.save_side_by_side(folder / "comparison.png", grids, columns)


def write_metrics(run, network, train_set, test_set):
    """Final figures, computed in single precision."""
    conditional = isinstance(network, ConditionalPixelCNN)
    how, test_count = run.options["binarize"], len(test_set[0])
    protocol = dict(binarization=how, train_images=len(train_set[0]), test_images=test_count)
    formula = f"-sum_i log p(x_i | x_1, ..., x_{{i-1}}{', y' if conditional else ''}), mean over images"
    unit = "nats per image"

    nll = evaluate(network, *test_set, how)
    train_nll = evaluate(network, *(each[:test_count] for each in train_set), how)
    best = min(run.history["test_nll"])
    best_epoch = run.history["test_nll"].index(best)
    labels = torch.arange(64) % NUM_CLASSES
    started = time.perf_counter()
    (network.sample(labels) if conditional else network.sample(len(labels))).cpu()
    sampling = time.perf_counter() - started
    run.finish(
        len(train_set[0]),
        test_nll=runs.metric(nll, unit, formula, **protocol),
        test_bits=runs.metric(bits_per_pixel(nll), "bits per pixel", "test_nll / (784 log 2)", **protocol),
        best_test_nll=runs.metric(
            best, unit, f"{formula}; in the precision of the training", epoch=best_epoch, **protocol
        ),
        train_nll=runs.metric(
            train_nll, unit, formula, over=f"first {test_count} training images", **protocol
        ),
        sampling_time=runs.metric(
            sampling, "seconds", "wall time of drawing 64 images", hardware=runs.hardware(run.device)
        ),
    )


def load_model(path, device="cpu", steps=(STEP, CONDITIONAL_STEP)):
    """The network of a model.pt of one of these steps, plain or conditional, in eval mode."""
    return runs.load_network(path, steps, build_network, device)


def main():
    parser = runs.make_parser(__doc__, DEFAULTS)
    parser.add_argument("--conditional", action="store_true", help="the class-conditional network")
    parser.add_argument(
        "--digit",
        type=int,
        choices=range(NUM_CLASSES),
        default=3,
        metavar="D",
        help="digit of samples_digit.png, with --conditional (3)",
    )
    parser.add_argument(
        "--binarize",
        choices=["threshold", "stochastic"],
        help=f"how pixels become binary ({DEFAULTS['binarize']})",
    )
    args = parser.parse_args()
    options = runs.choose_options(parser, args, DEFAULTS, VARIANTS)
    step = CONDITIONAL_STEP if args.conditional else STEP
    if args.ablation or args.seeds:
        return ablation.run_all(__file__, step, args, VARIANTS)
    run = runs.Run(step, args, options)
    train_set, test_set = load_mnist(args.data_dir, run.device)
    real_images = binarize(test_set[0][:100], options["binarize"], torch.Generator(run.device).manual_seed(0))
    if args.sample_only:
        network = load_model(run.folder / "model.pt", run.device, (step,))
        draw_samples(run, network, args.conditional, args.digit, real_images)
        print(f"samples in {run.folder}")
        return

    train_set, test_set = run.limit(*train_set), run.limit(*test_set)
    architecture = dict(conditional=args.conditional, **{key: options[key] for key in ARCHITECTURE})
    network = build_network(**architecture).to(run.device, memory_format=torch.channels_last)
    train(run, network, train_set, test_set)
    runs.save_model(run.folder / "model.pt", step, network, architecture)
    write_metrics(run, network.eval(), train_set, test_set)
    draw_losses(run)
    draw_samples(run, network, args.conditional, args.digit, real_images)


if __name__ == "__main__":
    runs.run_main(main)
