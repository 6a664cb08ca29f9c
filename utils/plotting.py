"""Figures: drawn without a display, readable in print, in colours that the colour-blind tell apart."""

import io

import matplotlib
import numpy as np
import torch
from torchvision.utils import make_grid

from utils.runs import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend has to be chosen first)

# Okabe & Ito, "Color Universal Design", 2008.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "legend.frameon": False,
        "pdf.fonttype": 42,
        "savefig.dpi": 160,
    }
)


def save(figure, path):
    """Write the figure and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:])
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def save_curves(path, x, panels, xlabel="epoch", smooth=1):
    """Curves over a common x, a panel each.

    Args:
        panels: list of (ylabel, curves, references): `curves` maps labels to values, of which None and NaN
            leave a gap; `references` maps labels to the height of a dashed horizontal line.
        smooth: width of the running mean; the raw values are then drawn faintly behind it.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.2), squeeze=False)
    x = np.asarray(x, dtype=float)
    for axis, (ylabel, curves, references) in zip(axes[0], panels):
        for color, (label, values) in zip(COLORS, curves.items()):
            values = np.array(values, dtype=float)
            known = np.isfinite(values)
            at, values = x[known], values[known]
            if smooth > 1 and len(values) > smooth:
                axis.plot(at, values, color=color, alpha=0.15, linewidth=0.5)
                values = np.convolve(values, np.ones(smooth) / smooth, mode="valid")
                at = at[smooth - 1 :]
            axis.plot(at, values, color=color, label=label, marker="." if len(values) < 40 else None)
        # A reference for each curve has the curve's colour, one for all of them is black.
        for color, (label, height) in zip(COLORS if len(references) > 1 else ["black"], references.items()):
            axis.axhline(height, color=color, linestyle="--", linewidth=1, label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.legend(fontsize=8)
    save(figure, path)


def save_images(path, images, columns, row_labels=(), title="", scale=0.4):
    """Grid of (N, 1, H, W) images in [0, 1], `columns` in a row, pixels as they are.

    Args:
        row_labels: a label for each row, left of it.
        scale: inches per image.
    """
    save(draw_images(images, columns, row_labels, title, scale), path)


def draw_images(images, columns, row_labels=(), title="", scale=0.4, axis=None):
    """The grid of `save_images`, on `axis` or a figure of its own, which is returned."""
    rows = -(-len(images) // columns)
    grid = make_grid(images.detach().float().cpu(), nrow=columns, padding=2, pad_value=0.5)[0]
    figure = None
    if axis is None:
        margin = 0.12 * max(map(len, row_labels), default=0)
        figure, axis = plt.subplots(figsize=(columns * scale + margin, rows * scale + (0.3 if title else 0)))
    axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    height = grid.shape[0] / rows
    axis.set(xticks=[], yticks=[(row + 0.5) * height for row in range(rows)] if len(row_labels) else [])
    if len(row_labels):
        axis.set_yticklabels(row_labels)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=10)
    return figure


def save_side_by_side(path, grids, columns):
    """Grids of images beside one another, `grids` mapping the title of each to its images."""
    rows = -(-max(map(len, grids.values())) // columns)
    figure, axes = plt.subplots(1, len(grids), figsize=(len(grids) * (columns * 0.4 + 0.2), rows * 0.4 + 0.3))
    for axis, (title, images) in zip(axes, grids.items()):
        draw_images(images, columns, title=title, axis=axis)
    save(figure, path)


def save_scatter(path, points, labels, title):
    """Points (N, 2) of the latent plane, coloured by digit, with a legend."""
    figure, axis = plt.subplots(figsize=(5.6, 4.8))
    palette = plt.get_cmap("tab10")
    for digit in range(10):
        chosen = points[labels == digit]
        axis.scatter(
            chosen[:, 0], chosen[:, 1], s=3, alpha=0.5, linewidths=0, color=palette(digit), label=digit
        )
    axis.legend(title="digit", markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set(xlabel="$z_1$", ylabel="$z_2$", title=title, aspect="equal")
    save(figure, path)


def gaussian_quantiles(count):
    """`count` points that cut N(0, 1) into equal shares of probability, ascending: a tensor (count,)."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
