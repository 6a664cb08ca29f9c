"""What the checks see of a network of linear layers, whatever modules it is made of."""

from collections import namedtuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .judge import NOT_JUDGED, fail, note

LINEAR, NORMS = ("linear", "addmm", "mm", "matmul", "__matmul__"), ("batch_norm", "layer_norm")
OTHERS = ("conv", "pool", "lstm", "gru", "attention")  # parts of names of torch's functions
Layer = namedtuple("Layer", "name input output")  # a call of a linear layer or of a normalisation


def redraw(network, std=0.1):
    """Draw all parameters anew from N(0, std^2), because zeros hide effects; return the network in eval mode."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, std)
    return network.eval()


def values(network):
    """Return the parameters, without buffers, as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def attempt(what, *calls):
    """Return what the first of the calls returns that raises nothing; `what` says what they try."""
    errors = []
    for call in calls:
        try:
            return call()
        except Exception as error:
            errors.append(error)
    if all(isinstance(error, TypeError) and "argument" in str(error) for error in errors):
        fail(f"the submission does not take {what}: {errors[0]}", NOT_JUDGED)
    raise errors[0]


def on_images(what, function, x):
    """Call a function with images (N, 784), or with images (N, 1, 28, 28) where that alone works."""
    shapes = (-1, 784), (-1, 1, 28, 28)
    return attempt(what, *[lambda shape=shape: function(x.reshape(shape)) for shape in shapes])


def is_close(a, b, tolerance=1e-5):
    """Tell whether two tensors are equal, but for rounding."""
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-12))


class Trace(TorchFunctionMode):
    """Records the layers that are called, and the names of all functions of torch."""

    def __init__(self):
        super().__init__()
        self.layers, self.names = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.names.append(name)
        x = args[1 if name == "addmm" else 0].detach().clone() if name in LINEAR + NORMS else None
        output = function(*args, **(kwargs or {}))
        if x is not None:  # clones, as the next function may work in place
            self.layers.append(Layer(name, x, output.detach().clone()))
        return output


def trace(call):
    with torch.no_grad(), Trace() as record:
        call()
    return record


def linear_levels(record):
    """Return lists of linear layers; those in one list have the same input."""
    levels = []
    for layer in record.layers:
        if layer.name in LINEAR:
            if levels and is_close(levels[-1][0].input, layer.input):
                levels[-1].append(layer)
            else:
                levels.append([layer])
    return levels


def relation(a, b):
    """Return the name of the function, of each value by itself, that makes `b` of `a`."""
    a, b = a.flatten(), b.flatten()
    known = {"nothing": a, "ReLU": a.relu(), "a sigmoid": a.sigmoid(), "tanh": a.tanh()}
    for name, expected in known.items():
        if is_close(expected, b):
            return name
    if len(a) == len(b) and (a < 0).any():
        slope = float((b[a < 0] / a[a < 0]).median())
        if 0 < slope < 1 and is_close(F.leaky_relu(a, slope), b):
            return "LeakyReLU"
    return "another function"


def check_units(record, expected, network):
    found = [sum(layer.output.shape[-1] for layer in level) for level in linear_levels(record)]
    if found != expected:
        fail(f"the linear layers of the {network} have {found} outputs, and should have {expected}")


def check_layers(record, network):
    """Check that a network has linear layers alone, and between them LeakyReLU and at most a normalisation."""
    others = [name for name in record.names if any(part in name for part in OTHERS)]
    if others:
        fail(f"the {network} calls {others[0]}, and should have linear layers alone")
    if any(layer.name in NORMS for layer in record.layers):
        note(f"the {network} has normalisation, which is not required")
    between, last = [], None
    for layer in record.layers:
        if last is not None and not is_close(last.input, layer.input):
            if last.name in LINEAR or not between:
                between.append([])
            between[-1].append(relation(last.output, layer.input))
        last = layer
    for number, functions in enumerate(between, start=1):
        found = " and ".join(each for each in functions if each != "nothing") or "nothing"
        if found != "LeakyReLU":
            fail(f"behind linear layer {number} of the {network} comes {found}, and should come LeakyReLU")
