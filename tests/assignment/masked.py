"""What the checks see of masked layers and of networks of them: kernels, and the inputs that outputs depend on."""

import torch
from torch import nn
from torch.nn import functional as F

from .judge import fail
from .probes import attempt

CHANNELS, OUTPUTS, CLASSES = 3, 4, 10
CONDITIONAL = "ConditionalMaskedConv2d"
ROW, COLUMN = 5, 7  # of the output that the texts speak of


def make_layer(code, mask_type, size=3, inputs=CHANNELS, name="MaskedConv2d", **more):
    """Make a masked layer by the handout's names or by position."""
    make, sizes = getattr(code, name), {"in_channels": inputs, "out_channels": OUTPUTS, "kernel_size": size}
    if name == CONDITIONAL:
        sizes["num_classes"] = CLASSES
    tries = [lambda: make(mask_type=mask_type, **sizes, **more), lambda: make(mask_type, **sizes, **more)]
    return attempt(f"{name} with {sizes}", *tries, lambda: make(mask_type, *sizes.values(), **more))


def kernel_size(layer):
    return next((each.shape[-1] for each in layer.parameters() if each.dim() == 4), 0)


def one_hot(label, count=1):
    return F.one_hot(torch.tensor([label] * count), CLASSES).float()


class WithLabel(nn.Module):
    """A module as a function of x alone."""

    def __init__(self, module, label):
        super().__init__()
        self.module, self.label = module, label

    def forward(self, x):
        return self.module(x, one_hot(self.label, len(x)))


def kernel_of(layer, size, channels=CHANNELS):
    """Return the kernel of a layer, (out, in, size, size): its answers to single bright pixels."""
    side = 2 * size + 1
    x = torch.zeros(channels + 1, channels, side, side)
    x[range(channels), range(channels), size, size] = 1
    output = layer(x).detach()
    answers = output[:-1] - output[-1:]
    last = size + (answers.shape[-1] - (side - size + 1)) // 2  # moved where the layer pads its input
    rows = slice(last - size + 1, last + 1)
    return answers[:, :, rows, rows].flip(-1, -2).transpose(0, 1)


def depends(gradient):
    """Tell which gradients differ from 0 by more than rounding."""
    return gradient.abs() > 1e-6 * gradient.abs().max().clamp(min=1e-30)


def seen_places(layer, size, kind):
    """Tell which places, "earlier", "centre" or "later" in raster order, a layer sees, (out, in, places)."""
    order = torch.arange(size * size) - size * size // 2
    places = {"earlier": order < 0, "centre": order == 0, "later": order > 0}[kind].nonzero().flatten()
    return depends(kernel_of(layer, size)).flatten(2)[..., places], places


def check_mask(layer, size, mask_type, kind, visible):
    """Check that a layer sees, or does not see, the places of a kind, from all channels to all channels."""
    seen, places = seen_places(layer, size, kind)
    wrong = (seen != visible).float().mean(dim=(0, 1))
    if len(places) and wrong.max() > (0.1 if visible else 0):  # a weight may be almost 0 by chance
        row, column = divmod(int(places[wrong.argmax()]), size)
        place = ROW + row - size // 2, COLUMN + column - size // 2
        verb = "does not depend" if visible else "depends"
        where = f"with mask {mask_type!r} the output at {ROW, COLUMN}"
        fail(f"{where} {verb} on the input at {place} (size {size})")


def seen_from(network, x, row, column):
    """Tell which pixels of x the output at a pixel depends on, (H, W)."""
    x = x.clone().requires_grad_()
    outputs = network(x)[:, :, row, column]
    weights = torch.linspace(0.5, 1.5, outputs.shape[1])  # so that channels do not cancel out
    (gradient,) = torch.autograd.grad((outputs * weights).sum(), x)
    return depends(gradient.abs().sum(dim=(0, 1)))


def check_causality(network, x, pixels, what):
    """Check that the outputs at some pixels depend on earlier pixels alone."""
    for row, column in pixels:
        seen = seen_from(network, x, row, column).flatten().nonzero().flatten()
        leaks = seen[seen >= row * x.shape[-1] + column]
        if len(leaks):
            leak = divmod(int(leaks[0]), x.shape[-1])
            fail(f"{what} the output at {row, column} depends on the input at {leak}")


def masked_calls(network, classes, x):
    """Run a network; return (layer, input, other arguments) of its masked layers, without calls inside other ones."""
    calls, under_way = [], []

    def begin(layer, args, kwargs):
        if not under_way:
            calls.append((layer, args[0].detach().clone(), [*args[1:], *kwargs.values()]))
        under_way.append(layer)

    def end(*_):
        under_way.pop()

    masked = [each for each in network.modules() if isinstance(each, classes)]
    hooks = [each.register_forward_pre_hook(begin, with_kwargs=True) for each in masked]
    hooks += [each.register_forward_hook(end) for each in masked]
    network(x)
    for hook in hooks:
        hook.remove()
    return calls


def strokes(count):
    """Return binary images, (count, 1, 28, 28), with a bar each."""
    images = torch.zeros(count, 1, 28, 28)
    for i in range(count):
        images[i, 0, 3:25, 6 + 3 * i : 14 + 3 * i] = 1
    return images
