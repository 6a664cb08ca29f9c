"""Checks of step 1, the GAN: 1 (b). The other parts of the step are text and experiments."""

import inspect

import torch
from torch import nn

from .judge import fail, note, rests_on
from .probes import attempt, check_layers, check_units, on_images, redraw, trace, values

N = 8  # images in a batch
STEPS = 20  # of training
NEAR = 0.31  # labels this far from 0 and 1 are smoothed
DEVICE = torch.device("cpu")


class Gan:
    """The GAN of a submission with new parameters, and a batch; networks are called in the shapes that work."""

    def __init__(self, code):
        self.code = code
        self.d = redraw(attempt("Discriminator()", code.Discriminator))
        self.g = redraw(attempt("Generator()", code.Generator, lambda: code.Generator(100)))
        widths = [100] + [each.shape[1] for each in self.g.parameters() if each.dim() == 2][:1]
        tries = [lambda width=width: self.g(torch.zeros(2, width)).shape and width for width in widths]
        self.z = torch.randn(N, attempt("z of shape (N, 100)", *tries))
        self.images = torch.rand(N, 1, 28, 28) * 2 - 1
        outputs = self.judge(100 * torch.randn(64, 784))
        self.ends_in_sigmoid = bool(outputs.min() >= 0 and outputs.max() <= 1)
        self.criterion = nn.BCELoss() if self.ends_in_sigmoid else nn.BCEWithLogitsLoss()
        self.d_optimizer = torch.optim.Adam(self.d.parameters(), lr=1e-3, fused=True)
        self.g_optimizer = torch.optim.Adam(self.g.parameters(), lr=1e-3, fused=True)

    def judge(self, images):
        """Return D(images), flat."""
        return on_images("Discriminator()(x)", self.d, images).flatten()

    def train_d(self, fakes, images=None):
        """Call train_discriminator as the handout does, or else with images of one shape."""
        images = self.images if images is None else images

        def call(*both):
            d, optimizer = self.d.train(), self.d_optimizer
            return self.code.train_discriminator(d, optimizer, *both, self.criterion, DEVICE)

        shapes = (-1, 784), (-1, 1, 28, 28)
        alike = [lambda shape=shape: call(images.reshape(shape), fakes.reshape(shape)) for shape in shapes]
        return attempt("train_discriminator(discriminator, ...)", lambda: call(images, fakes), *alike)

    def train_g(self, outputs):
        arguments = (self.g.train(), self.g_optimizer, outputs.reshape(-1, 1), self.criterion, DEVICE)
        return attempt("train_generator(generator, ...)", lambda: self.code.train_generator(*arguments))


def test_1b_the_networks_run(code):
    gan = Gan(code)
    if gan.g(gan.z).flatten(1).shape != (N, 784):
        fail(f"the generator gives the shape {tuple(gan.g(gan.z).shape)}: an image has 784 pixels")
    if gan.judge(gan.images).shape != (N,):
        fail("the discriminator does not give one value for an image")


@rests_on("test_1b_the_networks_run")
def test_1b_linear_layers_with_leaky_relu(code):
    gan = Gan(code)
    check_layers(trace(lambda: gan.g(gan.z)), "generator")
    check_layers(trace(lambda: gan.judge(gan.images)), "discriminator")


@rests_on("test_1b_the_networks_run")
def test_1b_hidden_layers_have_the_given_sizes(code):
    gan = Gan(code)
    check_units(trace(lambda: gan.g(gan.z)), [64, 128, 256, 784], "generator, by default,")
    check_units(trace(lambda: gan.judge(gan.images)), [256, 128, 64, 1], "discriminator, by default,")


@rests_on("test_1b_the_networks_run")
def test_1b_the_generator_s_output_is_bounded(code):
    gan = Gan(code)
    outputs = gan.g(1000 * gan.z)
    if outputs.abs().max() > 1:
        fail("the generator's outputs have no bound: pixels are in [-1, 1], so end in a tanh")
    if outputs.min() >= 0:
        note("the generator's outputs are in [0, 1]; the handout scales pixels to [-1, 1]")


@rests_on("test_1b_the_networks_run")
def test_1b_dropout_in_the_discriminator(code):
    gan = Gan(code)
    if not torch.equal(gan.judge(gan.images), gan.judge(gan.images)):
        fail("the discriminator drops units in eval mode, too")
    gan.d.train(), gan.g.train()
    if torch.equal(gan.judge(gan.images), gan.judge(gan.images)):
        fail("the discriminator has no dropout")
    if not torch.equal(gan.g(gan.z), gan.g(gan.z)):
        note("the generator has dropout, which is not required")


@rests_on("test_1b_the_networks_run")
def test_1b_one_sigmoid(code):
    words = code.words(1)
    if Gan(code).ends_in_sigmoid:
        if words & {"BCEWithLogitsLoss", "binary_cross_entropy_with_logits"}:
            fail("sigmoid twice: the discriminator ends in one, and BCEWithLogitsLoss applies another")
    elif "BCELoss" in words and not words & {"BCEWithLogitsLoss", "sigmoid", "Sigmoid"}:
        fail("no sigmoid: the discriminator ends without one, and BCELoss needs probabilities")


class GivenLogits(nn.Module):
    """A discriminator whose logits are its parameters: images of brightness (i + 1) / (2 N) have the logit i."""

    def __init__(self, sigmoid):
        super().__init__()
        self.sigmoid = sigmoid
        self.logits = nn.Parameter(torch.linspace(-2, 2, 2 * N))

    def forward(self, x):
        numbers = (x.detach().flatten(1).mean(1) * 2 * N).round().long() - 1
        logits = self.logits[numbers.clamp(0, 2 * N - 1)].unsqueeze(1)
        return logits.sigmoid() if self.sigmoid else logits


def gradients(code, network, step):
    """Return 2 N logits and their gradient in a step; check that gradients of earlier steps take no part."""
    found = []
    for old_gradient in (0.0, 1.0):
        gan = Gan(code)
        given = GivenLogits(gan.ends_in_sigmoid)
        given.logits.grad = torch.full((2 * N,), old_gradient)
        setattr(gan, network, given)
        setattr(gan, f"{network}_optimizer", torch.optim.SGD(given.parameters(), lr=1))
        before = values(given)
        step(gan, (torch.arange(1, 2 * N + 1) / (2 * N)).view(-1, 1, 1, 1).repeat(1, 1, 28, 28))
        found.append(before - values(given))
    if not torch.allclose(*found, atol=1e-4):
        text = f"the step adds gradients that are left from before: call {network}_optimizer.zero_grad()"
        (note if "zero_grad" in code.words(1, script_only=True) else fail)(text)
    return before, found[0]


def labels_of(logits, gradient, expected):
    """Return the labels whose binary cross-entropy, of whole or half weight, has this gradient.

    The gradient of the mean loss is (sigmoid(logit) - label) / N. Of both weights, the likelier labels count.
    """
    labels = [logits.sigmoid() - gradient * N / weight for weight in (1, 0.5)]
    return min(labels, key=lambda each: float((each - expected).abs().max()))


@rests_on("test_1b_the_networks_run")
def test_1b_loss_of_the_discriminator(code):
    """Eq. 1: minus the mean of log D(x) + log(1 - D(G(z))); smoothed labels and half of it will do."""
    logits, gradient = gradients(code, "d", lambda gan, x: gan.train_d(x[1::2].flatten(1), x[::2]))
    if not gradient.any():
        fail("the discriminator's step changes nothing: where is d_optimizer.step()?")
    for kind, first, label in (("real", 0, 1), ("fake", 1, 0)):
        if not gradient[first::2].any():
            fail(f"the {kind} images take no part in the discriminator's loss")
        found = labels_of(logits[first::2], gradient[first::2], label)
        if (found - label).abs().max() > NEAR:
            found = found.mean().abs()
            fail(f"the discriminator's loss has the label {found:.1f} for {kind} images, not {label} (Eq. 1)")


@rests_on("test_1b_the_networks_run")
def test_1b_loss_of_the_generator(code):
    """Minimise -log D(G(z)), the non-saturating form, or log(1 - D(G(z))), as in Eq. 1."""
    logits, gradient = gradients(code, "g", lambda gan, x: gan.train_g(gan.g(x[::2])))
    logits, gradient = logits[::2], gradient[::2]
    if not gradient.any():
        fail("the generator's step changes nothing: where is g_optimizer.step()?")
    non_saturating = (labels_of(logits, gradient, 1) - 1).abs().max()
    saturating = min((gradient * N + weight * logits.sigmoid()).abs().max() for weight in (1, 0.5))
    if non_saturating > NEAR and saturating > 1e-3:
        label = labels_of(logits, gradient, 0).mean().abs()
        fail(f"the generator's loss has the label {label:.1f} for its images, not 1 (non-saturating)")


def in_both_modes(gan, value):
    """Return a value in training mode, a mean over five draws of the dropout, and in eval mode."""
    found = []
    for mode in (True, False):
        gan.d.train(mode), gan.g.train(mode)
        found.append(float(sum(value().detach() for _ in range(5)) / 5))
    return found


@rests_on("test_1b_loss_of_the_discriminator")
def test_1b_the_discriminator_s_step_lowers_its_loss(code):
    gan = Gan(code)
    fakes = gan.g(gan.z).detach()

    def loss():
        real, fake = gan.judge(gan.images), gan.judge(fakes)
        return gan.criterion(real, torch.ones(N)) + gan.criterion(fake, torch.zeros(N))

    before = in_both_modes(gan, loss)
    for _ in range(STEPS):
        gan.train_d(fakes)
    after = in_both_modes(gan, loss)
    if not (after[0] < before[0] or after[1] < before[1]):  # batch normalisation may hide it in one mode
        fail(f"{STEPS} steps of the discriminator on a batch take its loss from {before[1]} to {after[1]}")


@rests_on("test_1b_loss_of_the_discriminator")
def test_1b_the_discriminator_s_step_leaves_the_generator(code):
    gan = Gan(code)
    before = values(gan.g)
    gan.train_d(gan.g(gan.z))
    if not torch.equal(before, values(gan.g)):
        fail("the discriminator's step changed the generator")
    if any(each.grad is not None and each.grad.any() for each in gan.g.parameters()):
        text = "the discriminator's step sends gradients into the generator"
        if not code.words(1) & {"detach", "no_grad"}:
            fail(f"{text}: detach the fake images")
        note(f"{text}, unless its caller has detached the fake images")


@rests_on("test_1b_loss_of_the_generator")
def test_1b_the_generator_s_step_raises_d_of_its_images(code):
    gan = Gan(code)

    def mean_log_d():
        # A mean over five draws, where the generator has dropout
        return (
            -sum(float(gan.criterion(gan.judge(gan.g(gan.z)), torch.ones(N)).detach()) for _ in range(5)) / 5
        )

    gan.d.eval(), gan.g.train()  # so that D stays the same function
    before = mean_log_d()
    for _ in range(STEPS):
        gan.train_g(gan.judge(gan.g(gan.z)))
    after = mean_log_d()
    if not after > before:
        fail(f"{STEPS} steps of the generator take the mean of log D(G(z)) from {before} to {after}")


@rests_on("test_1b_loss_of_the_generator", "test_1b_loss_of_the_discriminator")
def test_1b_the_generator_s_step_leaves_the_discriminator(code):
    gan = Gan(code)
    fakes = gan.g(gan.z)
    gan.train_d(fakes.detach())
    before = values(gan.d)
    gan.train_g(gan.judge(fakes))
    if not torch.equal(before, values(gan.d)):
        fail("the generator's step changed the discriminator")


def test_1b_interface_networks(code):
    gan = Gan(code)
    if gan.g(gan.z).shape != (N, 784):
        fail(f"the generator returns the shape {tuple(gan.g(gan.z).shape)}; the handout's returns ({N}, 784)")
    if on_images("Discriminator()(x)", gan.d, gan.images).shape != (N, 1):
        fail("the discriminator does not return the shape (N, 1)")
    if gan.ends_in_sigmoid:
        fail("the discriminator ends in a sigmoid; the handout's gives logits, for BCEWithLogitsLoss")
    code.Generator(10, [32, 16, 8]), code.Discriminator([32, 16, 8])


@rests_on("test_1b_the_networks_run")
def test_1b_interface_training_functions(code):
    inspect.signature(code.train_discriminator).bind(*range(6))
    inspect.signature(code.train_generator).bind(*range(5))
    gan = Gan(code)
    results = gan.train_d(gan.g(gan.z).detach())
    if not isinstance(results, (tuple, list)) or len(results) != 4:
        fail("train_discriminator does not return (d_loss, outputs_real, outputs_fake, d_loss_fake)")
    results = gan.train_g(gan.judge(gan.g(gan.z)))
    if not isinstance(results, (tuple, list)) or len(results) != 2:
        fail("train_generator does not return (g_loss, g_loss_fake)")
