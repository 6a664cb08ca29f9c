"""What the networks share: constants, fully connected layers, and a check of inputs."""

from torch import nn

IMAGE_SHAPE = (1, 28, 28)
NUM_PIXELS = 28 * 28
NUM_CLASSES = 10


def linear_layers(*widths, dropout=None):
    """Make linear layers between consecutive widths, with LeakyReLU and, if given, dropout after each but the last."""
    layers = [nn.Linear(*widths[:2])]
    for inputs, outputs in zip(widths[1:], widths[2:]):
        layers.append(nn.LeakyReLU(0.2))
        if dropout is not None:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(inputs, outputs))
    return layers


def checked(name, value, shape, weight):
    """Return an input in the dtype of a `weight`, or raise ValueError that says what `name` takes and what it got.

    It takes floats of any precision. In `shape`, such as ("N", 1, "H", "W"), a text stands for any size.
    """
    fits = value.is_floating_point() and value.dim() == len(shape)
    if not fits or any(size != each for size, each in zip(shape, value.shape) if not isinstance(size, str)):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} takes floats ({wanted}), not {value.dtype} {tuple(value.shape)}")
    return value.to(weight.dtype)
