"""Checks of step 3, the VAE: 3 (b) and 3 (c). The other parts of the step are text and experiments."""

import math

import torch
from torch.distributions import Normal, kl_divergence

from .judge import fail, note, rests_on
from .probes import attempt, check_layers, check_units, is_close, linear_levels
from .probes import on_images, redraw, relation, trace

N, LATENT = 5, 3  # images in a batch, and latent dimensions for the losses
HIDDEN = [256, 128, 64]
ALL_HIDDEN = HIDDEN, [256, 128], [256], [256, 128, 64, 32]  # for networks with a fixed number of layers
NETWORK = (  # what the losses rest on
    "test_3c_two_latent_dimensions",
    "test_3c_sigmoid_at_the_decoder_s_end",
    "test_3c_reparameterisation_mean_and_variance",
)
REASONS = {  # what the ratio of a loss to its right value gives away
    1 / 784: "it is averaged over pixels, and should be summed",
    1 / LATENT: "it is averaged over latent dimensions, and should be summed",
    N: "it is summed over images, and should be averaged",
    1 / N: "it is divided by the number of images twice",
    2: "the factor 1/2 is missing",
    -1: "its sign is wrong",
}


class Vae:
    """The VAE of a submission with new parameters, and a batch; it is called in the shapes that work."""

    def __init__(self, code, latent=2, std=0.05):
        self.code, self.x = code, (torch.rand(N, 784) > 0.5).float()
        tries = [lambda each=each: self._make([*each, 2 * latent], std) for each in ALL_HIDDEN]
        self.mean, self.logvar = attempt("VAE_model(784, [256, 128, 64, 4])", *tries)
        self.z = torch.randn(N, self.mean.shape[1])

    def _make(self, hidden_dims, std):
        self.model = redraw(self.code.VAE_model(784, hidden_dims), std)
        return self.encode()

    def encode(self):
        return [each.detach() for each in on_images("encode(x)", self.model.encode, self.x)]

    def traces(self):
        """Return what both halves call."""
        return trace(self.encode), trace(lambda: self.model.decode(self.z))

    def loss(self, coeff):
        torch.manual_seed(0)  # the same z for each coeff
        value = on_images("loss_func", lambda x: self.code.loss_func(self.model, x, coeff), self.x)
        return float(torch.as_tensor(value).detach())


def test_3c_two_latent_dimensions(code):
    vae = Vae(code)
    shapes = tuple(vae.mean.shape), tuple(vae.logvar.shape)
    if shapes != ((N, 2), (N, 2)):
        fail(f"with hidden_dims [.., 4] encode gives the shapes {shapes}, and should give ({N}, 2) twice")


@rests_on("test_3c_two_latent_dimensions")
def test_3c_linear_layers_with_leaky_relu(code):
    for name, record in zip(("encoder", "decoder"), Vae(code).traces()):
        check_layers(record, name)


@rests_on("test_3c_two_latent_dimensions")
def test_3c_three_hidden_layers(code):
    encoder, decoder = Vae(code).traces()
    check_units(encoder, [*HIDDEN, 4], "encoder")
    check_units(decoder, [*HIDDEN[::-1], 784], "decoder")


@rests_on("test_3c_two_latent_dimensions")
def test_3c_no_activation_at_the_encoder_s_outputs(code):
    vae = Vae(code)
    linear = torch.cat([layer.output for layer in linear_levels(vae.traces()[0])[-1]], dim=1)
    outputs = torch.cat([vae.mean, vae.logvar], dim=1)
    if not is_close(outputs.sort(dim=1).values, linear.sort(dim=1).values, 1e-4):
        fail("mean and log-variance are not the outputs of a linear layer: another function follows")


@rests_on("test_3c_two_latent_dimensions")
def test_3c_sigmoid_at_the_decoder_s_end(code):
    vae = Vae(code)
    found = relation(vae.traces()[1].layers[-1].output, vae.model.decode(vae.z).detach())
    if found != "a sigmoid":
        fail(f"behind the decoder's last layer comes {found}, and should come a sigmoid")


@rests_on("test_3c_two_latent_dimensions")
def test_3c_reparameterisation_mean_and_variance(code):
    mean, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[-1.0, 1.5]])
    draw = Vae(code).model.train().reparameterize
    z = draw(mean.repeat(20000, 1), logvar.repeat(20000, 1)).detach()
    for found, expected, given in zip(z.var(0), logvar[0].exp(), logvar[0]):
        if not abs(found / expected - 1) < 0.1:
            fail(
                f"for the logvar {given:.2f} the variance of z in a batch is {found:.2f}, not {expected:.2f}"
            )
    if not is_close(z.mean(0), mean[0], 0.1):
        fail(f"for the mean {mean[0].tolist()} the mean of z is {z.mean(0).tolist()}")
    if z.T.corrcoef()[0, 1].abs() > 0.1:
        fail("all latent dimensions get the same noise")


@rests_on("test_3c_reparameterisation_mean_and_variance")
def test_3c_reparameterisation_gradient(code):
    mean, logvar = torch.zeros(N, 2, requires_grad=True), torch.zeros(N, 2, requires_grad=True)
    z = Vae(code).model.train().reparameterize(mean, logvar)
    if not z.requires_grad:
        fail("no gradient goes through z to mean and logvar: z = mean + sigma * epsilon")
    found = torch.autograd.grad(z.sum(), [mean, logvar], allow_unused=True)
    for name, gradient, expected in zip(("mean", "logvar"), found, (torch.ones(N, 2), z / 2)):
        if gradient is None or not is_close(gradient, expected, 1e-4):
            fail(f"the gradient of z with respect to {name} is not that of mean + exp(logvar / 2) * epsilon")


def test_3c_interface_network(code):
    model = code.VAE_model(784, [*HIDDEN, 4], 784)
    if getattr(model, "z_size", None) != 2:
        fail("z_size is not hidden_dims[-1] // 2")
    outputs = code.VAE_model(input_dim=784, hidden_dims=[*HIDDEN, 4], decode_dim=-1)(torch.rand(N, 784))
    if not isinstance(outputs, dict) or not {"imgs", "z", "mean", "logvar"} <= set(outputs):
        fail("forward does not return a dict with imgs, z, mean and logvar")
    if outputs["imgs"].shape != (N, 784) or model.decode(torch.zeros(N, 2)).shape != (N, 784):
        fail("the decoded images do not have the shape (N, 784)")
    if code.VAE_model(784, [*HIDDEN, 4], 49).decode(torch.zeros(N, 2)).shape != (N, 49):
        fail("decode_dim is not the number of the decoder's outputs")


def check_value(value, expected, what):
    if not math.isclose(value, expected, rel_tol=1e-2):
        ratios = [ratio for ratio in REASONS if math.isclose(value, ratio * expected, rel_tol=1e-2)]
        reasons = [REASONS[ratio] for ratio in ratios]
        fail(": ".join([f"{what} is {value:.4g} and should be {expected:.4g}", *reasons]))


@rests_on(*NETWORK)
def test_3b_reconstruction_term(code):
    """With all parameters 0 every pixel has the probability 1/2, and costs log 2."""
    vae = Vae(code, LATENT, std=0.0)
    value, squares = vae.loss(0.0), float((vae.x - 0.5).square().sum(1).mean())
    if any(math.isclose(value, each * squares, rel_tol=1e-3) for each in (1, 0.5)):
        note("the reconstruction term is a squared error; for binary pixels Eq. 2 has the cross-entropy")
    else:
        check_value(value, 784 * math.log(2), "with probabilities of 1/2 the reconstruction term")


@rests_on(*NETWORK)
def test_3b_kl_term(code):
    """It is 0 for N(0, I), and the KL of torch.distributions elsewhere: (L(c2) - L(c1)) / (c2 - c1)."""
    prior = Vae(code, LATENT, std=0.0)
    value = prior.loss(1.0) - prior.loss(0.0)
    if abs(value) > 1e-3:
        fail(f"the KL term of N(0, I) is {value:.4g} and should be 0")
    vae = Vae(code, LATENT, std=0.1)
    kl = kl_divergence(Normal(vae.mean, (vae.logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    low, high = vae.loss(0.5), vae.loss(20.5)
    if low == high:
        fail("the loss does not depend on coeff")
    check_value((high - low) / 20, float(kl), "the KL term")
