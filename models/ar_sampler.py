"""Draw images pixel by pixel, and compute each feature only once.

The plain way to sample runs the whole network for every pixel: 784 passes for a 28 x 28 image. Each pass
computes almost everything again that the pass before it has computed. A masked layer's output at a pixel
depends only on the layer's inputs at that pixel, to its left and in the rows above. These inputs never change
once they are known. So each layer keeps its inputs in a cache, and the network runs on one pixel at a time
(Ramachandran et al. 2017, arXiv 1704.06001).

A layer's kernel is split into two parts:

    rows above the centre   The rows above are complete when a row starts. They are convolved once per row.
    centre row              Each pixel then needs one matrix product with the inputs to its left.
"""

import torch
from torch.nn import functional as F


@torch.no_grad()
def draw_images(network, shape, generator=None, cached=True, given=None, *y):
    """Draw images in {0, 1} from a network in eval mode, then restore its mode.

    Args:
        network: a `PixelCNN`.
        shape: of the images, (N, 1, H, W).
        generator, cached, given: see `PixelCNN.sample`.
        y: one-hot labels, (N, num_classes), if the network takes them.
    """
    generator = generator or torch.Generator().manual_seed(0)
    # Bernoulli(p) is 1 where a uniform number u is below p, so where logit(u) is below the logit of p.
    thresholds = torch.rand(shape, generator=generator).logit()
    images = next(network.parameters()).new_zeros(shape)
    rows_given = 0
    if given is not None:
        rows_given = given.shape[2]
        images[:, :, :rows_given] = given
    was_training = network.training
    network.eval()
    try:
        draw = _draw_with_cache if cached else _draw_plainly
        draw(network, images, thresholds.to(images), rows_given, y)
    finally:
        network.train(was_training)
    return images


def _draw_plainly(network, images, thresholds, rows_given, y):
    """Fill in `images` below the given rows, with one pass of the whole network for each pixel."""
    _, _, height, width = images.shape
    for row in range(rows_given, height):
        for column in range(width):
            logits = network(images, *y)[:, :, row, column]
            images[:, :, row, column] = (thresholds[:, :, row, column] < logits).to(images)


def _draw_with_cache(network, images, thresholds, rows_given, y):
    """Fill in `images` below the given rows, with the network run on one pixel at a time."""
    _, _, height, width = images.shape
    position = network.position_vectors(height, width)
    masked_layers = [layer for layer in network.modules() if hasattr(layer, "mask_type")]
    caches = {layer: LayerCache(layer, images, y) for layer in masked_layers}

    def convolve(layer, h):
        return caches[layer].next_output(h)

    for row in range(height):
        for cache in caches.values():
            cache.start_row()
        for column in range(width):
            pixel = images[:, :, row : row + 1, column : column + 1]  # a view of a pixel to draw
            vector = position[:, row : row + 1, column : column + 1]
            logits = network.logits(pixel, convolve, vector)
            if row >= rows_given:
                pixel.copy_(thresholds[:, :, row : row + 1, column : column + 1] < logits)
            caches[network.first].store(pixel)


class LayerCache:
    """A masked layer's inputs in the row under way and in the rows above that its kernel reaches.

    Their shape is (rows, N, padded width * in_channels), so that the inputs under a kernel row are one slice.
    """

    def __init__(self, layer, images, y):
        num_samples, _, _, self.width = images.shape
        self.channels, self.out_channels = layer.in_channels, layer.out_channels
        # For inputs of zero, a layer returns what it adds to every pixel: its bias and, with labels, V y.
        self.bias = layer(images.new_zeros(num_samples, self.channels, 1, 1), *y).flatten(1)
        weight = layer.visible_weight()
        self.weight_above = weight[:, :, :-1]
        self.reach = layer.kernel_size[1] // 2
        columns = self.reach + (layer.mask_type == "B")  # of the centre row that the mask shows
        self.num_seen = columns * self.channels
        self.weight_row = weight[:, :, -1, :columns].permute(2, 1, 0).flatten(0, 1).contiguous()
        padded_width = self.width + 2 * self.reach
        self.inputs = images.new_zeros(weight.shape[2], num_samples, padded_width * self.channels)
        self.row = self.inputs[-1]

    def start_row(self):
        """Move all rows up by one, and convolve the rows above for every pixel of the new row."""
        self.column = -1
        if len(self.inputs) == 1:
            self.above = [self.bias] * self.width
            return
        for row, next_row in zip(self.inputs, self.inputs[1:]):
            row.copy_(next_row)
        self.row.zero_()
        x = self.inputs[:-1].unflatten(2, (-1, self.channels)).permute(1, 3, 0, 2)  # as images, for conv2d
        above = F.conv2d(x, self.weight_above).squeeze(2).permute(2, 0, 1)  # (W, N, out_channels)
        self.above = (above + self.bias).unbind()

    def next_output(self, h):
        """Move on to the next pixel of the row; return the output (N, out_channels, 1, 1) for its input h."""
        self.column += 1
        self.store(h)
        start = self.column * self.channels
        inputs = self.row[:, start : start + self.num_seen]
        return torch.addmm(self.above[self.column], inputs, self.weight_row).view(-1, self.out_channels, 1, 1)

    def store(self, h):
        """Keep the input at the pixel under way, h (N, in_channels, 1, 1)."""
        start = (self.column + self.reach) * self.channels
        self.row[:, start : start + self.channels] = h.flatten(1)
