"""PixelCNN, unconditional and class-conditional, for binary images.

Each pixel is predicted from the pixels before it in raster order: p(x) = prod_i p(x_i | x_1, ..., x_{i-1}).
Masked convolutions give the logits (van den Oord et al. 2016a, "Pixel Recurrent Neural Networks", arXiv
1601.06759; with labels, 2016b, "Conditional Image Generation with PixelCNN Decoders", arXiv 1606.05328).
"""

import math
from typing import Annotated, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from models.ar_sampler import draw_images
from models.common import IMAGE_SHAPE, NUM_CLASSES, checked

Activation = Literal["relu", "hardswish", "gelu", "silu"]  # names in torch.nn.functional
Block = Literal["plain", "residual", "gated"]


class MaskedConv2d(nn.Conv2d):
    """Convolution that sees no pixel that comes later in raster order (2016a, section 3.4, fig. 2).

    Mask 'A', for the first layer, also hides the centre of the kernel. Mask 'B' shows it. Others raise ValueError.
    """

    def __init__(self, mask_type, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        if mask_type not in ("A", "B"):
            raise ValueError(f"mask_type is 'A' or 'B', not {mask_type!r}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        row, column = (size // 2 for size in self.kernel_size)  # of the centre
        mask = torch.ones_like(self.weight)
        first_hidden = column if mask_type == "A" else column + 1
        mask[:, :, row, first_hidden:] = 0
        mask[:, :, row + 1 :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        """Convolve (N, in_channels, H, W) to (N, out_channels, H', W'); the kernel is weight * mask."""
        if isinstance(self.padding, str):  # "same" or "valid"
            return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)
        # The same, but without the rows below the centre, which are zero. So a 5 x 5 kernel takes 3/5 of the time.
        rows = self.kernel_size[0] // 2 + 1
        weight = self.weight[:, :, :rows] * self.mask[:, :, :rows]
        hidden_rows = self.kernel_size[0] - rows
        top, side = self.padding
        if top or side or hidden_rows:
            x = F.pad(x, (side, side, top, top - hidden_rows))  # a negative padding crops
        return F.conv2d(x, weight, self.bias, self.stride)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        # The handout saves the mask. It follows from the arguments, so a saved one is not needed.
        state_dict.pop(prefix + "mask", None)
        super()._load_from_state_dict(state_dict, prefix, *others)


class ConditionalMaskedConv2d(MaskedConv2d):
    """Masked convolution with a bias for each class, W * x + b + V y, where * convolves (2016b, section 2.3)."""

    def __init__(
        self, mask_type, in_channels, out_channels, kernel_size, num_classes, stride=1, padding=0, bias=True
    ):
        super().__init__(mask_type, in_channels, out_channels, kernel_size, stride, padding, bias)
        self.class_emb = nn.Linear(num_classes, out_channels, bias=False)  # V
        # Small values: at first the features decide, and the label shifts them a little.
        nn.init.normal_(self.class_emb.weight, std=0.05)

    def forward(self, x, y):
        """Convolve x (N, in_channels, H, W) and add V y, for one-hot labels y (N, num_classes)."""
        return super().forward(x) + self.class_emb(y.to(self.class_emb.weight.dtype))[:, :, None, None]


class PixelCNN(nn.Module):
    """Stack of masked convolutions that gives the logit of every pixel, given the pixels before it.

    A type-A layer, blocks of type-B layers, and a head of two 1 x 1 layers, whose mask B hides nothing. A block is a
    k x k layer and, if `pointwise`, a 1 x 1 layer, much as in 2016a, fig. 5. A 'plain' block replaces its input h by
    block(h). A 'residual' one adds block(h) to h. A 'gated' one adds a * sigmoid(b), where a and b are the halves of
    block(h) (2016b, Eq. 2, without tanh). Numbers in an annotation are the option's range.
    """

    def __init__(
        self,
        *,
        num_blocks: Annotated[int, (0, math.inf), "blocks between the type-A layer and the head"] = 8,
        channels: Annotated[int, "feature maps of each layer but the head"] = 32,
        first_kernel_size: Annotated[int, range(1, 56, 2), "kernel size of the type-A layer, odd"] = 27,
        kernel_size: Annotated[int, range(1, 56, 2), "kernel size of the blocks, odd"] = 5,
        head_channels: Annotated[int, "feature maps between the two 1 x 1 layers of the head"] = 64,
        activation: Annotated[Activation, "nonlinearity before each layer but the first"] = "hardswish",
        pointwise: Annotated[bool, "end each block with a 1 x 1 layer"] = True,
        block: Annotated[Block, "how a block changes the features"] = "residual",
        dropout: Annotated[float, (0, 1), "share of features that each layer of a block drops"] = 0.0,
        positional: Annotated[bool, "add a learned vector for each position"] = True,
    ):
        for name, value, kind in (("activation", activation, Activation), ("block", block, Block)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}")
        super().__init__()
        self.block, self.dropout = block, dropout
        self.activation = getattr(F, activation)
        self.first = self.masked_layer("A", 1, channels, first_kernel_size)
        self.position = nn.Parameter(torch.zeros(channels, *IMAGE_SHAPE[1:])) if positional else None
        outputs = 2 * channels if block == "gated" else channels
        sizes = [(channels, channels, kernel_size), (channels, outputs, 1)]  # of the layers of a block
        if not pointwise:
            sizes = [(channels, outputs, kernel_size)]
        self.blocks = nn.ModuleList(
            nn.ModuleList(self.masked_layer("B", *each) for each in sizes) for _ in range(num_blocks)
        )
        self.head = nn.ModuleList(
            [self.masked_layer("B", channels, head_channels, 1), self.masked_layer("B", head_channels, 1, 1)]
        )

    def masked_layer(self, mask_type, in_channels, out_channels, kernel_size):
        """Make a masked layer that keeps the size of the image."""
        return MaskedConv2d(mask_type, in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x):
        """Return the logits (N, 1, H, W) of images x (N, 1, H, W) in {0, 1}; other shapes raise ValueError."""
        x = checked("x", x, ("N", 1, "H", "W"), next(self.parameters()))
        return self.logits(x, lambda layer, h: layer(h), self.position_vectors(*x.shape[2:]))

    def logits(self, x, convolve, position):
        """Run the network; `convolve(layer, h)` is layer(h) in training, and `position` is (channels, H, W).

        The cached sampler passes another `convolve`, for a single pixel: all else acts on each pixel by itself.
        """
        h = convolve(self.first, x)
        h = h + position.to(h.dtype)  # h may be bfloat16
        for layers in self.blocks:
            update = h
            for layer in layers:
                update = convolve(layer, F.dropout(self.activation(update), self.dropout, self.training))
            if self.block == "gated":
                update = F.glu(update, dim=1)
            h = update if self.block == "plain" else h + update
        for layer in self.head:
            h = convolve(layer, self.activation(h))
        return h

    def position_vectors(self, height, width):
        """Return a vector for each pixel, (channels, height, width); past 28 x 28, that of the nearest pixel inside."""
        if self.position is None:
            return self.first.weight.new_zeros(1, height, width)
        _, rows, columns = self.position.shape
        row, column = torch.arange(height).clamp(max=rows - 1), torch.arange(width).clamp(max=columns - 1)
        return self.position[:, row[:, None], column]

    def sample(self, num_samples, generator=None, cached=True, given=None):
        """Draw images in {0, 1}, (num_samples, 1, 28, 28), pixel by pixel in raster order, in eval mode.

        `generator` is on the CPU, by default a new one with seed 0. `given` has the upper rows of images to complete,
        (num_samples, 1, rows, 28). If not `cached`, the whole network runs for each pixel. That is slow, and draws
        the same images, except for ties within rounding.
        """
        return draw_images(self, (num_samples, *IMAGE_SHAPE), generator, cached, given)


class ConditionalPixelCNN(PixelCNN):
    """PixelCNN whose masked layers all see the label, for p(x | y), with the arguments of `PixelCNN`."""

    def __init__(self, num_classes=NUM_CLASSES, **architecture):
        self.num_classes = num_classes  # before the layers are made, which need it
        super().__init__(**architecture)

    def masked_layer(self, mask_type, in_channels, out_channels, kernel_size):
        """Make a masked layer that adds V y and keeps the size of the image."""
        sizes = in_channels, out_channels, kernel_size, self.num_classes
        return ConditionalMaskedConv2d(mask_type, *sizes, padding=kernel_size // 2)

    def forward(self, x, y):
        """Return the logits (N, 1, H, W) of images x (N, 1, H, W) with one-hot labels y (N, num_classes)."""
        x = checked("x", x, ("N", 1, "H", "W"), next(self.parameters()))
        y = checked("y", y.float(), ("N", self.num_classes), x)  # F.one_hot gives integers
        return self.logits(x, lambda layer, h: layer(h, y), self.position_vectors(*x.shape[2:]))

    def sample(self, labels, generator=None, cached=True, given=None):
        """Draw an image of each class in `labels`, a list or a tensor (N,); see `PixelCNN.sample`."""
        labels = torch.as_tensor(labels)
        wrong = {*labels.flatten().tolist()} - {*range(self.num_classes)}
        if wrong or labels.dim() != 1:
            takes = f"a list of classes from 0 to {self.num_classes - 1}, such as [3]"
            raise ValueError(f"labels takes {takes}, not {wrong or labels.tolist()}")
        y = F.one_hot(labels.long(), self.num_classes)
        return draw_images(self, (len(labels), *IMAGE_SHAPE), generator, cached, given, (y,))
