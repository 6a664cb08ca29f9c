"""PixelCNN, plain and class-conditional, for binary images.

p(x) = prod_i p(x_i | x_1, ..., x_{i-1}) over the pixels in raster order, each factor a Bernoulli whose
logit a stack of masked convolutions computes (van den Oord et al. 2016a, "Pixel Recurrent Neural
Networks", arXiv 1601.06759; labels as in van den Oord et al. 2016b, "Conditional Image Generation with
PixelCNN Decoders", arXiv 1606.05328).
"""

from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_SHAPE = (1, 28, 28)
BLOCKS = ("plain", "residual", "bottleneck", "depthwise", "gated")


class MaskedConv2d(nn.Conv2d):
    """Convolution that sees only pixels that come earlier in raster order (2016a, section 3.4, fig. 2).

    Mask 'A' hides the centre as well and belongs in the first layer, mask 'B' shows it. The rows below the
    centre are all hidden, so they are cut off rather than multiplied by zero: a 7 x 7 kernel costs 4/7.

    Args:
        mask_type: 'A' or 'B'; anything else raises ValueError.
        padding: pixels on each side, as in `nn.Conv2d`; the other arguments likewise. Kernels are odd.
    """

    def __init__(
        self, mask_type, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True, groups=1
    ):
        if mask_type not in ("A", "B"):
            raise ValueError(f"mask_type is 'A' or 'B', not {mask_type!r}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.mask_type = mask_type
        row, column = (size // 2 for size in self.kernel_size)
        mask = torch.ones_like(self.weight)
        mask[:, :, row, column + (mask_type == "B") :] = 0
        mask[:, :, row + 1 :] = 0
        self.register_buffer("mask", mask, persistent=False)  # it follows from the arguments

    def forward(self, x):
        """(N, in_channels, H, W) -> (N, out_channels, H', W'), equal to `conv2d(x, weight * mask)`."""
        weight = self.visible_weight()
        hidden_rows = self.kernel_size[0] - weight.shape[2]
        top, side = self.padding
        if top or side or hidden_rows:
            x = F.pad(x, (side, side, top, top - hidden_rows))
        return F.conv2d(x, weight, self.bias, self.stride, groups=self.groups)

    def visible_weight(self):
        """The masked kernel without the rows below its centre."""
        rows = self.kernel_size[0] // 2 + 1
        return self.weight[:, :, :rows] * self.mask[:, :, :rows]

    def constant(self):
        """What the layer adds to every pixel of its output."""
        return self.bias


class ConditionalMaskedConv2d(MaskedConv2d):
    """Masked convolution with a bias per class, W * x + b + V y (2016b, section 2.3).

    V is the linear map `class_emb` from one-hot labels to output channels; b is its only constant.
    """

    def __init__(
        self,
        mask_type,
        in_channels,
        out_channels,
        kernel_size,
        num_classes,
        stride=1,
        padding=0,
        bias=True,
        groups=1,
    ):
        super().__init__(mask_type, in_channels, out_channels, kernel_size, stride, padding, bias, groups)
        self.class_emb = nn.Linear(num_classes, out_channels, bias=False)
        # Small beside the features, so that these decide first and the label biases them.
        nn.init.normal_(self.class_emb.weight, std=0.05)

    def forward(self, x, y):
        """x (N, in_channels, H, W), y (N, num_classes) one-hot -> (N, out_channels, H', W')."""
        return super().forward(x) + self.class_emb(y)[:, :, None, None]

    def constant(self, y):
        """What the layer adds to every pixel of its output, (N, out_channels)."""
        return self.bias + self.class_emb(y)


class PixelCNN(nn.Module):
    """Logits of every pixel given the pixels before it.

    A type-A layer, `num_layers` blocks around a type-B layer each, and two 1 x 1 layers.

    Args:
        block: what a block makes of its input h: 'plain' replaces it with layer(h); 'residual' gives h + layer(h);
            'bottleneck' is residual with the layer at half the channels, between two 1 x 1 layers (2016a, section
            3.3, fig. 5); 'depthwise' is residual with a kernel for each channel by itself and, after it, two 1 x 1
            layers with twice the channels between them; 'gated' is residual with a sigmoid gate on each feature map
            (2016b, Eq. 2, with a linear map in place of the tanh). Anything else raises ValueError.
        channels: feature maps between the blocks.
        first_kernel_size, kernel_size: of the type-A layer and of the type-B layers between it and the last
            two; odd.
        head_channels: feature maps between the two 1 x 1 layers.
        activation: name of the nonlinearity in `torch.nn.functional`, before each layer but the first.
        dropout: probability with which each feature in a block is dropped in training.
        normalised: normalise the input of each block over the channels of a pixel (Ba et al. 2016, arXiv 1607.06450),
            which, unlike a normalisation over pixels, is causal.
        positional: add a learned vector for each position of a 28 x 28 image to the type-A layer's output;
            positions beyond it in a larger image share the vector of the nearest one.
        conv: the class of the masked layers.
    """

    def __init__(
        self,
        num_layers=8,
        channels=32,
        first_kernel_size=27,
        kernel_size=7,
        head_channels=64,
        activation="hardswish",
        block="residual",
        dropout=0.0,
        normalised=False,
        positional=True,
        conv=MaskedConv2d,
    ):
        if block not in BLOCKS:
            raise ValueError(f"block is one of {', '.join(BLOCKS)}, not {block!r}")
        super().__init__()
        self.block, self.dropout, self.normalised = block, dropout, normalised
        self.activation = getattr(F, activation)
        self.first = conv("A", 1, channels, first_kernel_size, padding=first_kernel_size // 2)
        self.position = nn.Parameter(torch.zeros(channels, *IMAGE_SHAPE[1:])) if positional else None

        def masked(in_channels, out_channels, size=kernel_size, groups=1):
            return conv("B", in_channels, out_channels, size, padding=size // 2, groups=groups)

        def layers():
            if block == "bottleneck":
                half = channels // 2
                return [masked(channels, half, 1), masked(half, half), masked(half, channels, 1)]
            if block == "depthwise":
                twice = 2 * channels
                return [
                    masked(channels, channels, groups=channels),
                    masked(channels, twice, 1),
                    masked(twice, channels, 1),
                ]
            return [masked(channels, 2 * channels if block == "gated" else channels)]

        self.blocks = nn.ModuleList(nn.ModuleList(layers()) for _ in range(num_layers))
        self.norms = nn.ModuleList(
            nn.LayerNorm(channels) if normalised else nn.Identity() for _ in range(num_layers)
        )
        self.head = nn.ModuleList([masked(channels, head_channels, 1), masked(head_channels, 1, 1)])

    def forward(self, x):
        """(N, 1, H, W) images in {0, 1} -> (N, 1, H, W) logits."""
        return self._logits(x, lambda layer, h: layer(h), self._offset(*x.shape[2:]))

    def sample(self, num_samples, generator=None, cached=True, given=None):
        """Draw (num_samples, 1, 28, 28) images in {0, 1}, pixel by pixel in raster order, in eval mode.

        The random numbers come from `generator` (a CPU `torch.Generator`; without one, a fresh one with
        seed 0), so the global random state is left alone and the draw is repeatable.

        Args:
            cached: compute each feature once (Ramachandran et al. 2017, arXiv 1704.06001); without it, run
                the whole network for every pixel. Both draw the same images, up to a tie within rounding.
            given: (num_samples, 1, rows, 28) in {0, 1}, the uppermost rows of the images, to be completed.
        """
        return self._draw(num_samples, generator, cached, given)

    def _offset(self, height, width):
        """What is added to the type-A layer's output because of the position, (channels, H, W)."""
        if self.position is None:
            return self.first.weight.new_zeros(1, height, width)
        _, rows, columns = self.position.shape
        row, column = torch.arange(height).clamp(max=rows - 1), torch.arange(width).clamp(max=columns - 1)
        return self.position[:, row[:, None], column]

    def _logits(self, x, apply, offset):
        """The network, with `apply(layer, features)` in place of each masked convolution.

        Everything else acts on each pixel by itself, so the same lines serve whole images and one column.
        """
        h = apply(self.first, x)
        h = h + offset.to(h.dtype)  # under autocast the features stay in bfloat16
        for block, norm in zip(self.blocks, self.norms):
            update = norm(h.movedim(1, -1)).movedim(-1, 1) if self.normalised else h
            for layer in block:
                update = apply(layer, F.dropout(self.activation(update), self.dropout, self.training))
            if self.block == "gated":
                update = F.glu(update, dim=1)
            h = update if self.block == "plain" else h + update
        for layer in self.head:
            h = apply(layer, self.activation(h))
        return h

    @torch.no_grad()
    def _draw(self, num_samples, generator, cached, given, *y):
        images = self.first.weight.new_zeros(num_samples, *IMAGE_SHAPE)
        _, _, height, width = images.shape
        num_given = 0 if given is None else given.shape[2]
        if num_given:
            images[:, :, :num_given] = given
        offset = self._offset(height, width)
        generator = generator or torch.Generator().manual_seed(0)
        # x = [logit(u) < logit(p)] with uniform u is a draw of Bernoulli(p).
        thresholds = torch.rand(images.shape, generator=generator).logit().to(images)
        layers = [self.first, *chain(*self.blocks), *self.head]
        caches = {layer: _LayerCache(layer, images, layer.constant(*y)) for layer in layers} if cached else {}
        for row in range(height):
            for cache in caches.values():
                cache.start_row()
            for column in range(width):
                if cached:
                    logits = self._logits(
                        None, lambda layer, h: caches[layer].column(column, h), offset[:, row, column]
                    )
                else:
                    logits = self(images, *y)[:, :, row, column]
                if row >= num_given:
                    images[:, :, row, column] = (thresholds[:, :, row, column] < logits).to(images)
                if cached:
                    caches[self.first].store(column, images[:, :, row, column])
        return images


class ConditionalPixelCNN(PixelCNN):
    """PixelCNN in which V y reaches every masked layer, p(x | y).

    Args:
        num_classes: length of the one-hot labels.
        architecture: the arguments of `PixelCNN`.
    """

    def __init__(self, num_classes=10, **architecture):
        super().__init__(conv=partial(ConditionalMaskedConv2d, num_classes=num_classes), **architecture)
        self.num_classes = num_classes

    def forward(self, x, y):
        """x (N, 1, H, W) in {0, 1}, y (N, num_classes) one-hot -> (N, 1, H, W) logits."""
        return self._logits(x, lambda layer, h: layer(h, y), self._offset(*x.shape[2:]))

    def sample(self, labels, generator=None, cached=True, given=None):
        """Draw an image in {0, 1} for each of `labels`, (N,) integers; see `PixelCNN.sample`."""
        weight = self.first.class_emb.weight
        labels = torch.as_tensor(labels, device=weight.device).long()
        y = F.one_hot(labels, self.num_classes).to(weight)
        return self._draw(len(labels), generator, cached, given, y)


class _LayerCache:
    """What one masked layer needs to give its output at one pixel after another.

    The inputs of the row under way and of those above that the kernel reaches are kept, (rows, N, padded
    width * channels), so that the part of a row that the kernel sees is one slice. What the rows above add
    is computed for a whole row at once; a pixel then costs one matrix product with the kernel's last row.
    """

    def __init__(self, layer, images, constant):
        num_samples, _, _, self.width = images.shape
        self.constant = constant
        weight = layer.visible_weight()
        if layer.groups > 1:  # one kernel for all channels, with zeros between those of different groups
            same_group = torch.eye(layer.groups).to(weight)[:, None, :, None, None, None]
            weight = same_group * weight.unflatten(0, (layer.groups, -1))[:, :, None]
            weight = weight.flatten(0, 1).flatten(1, 2)
        self.weight_above = weight[:, :, :-1]
        self.reach = layer.kernel_size[1] // 2
        # Mask 'A' stops before the centre, mask 'B' with it.
        self.seen = self.reach + (layer.mask_type == "B")
        self.weight_row = weight[:, :, -1, : self.seen].permute(2, 1, 0).flatten(0, 1).contiguous()
        self.channels = layer.in_channels
        self.inputs = weight.new_zeros(
            self.weight_above.shape[2] + 1, num_samples, (self.width + 2 * self.reach) * self.channels
        )
        self.row = self.inputs[-1]

    def start_row(self):
        """Move up one row and add up what the rows above give every pixel of the new one."""
        if len(self.inputs) > 1:
            for row, next_row in zip(self.inputs, self.inputs[1:]):
                row.copy_(next_row)
            self.row.zero_()
            x = self.inputs[:-1].unflatten(2, (-1, self.channels)).permute(1, 3, 0, 2)
            # (N, out_channels, 1, W) -> (W, N, out_channels)
            above = F.conv2d(x, self.weight_above).squeeze(2).permute(2, 0, 1) + self.constant
        else:
            above = self.constant.expand(self.width, self.inputs.shape[1], -1)
        self.above = above.unbind()

    def store(self, column, x):
        """Keep the layer's input (N, channels) at this column of the row under way."""
        start = (column + self.reach) * self.channels
        self.row[:, start : start + self.channels] = x

    def column(self, column, x):
        """The layer's output (N, out_channels) at this column, given its input there (None for mask 'A')."""
        if x is not None:
            self.store(column, x)
        start = column * self.channels
        window = self.row[:, start : start + self.seen * self.channels]
        return torch.addmm(self.above[column], window, self.weight_row)
