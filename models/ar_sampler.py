"""Draw images pixel by pixel, and compute each feature only once.

The plain way runs the whole network for each of the 784 pixels, and computes most features again and again.
But a masked layer's inputs never change once they are known. So each layer keeps them in a cache, and the
network runs on one pixel at a time (Ramachandran et al. 2017, arXiv 1704.06001).
"""

import torch
from torch.nn import functional as F


@torch.no_grad()
def draw_images(network, shape, generator=None, cached=True, given=None, y=()):
    """Draw images in {0, 1} of `shape` (N, 1, H, W) from a `PixelCNN` in eval mode; see its method `sample`.

    `y` is (one-hot labels (N, num_classes),) if the network takes them, else empty.
    """
    generator = generator or torch.Generator().manual_seed(0)
    # Bernoulli(p) is 1 where a uniform number u is below p, so where logit(u) is below the logit of p.
    thresholds = torch.rand(shape, generator=generator).logit()
    images = next(network.parameters()).new_zeros(shape)
    rows_given = 0 if given is None else given.shape[2]
    if rows_given:
        images[:, :, :rows_given] = given
    draw = _draw_with_cache if cached else _draw_plainly
    was_training = network.training
    network.eval()
    try:
        draw(network, images, thresholds.to(images), rows_given, y)
    finally:
        network.train(was_training)
    return images


def _draw_plainly(network, images, thresholds, rows_given, y):
    for row in range(rows_given, images.shape[2]):
        for column in range(images.shape[3]):
            logits = network(images, *y)[:, :, row, column]
            images[:, :, row, column] = (thresholds[:, :, row, column] < logits).to(images)


def _draw_with_cache(network, images, thresholds, rows_given, y):
    _, _, height, width = images.shape
    position = network.position_vectors(height, width)
    masked_layers = [layer for layer in network.modules() if hasattr(layer, "mask_type")]
    caches = {layer: LayerCache(layer, images, y) for layer in masked_layers}
    for row in range(height):
        for cache in caches.values():
            cache.start_row()
        for column in range(width):
            # The index of one pixel that keeps the dimensions of height and width.
            here = (..., slice(row, row + 1), slice(column, column + 1))
            logits = network.logits(images[here], lambda layer, h: caches[layer].convolve(h), position[here])
            if row >= rows_given:
                images[here] = (thresholds[here] < logits).to(images)
            caches[network.first].store(images[here])


class LayerCache:
    """A masked layer's inputs in the current row and in the rows above that its kernel reaches.

    The rows above are convolved once per row. Each pixel then needs one matrix product with the inputs to its
    left. These are one slice, as `inputs` has the shape (rows, N, padded width * in_channels).
    """

    def __init__(self, layer, images, y):
        num_samples, _, _, width = images.shape
        self.channels, self.reach = layer.in_channels, layer.kernel_size[1] // 2
        # For inputs of zero, a layer returns what it adds to every pixel: its bias and, with labels, V y.
        self.bias = layer(images.new_zeros(num_samples, self.channels, 1, 1), *y).flatten(1)
        self.above = [self.bias] * width
        weight = layer.visible_weight()
        self.weight_above = weight[:, :, :-1]
        columns = self.reach + (layer.mask_type == "B")  # of the centre row that the mask shows
        # A matrix (columns * in_channels, out_channels), for one product with the inputs to the left.
        self.weight_row = weight[:, :, -1, :columns].permute(2, 1, 0).flatten(0, 1).contiguous()
        padded_width = width + 2 * self.reach
        self.inputs = images.new_zeros(weight.shape[2], num_samples, padded_width * self.channels)
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
