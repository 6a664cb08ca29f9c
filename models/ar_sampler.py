"""Draw images pixel by pixel, and compute each feature only once.

The plain way runs the whole network for each of the 784 pixels, and computes most features again and again.
But a masked layer's inputs never change once they are known. So each layer keeps them in a cache, and the
network runs on one pixel at a time (Ramachandran et al. 2017, arXiv 1704.06001).
"""

import contextlib
import warnings

import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 1000  # images drawn at once, which bounds the memory
NUM_CHECKED = 8  # images whose logits are compared with those of a forward pass


class SlowSampling(UserWarning):
    """The features of a network cannot be cached."""


@torch.no_grad()
def draw_images(network, shape, generator=None, cached=True, given=None, y=()):
    """Draw images in {0, 1} of `shape` (N, 1, H, W) from a network in eval mode; see `PixelCNN.sample`.

    Any network that returns logits will do. If its features cannot be cached, the plain way draws, and the warning
    `SlowSampling` says why. `y` is (one-hot labels (N, num_classes),) if the network takes them, else empty.
    """
    generator = generator or torch.Generator().manual_seed(0)
    # Bernoulli(p) is 1 where a uniform number u is below p, so where logit(u) is below the logit of p.
    thresholds = torch.rand(shape, generator=generator, dtype=torch.float32).logit()
    images = next(network.parameters()).new_zeros(shape)
    rows_given = 0 if given is None else given.shape[-2]
    if rows_given:
        if given.shape != (*shape[:2], rows_given, shape[3]) or not ((given == 0) | (given == 1)).all():
            found = f"{tuple(given.shape)} from {given.min():.3g} to {given.max():.3g}"
            raise ValueError(f"given takes upper rows in {{0, 1}} of images {shape}, not {found}")
        images[:, :, :rows_given] = given
    was_training = network.training
    network.eval()
    try:
        for start in range(0, len(images), CHUNK):
            chunk = slice(start, start + CHUNK)
            labels = [each[chunk].to(images) for each in y]
            part = network, images[chunk], thresholds[chunk].to(images), rows_given, labels
            if cached:
                try:
                    _draw_with_cache(*part)
                except Exception as error:  # a mistake in the network would also end the plain way
                    warnings.warn(f"a forward pass for each pixel, because {error!r}", SlowSampling, 3)
                    cached = False
            if not cached:
                _draw_plainly(*part)
    finally:
        network.train(was_training)
    return images


def can_cache(network, shape, y=()):
    """Tell whether `draw_images` can cache the features, by drawing a few images; eight show it well."""
    with warnings.catch_warnings(), contextlib.suppress(SlowSampling):
        warnings.simplefilter("error", SlowSampling)
        draw_images(network, shape, y=y)
        return True
    return False


def _draw_plainly(network, images, thresholds, rows_given, y):
    images[:, :, rows_given:] = 0
    for row in range(rows_given, images.shape[2]):
        for column in range(images.shape[3]):
            logits = network(images, *y)[:, :, row, column]
            images[:, :, row, column] = (thresholds[:, :, row, column] < logits).to(images)


def _draw_with_cache(network, images, thresholds, rows_given, y):
    _, _, height, width = images.shape
    position = network.position_vectors(height, width)
    caches = {
        layer: LayerCache(layer, images, y)
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d) and (hasattr(layer, "mask") or layer.kernel_size != (1, 1))
    }

    def convolve(layer, h):
        return caches[layer].convolve(h) if layer in caches else layer(h, *y)

    drawn_from = torch.zeros_like(images[:NUM_CHECKED])
    for row in range(height):
        for cache in caches.values():
            cache.start_row()
        for column in range(width):
            # The index of one pixel that keeps the dimensions of height and width.
            here = (..., slice(row, row + 1), slice(column, column + 1))
            logits = network.logits(images[here], convolve, position[here])
            drawn_from[here] = logits[:NUM_CHECKED]
            if row >= rows_given:
                images[here] = (thresholds[here] < logits).to(images)
            caches[network.first].store(images[here])
    logits = network(images[:NUM_CHECKED], *(each[:NUM_CHECKED] for each in y))
    # GPUs convolve in TF32, whose epsilon is 2**-10.
    epsilon = max(torch.finfo(logits.dtype).eps, 0 if logits.device.type == "cpu" else 2**-10)
    if not (logits - drawn_from).abs().max() <= epsilon**0.5 * (1 + logits.abs().max()):
        raise ValueError("the network has other logits for a pixel at a time than for an image")


class LayerCache:
    """A masked layer's inputs in the current row and in the rows above that its kernel reaches.

    The rows above are convolved once per row. Each pixel then needs one matrix product with the inputs to its
    left. These are one slice, as `inputs` has the shape (rows, N, padded width * in_channels).
    """

    def __init__(self, layer, images, y):
        num_samples, _, _, width = images.shape
        rows, self.reach = layer.kernel_size[0] // 2 + 1, layer.kernel_size[1] // 2
        columns = self.reach + 1  # of the centre row that the mask may show
        mask = layer.mask.expand_as(layer.weight)
        hides_later = (mask[:, :, rows - 1, columns:] == 0).all() and (mask[:, :, rows:] == 0).all()
        if not hides_later or {*layer.stride, *layer.dilation, layer.groups} != {1}:
            raise ValueError(f"{layer} shows later pixels, or its stride, dilation or groups are not 1")
        self.channels = layer.in_channels
        # For inputs of zero, a layer returns what it adds to every pixel: its bias and, with labels, V y.
        self.bias = layer(images.new_zeros(num_samples, self.channels, 1, 1), *y).flatten(1)
        self.above = [self.bias] * width
        weight = layer.weight[:, :, :rows] * mask[:, :, :rows]
        self.weight_above = weight[:, :, :-1]
        # A matrix (columns * in_channels, out_channels), for one product with the inputs to the left.
        self.weight_row = weight[:, :, -1, :columns].permute(2, 1, 0).flatten(0, 1).contiguous()
        self.inputs = images.new_zeros(rows, num_samples, (width + 2 * self.reach) * self.channels)
        self.row = self.inputs[-1]  # the current one

    def start_row(self):
        """Move all rows up by one, and convolve the rows above for every pixel of the new row."""
        self.column = -1
        if len(self.inputs) == 1:  # the kernel has no row above
            return
        self.inputs[:-1] = self.inputs[1:].clone()
        self.row.zero_()
        x = self.inputs[:-1].unflatten(2, (-1, self.channels)).permute(1, 3, 0, 2)  # as images, for conv2d
        above = F.conv2d(x, self.weight_above).squeeze(2).permute(2, 0, 1)  # (W, N, out_channels)
        self.above = (above + self.bias).unbind()

    def convolve(self, h):
        """Return the output (N, out_channels, 1, 1) at the next pixel of the row, whose input is h."""
        self.column += 1
        self.store(h)
        start = self.column * self.channels
        inputs = self.row[:, start : start + len(self.weight_row)]
        return torch.addmm(self.above[self.column], inputs, self.weight_row)[:, :, None, None]

    def store(self, h):
        """Keep the input h (N, in_channels, 1, 1) at the current pixel."""
        start = (self.column + self.reach) * self.channels
        self.row[:, start : start + self.channels] = h.flatten(1)
