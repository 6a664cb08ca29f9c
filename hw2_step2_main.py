"""Step 2: PixelCNN on binarised MNIST, unconditional and class-conditional.

The network predicts each pixel from the pixels before it in raster order (van den Oord et al. 2016a,
arXiv 1601.06759); with --conditional the label enters every masked layer (2016b, arXiv 1606.05328).

    python hw2_step2_main.py                          train with the defaults below
    python hw2_step2_main.py --conditional --digit 3  the class-conditional network, and a grid of threes
    python hw2_step2_main.py --minutes 5              train for five minutes, whatever the machine
    python hw2_step2_main.py --dry-run                a few batches, to look around
    python hw2_step2_main.py --sample-only            draw from the trained network
    torchrun --nproc_per_node=2 hw2_step2_main.py     the same training, shared by two GPUs or processes

Writes into results/step2_pixelcnn/ or results/step2_conditional_pixelcnn/:
    loss.png             negative log-likelihood over the epochs, of test images and of training images as trained on
    samples.png          samples; with --conditional a row of each digit
    completions.png      test digits whose lower half the network has drawn
    nll_map.png          where in the image the nats are
    nll_digits.png       in which digits they are
    receptive_field.png  which pixels a prediction depends on, and which it cannot see
    losses.csv, metrics.json, config.json, model.pt
and with --conditional:
    samples_digit.png    samples of the digit chosen with --digit
    comparison.png       real, unconditional and conditional images side by side
    bayes.png            test digits classified by the most likely label
"""

import math
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models.AR import ConditionalPixelCNN, PixelCNN
from utils import ablation, metrics, parallel, plotting, runs
from utils.data import batches, binarize, distort, load_mnist
from utils.muon import Muon

STEP, CONDITIONAL_STEP = "step2_pixelcnn", "step2_conditional_pixelcnn"

ARCHITECTURE = dict(
    num_layers=8,  # type-B layers between the type-A layer and the head
    channels=32,  # feature maps of each
    first_kernel_size=27,  # of the type-A layer: with one input channel a wide view is cheap
    kernel_size=7,  # of the type-B layers
    head_channels=64,  # feature maps between the two 1 x 1 layers
    activation="hardswish",  # smooth at zero, where ReLU has its corner
    block="residual",  # each type-B layer adds to its input
    dropout=0.0,  # of the features in a block; distorted images regularise instead
    normalised=False,  # over the channels of each pixel
    positional=True,  # a learned vector for each position, as digits are centred
)

DEFAULTS = dict(
    num_epochs=6,  # passes over the 60,000 training images
    batch_size=32,  # a quarter of the handout's, so four times its steps in an epoch
    learning_rate=3e-3,  # of Adam; its peak, reached after the warm-up and falling to zero at the end
    muon_rate=0.02,  # of Muon, likewise, for the kernels of the blocks; without it Adam trains them too
    warm_up=200,  # steps in which the learning rates rise
    schedule="linear",  # or "cosine", along which they fall to zero
    clip_norm=50.0,  # of the gradient, in nats per image
    ema_decay=0.0,  # of an average of the weights to be evaluated in place of the last
    binarize="threshold",  # x > 0.5; or "stochastic", a fresh Bernoulli(x) draw at each step
    distorted=0.5,  # share of the training images that are slightly rotated, scaled and sheared
    distorted_until=0.8,  # of the training; its end sees images as they are
    **ARCHITECTURE,
)

VARIANTS = {
    "plain": ("what do the residual connections do?", dict(block="plain")),
    "bottleneck": ("residual blocks as in the paper?", dict(block="bottleneck", channels=64, num_layers=12)),
    "depthwise": (
        "one kernel for each channel?",
        dict(block="depthwise", channels=48, num_layers=6),
    ),
    "gated": ("do gates earn their cost?", dict(block="gated", channels=24)),
    "adam": ("does Muon earn its place?", dict(muon_rate=None)),
    "relu": ("does the smooth activation matter?", dict(activation="relu")),
    "first-7": ("does the wide first layer matter?", dict(first_kernel_size=7)),
    "first-55": ("does the rest of the blind spot matter?", dict(first_kernel_size=55)),
    "no-position": ("does it help to know where in the image one is?", dict(positional=False)),
    "undistorted": ("do distorted training images help?", dict(distorted=0.0)),
    "distorted-throughout": ("does the end of the training need them too?", dict(distorted_until=1.0)),
    "dropout": ("does dropout regularise as well?", dict(distorted=0.0, dropout=0.1)),
    "normalised": ("does a causal normalisation help?", dict(normalised=True)),
    "cosine": ("does it matter how the learning rate falls?", dict(schedule="cosine")),
    "average": ("does an average of the weights help?", dict(ema_decay=0.99)),
    "5x5": ("narrower kernels in more layers?", dict(kernel_size=5, num_layers=12)),
    "9x9": ("wider kernels in fewer layers?", dict(kernel_size=9, num_layers=6)),
    "wide": ("more channels in fewer layers?", dict(channels=64, num_layers=4)),
    "deep": ("fewer channels in more layers?", dict(channels=24, num_layers=12)),
    "batch-16": ("smaller batches and more steps?", dict(batch_size=16)),
    "stochastic": (
        "how good is it on the scale of the literature?",
        dict(binarize="stochastic", distorted=0.0),
    ),
    "double": ("what does twice the time buy?", dict(num_epochs=12)),
    "large": (
        "how far does it go on a GPU?",
        dict(num_epochs=100, num_layers=12, channels=96, batch_size=64, learning_rate=1e-3),
    ),
}

# What is left of the learning rate when a share of the training is done.
FALLS = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}

# Not with the others of --ablation: other pixels, more time, other hardware.
NOT_COMPARABLE = ("stochastic", "double", "large")

NUM_CLASSES = 10
NUM_PIXELS = 28 * 28
NUM_PROBED = 1000  # test images over which the receptive field is measured
ABLATION_LENGTH = ["--minutes", "5"]  # the same for every variant
ROWS_GIVEN = 14  # of the digits to be completed
SEEN_FROM = (14, 3)  # row and column of the pixel whose receptive field is drawn


def build_network(conditional, **architecture):
    return ConditionalPixelCNN(NUM_CLASSES, **architecture) if conditional else PixelCNN(**architecture)


def inputs(network, x, labels):
    """What the network takes: images (N, 1, 28, 28) in {0, 1}, and one-hot labels if it is conditional."""
    if isinstance(network, ConditionalPixelCNN):
        return x, F.one_hot(labels, NUM_CLASSES).float()
    return (x,)


def train(run, network, train_set, test_set):
    """Minimise the binary cross-entropy, which is the negative log-likelihood, over uint8 images.

    Returns:
        The network to evaluate, whose weights are an average or, without one, those of the last step.
    """
    options = run.options
    num_epochs, batch_size = options["num_epochs"], options["batch_size"]
    steps = num_epochs * math.ceil(len(train_set[0]) / batch_size)
    fall = FALLS[options["schedule"]]

    def share_of_rate(step):
        return min((step + 1) / options["warm_up"], fall(min(1, run.share_done(step / steps))))

    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options["ema_decay"])).eval()
    optimizers = make_optimizers(network, options)
    schedules = {
        f"{name}_schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
        for name, optimizer in optimizers.items()
    }
    criterion = nn.BCEWithLogitsLoss(reduction="sum")
    run.start(network=network, averaged=averaged, **optimizers, **schedules)
    model = parallel.wrap(network)
    if run.epoch == run.batch == 0:
        log_epoch(run, averaged.module, test_set, epoch=0)

    for epoch in run.epochs(num_epochs):
        for images, labels in run.progress(batches(*train_set, batch_size, run.order())):
            step = schedules["adam_schedule"].last_epoch
            if run.share_done(step / steps) < options["distorted_until"]:
                images = distort(images, options["distorted"])
            x = binarize(images, options["binarize"])
            x, labels = parallel.share(x), parallel.share(labels)
            with run.autocast():
                logits = model(*inputs(network, x, labels))
            # Nats per image of the whole batch; gradients are averaged over the processes.
            loss = criterion(logits.float(), x) * parallel.num_processes() / len(images)
            network.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), options["clip_norm"])
            for optimizer in optimizers.values():
                optimizer.step()
            for schedule in schedules.values():
                schedule.step()
            averaged.update_parameters(network)
            run.add(len(images), train_nll=parallel.mean(loss))
        log_epoch(run, averaged.module, test_set, epoch)
    return averaged.module


def make_optimizers(network, options):
    """Muon for the kernels of the blocks, which are most of the weights, and Adam for the others, by name."""
    layers = chain(*network.blocks) if options["muon_rate"] else ()
    kernels = [layer.weight for layer in layers if layer.groups == 1]  # a depthwise kernel mixes no channels
    chosen = {id(kernel) for kernel in kernels}
    others = [each for each in network.parameters() if id(each) not in chosen]
    adam = torch.optim.Adam(others, lr=options["learning_rate"], betas=(0.9, 0.99), fused=True)
    return {"adam": adam, "muon": Muon(kernels, options["muon_rate"])} if kernels else {"adam": adam}


def log_epoch(run, network, test_set, epoch):
    """A row of losses.csv, evaluated in the precision of the training, which saves time and differs little."""
    with run.autocast():
        test_nll = evaluate(network, *test_set, run.options["binarize"])
    row = dict(train_nll=run.means().get("train_nll"), test_nll=test_nll, test_bits=bits_per_pixel(test_nll))
    run.log(epoch=epoch, **row)
    run.say(epoch, **row)


def evaluate(network, images, labels, how):
    """Negative log-likelihood in nats per image, the mean over uint8 images."""
    x, labels = parallel.share(binarize_test(images, how)), parallel.share(labels)
    nats = pixel_nll(network, x, labels).sum().item()
    return parallel.total(nats, images.device) / len(images)


def binarize_test(images, how):
    """Stochastic binarisation draws the same pixels at every call, so that epochs and networks compare."""
    return binarize(images, how, torch.Generator(images.device).manual_seed(0))


@torch.no_grad()
def pixel_nll(network, x, labels, batch_size=250):
    """-log p(x_i | x_1, ..., x_(i-1)) of every pixel, in nats: (N, 1, 28, 28) for images x in {0, 1}."""
    nll = torch.empty_like(x)
    for place, some, their_labels in zip(
        nll.split(batch_size), x.split(batch_size), labels.split(batch_size)
    ):
        logits = network(*inputs(network, some, their_labels)).float()
        place.copy_(F.binary_cross_entropy_with_logits(logits, some, reduction="none"))
    return nll


def sample_evenly(network, count, generator):
    """Draw (count, 1, 28, 28) images; a conditional network is asked for the digits in turn."""
    conditional = isinstance(network, ConditionalPixelCNN)
    return network.sample(torch.arange(count) % NUM_CLASSES if conditional else count, generator)


def label_log_likelihoods(network, x):
    """log p(x | y) of each label y, (N, 10) in nats; by Bayes' rule its argmax is the likeliest of equal labels."""
    return torch.stack(
        [
            -pixel_nll(network, x, torch.full((len(x),), label, device=x.device)).sum((1, 2, 3))
            for label in tqdm(range(NUM_CLASSES), "Bayes' rule", unit="label", disable=None, leave=False)
        ],
        dim=1,
    )


def receptive_field(network, x, labels, pixel, batch_size=100):
    """Mean over the images of |d logit / d x_j| for the logit of one pixel and every x_j, (28, 28).

    Where it is zero for every image, the prediction does not depend on x_j: what comes later in raster order, and
    the blind spot.
    """
    total = torch.zeros_like(x[0, 0])
    for some, their_labels in zip(x.split(batch_size), labels.split(batch_size)):
        some = some.clone().requires_grad_()
        logits = network(*inputs(network, some, their_labels))
        (gradient,) = torch.autograd.grad(logits[:, 0, pixel[0], pixel[1]].sum(), some)
        total += gradient.abs().sum((0, 1))
    return total / len(x)


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


def draw_samples(run, network, digit, test_set):
    """The figures of images that the network draws; those that choose digits for a conditional one alone."""
    images, labels = test_set
    conditional = isinstance(network, ConditionalPixelCNN)
    noise = torch.Generator().manual_seed(run.args.seed)
    folder, columns = run.folder, 10
    digits = torch.arange(NUM_CLASSES).repeat_interleave(columns)
    samples = network.sample(digits if conditional else len(digits), noise)
    names = [str(label) for label in range(NUM_CLASSES)]
    plotting.save_images(folder / "samples.png", samples, columns, names if conditional else ())

    # The first test digit of each class, its upper half, and what the network makes of it.
    first = [(labels == label).nonzero()[0].item() for label in labels.unique()]
    real = binarize_test(images, run.options["binarize"])
    originals = real[first]
    repeated = originals.repeat_interleave(columns, 0)
    completed = network.sample(
        labels[first].repeat_interleave(columns) if conditional else len(repeated),
        noise,
        given=repeated[:, :, :ROWS_GIVEN],
    )
    halves = originals.clone()
    halves[:, :, ROWS_GIVEN:] = 0.5
    rows = torch.cat([originals[:, None], halves[:, None], completed.unflatten(0, (-1, columns))], 1)
    plotting.save_images(folder / "completions.png", rows.flatten(0, 1), columns + 2)
    if not conditional:
        return

    chosen = network.sample(torch.full_like(digits, digit), noise)
    plotting.save_images(folder / "samples_digit.png", chosen, columns, title=f"samples of the digit {digit}")
    grids = {"real": real[: len(digits)]}
    try:
        folder_of_other = runs.run_folder(runs.ROOT / "results" / STEP, run.args.variant)
        other = load_model(folder_of_other / "model.pt", run.device, (STEP,))
        grids["unconditional"] = other.sample(len(digits), noise)
    except runs.UserError as error:
        print(f"comparison.png lacks unconditional samples, {error}")
    grids["class-conditional"] = samples[torch.randperm(len(samples), generator=noise)]
    plotting.save_side_by_side(folder / "comparison.png", grids, columns)


def draw_knowledge(run, network, test_set, nll, guesses):
    """Where the nats are, what a prediction depends on and, with `guesses`, which digits are mistaken for which.

    Args:
        nll: (N, 1, 28, 28) of the test images, `guesses`: (N,) labels by Bayes' rule, or None.
    """
    images, labels = test_set
    folder, how = run.folder, run.options["binarize"]
    plotting.save_map(folder / "nll_map.png", nll.mean((0, 1)), f"NLL (nats, {how})")
    nats = [
        nll[labels == label].sum().item() / max(1, (labels == label).sum().item())
        for label in range(NUM_CLASSES)
    ]
    plotting.save_bars(
        folder / "nll_digits.png", range(NUM_CLASSES), nats, "digit", f"test NLL\n(nats per image, {how})"
    )
    x = binarize_test(images[:NUM_PROBED], how)
    sensitivity = receptive_field(network, x, labels[:NUM_PROBED], SEEN_FROM)
    plotting.save_receptive_field(folder / "receptive_field.png", sensitivity, SEEN_FROM)
    if guesses is not None:
        plotting.save_confusion(folder / "bayes.png", labels, guesses, "label with the highest log p(x|y)")


def write_metrics(run, network, train_set, test_set):
    """Final figures, computed in single precision unless they say so, and the figures that go with them."""
    conditional = isinstance(network, ConditionalPixelCNN)
    how, (images, labels) = run.options["binarize"], test_set
    protocol = dict(binarization=how, train_images=len(train_set[0]), test_images=len(images))
    given = "x_1, ..., x_{i-1}" + (", y" if conditional else "")
    formula = f"-sum_i log p(x_i | {given}), mean over images"
    unit = "nats per image"

    x = binarize_test(images, how)
    nll = pixel_nll(network, x, labels)
    test_nll = nll.sum().item() / len(x)
    train_nll = evaluate(network, *(each[: len(images)] for each in train_set), how)
    best = min(run.history["test_nll"])
    best_epoch = run.history["test_nll"].index(best)
    samples, quality = metrics.judge_sampler(run, partial(sample_evenly, network), how)
    results = dict(
        test_nll=runs.metric(test_nll, unit, formula, **protocol),
        test_bits=runs.metric(
            bits_per_pixel(test_nll), "bits per pixel", "test_nll / (784 log 2)", **protocol
        ),
        best_test_nll=runs.metric(
            best, unit, f"{formula}; in the precision of the training", epoch=best_epoch, **protocol
        ),
        train_nll=runs.metric(
            train_nll, unit, formula, over=f"first {len(images)} training images", **protocol
        ),
        **quality,
    )
    guesses = None
    if conditional:
        with run.autocast():
            log_likelihoods = label_log_likelihoods(network, x)
        guesses = log_likelihoods.argmax(1)
        results["bayes_accuracy"] = runs.metric(
            (guesses == labels).float().mean().item(),
            "share of test images",
            "argmax_y log p(x | y) is the label; in the precision of the training",
            **protocol,
        )
        mixture_nll = math.log(NUM_CLASSES) - log_likelihoods.logsumexp(1).mean().item()
        results["mixture_nll"] = runs.metric(
            mixture_nll,
            unit,
            "-log 1/10 sum_y p(x | y), which is told no label, mean over images; in the precision of the training",
            **protocol,
        )
        verdicts = metrics.classify(samples)
        results["recognised"] = runs.metric(
            (verdicts == torch.arange(len(samples)) % NUM_CLASSES).double().mean().item(),
            "share of samples",
            "the digit classifier sees the digit that was asked for",
            samples=len(samples),
        )
    run.finish(**results)
    draw_knowledge(run, network, test_set, nll, guesses)


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
        help="digit of samples_digit.png, with --conditional (%(default)s)",
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
        return ablation.run_all(__file__, step, args, VARIANTS, ABLATION_LENGTH, left_out=NOT_COMPARABLE)
    run = runs.Run(step, args, options, several_processes=True)
    train_set, test_set = load_mnist(args.data_dir, run.device, args.held_out)
    if args.sample_only:
        network = load_model(run.folder / "model.pt", run.device, (step,))
        draw_samples(run, network, args.digit, test_set)
        print(f"samples in {run.folder}")
        return

    full_test_set = test_set
    train_set, test_set = run.limit(*train_set), run.limit(*test_set)
    architecture = dict(conditional=args.conditional, **{key: options[key] for key in ARCHITECTURE})
    network = build_network(**architecture).to(run.device, memory_format=torch.channels_last)
    network = train(run, network, train_set, test_set)
    if not parallel.go_on_alone():
        return
    runs.save_model(run.folder / "model.pt", step, network, architecture)
    write_metrics(run, network, train_set, test_set)
    draw_losses(run)
    draw_samples(run, network, args.digit, full_test_set)


if __name__ == "__main__":
    runs.run_main(main)
