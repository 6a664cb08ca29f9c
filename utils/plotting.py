"""Figures: their look, their files, and the kinds that the steps and the ablations draw, each in a function.

The user's settings of matplotlib change no figure, and drawing changes no setting: there is no pyplot, no backend.
"""

import contextlib
import functools
import io
import math
from pathlib import Path
from statistics import NormalDist

import matplotlib.style
import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torchvision.utils import make_grid

from utils.files import write_atomically

# Inches between the report's margins, and half of them. The report prints every figure in its own size.
WIDTH, HALF = 6.6, 3.2
# Okabe & Ito, "Color Universal Design", 2008.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=COLORS[:3], linestyle=["-", "--", ":"]),  # differ in grey
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "figure.dpi": 300,
    "font.size": 8,  # These letters are as large as those of the report's captions.
    "grid.alpha": 0.25,
    "legend.edgecolor": "none",
    "pdf.fonttype": 42,  # TrueType, since many publishers refuse Type 3
    "savefig.bbox": "tight",  # no white margins
    "savefig.pad_inches": 0.02,
}
COLUMNS = 10  # images in a row of most grids
NUM_SAMPLES = 100  # images in samples.png, unless --count says otherwise
GAP = 2  # pixels between two images of a grid
GREYS = matplotlib.colormaps["gray"].with_extremes(bad=COLORS[5])  # for NaN
# A colour for each digit: Paul Tol, "Colour Schemes", 2021, the scheme "muted", and orange.
DIGIT_COLORS = "#332288 #CC6677 #117733 #DDCC77 #88CCEE #882255 #44AA99 #999933 #AA4499 #EE7733".split()
MARKERS = "os^"  # for COLORS
FEW_EPOCHS = 3  # of fewer there are no curves, and losses are drawn over the batches
# A context, also a decorator, with these settings in place of those of the process.
our_style = functools.partial(matplotlib.style.context, ["default", STYLE])


@our_style()
def save(figure, path, vector=True):
    """Write the figure as PNG and, with `vector`, also as PDF for print. Equal figures give equal files."""
    for suffix in (".png", ".pdf") if vector else (".png",):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        figure.savefig(buffer, format=suffix[1:], metadata=metadata)
        write_atomically(Path(path).with_suffix(suffix), buffer.getvalue())


@contextlib.contextmanager
def new_figure(path, width, height, rows=1, columns=1, vector=True, **options):
    """Give a figure (inches) and its axes to a `with` block that draws on them, then write the figure."""
    with our_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0)
        yield figure, figure.subplots(rows, columns, **options)
        save(figure, path, vector)


@our_style()
def draw_images(images, columns, row_labels=(), title="", scale=0.3, axis=None, headings=(), marked=()):
    """Draw a grid of images (N, 1, H, W) in [0, 1], or NaN, with `columns` images in a row, and return its figure.

    Args:
        row_labels, headings: a label for each row; columns by heading, where 0.5 is between the first two.
        scale: inches per image in a new figure.
        axis: where to draw, or None for a new figure that has exactly the size of the grid.
        marked: indices of images that get a bright frame.
    """
    grid = grid_of(images, columns)
    height, width = (length + GAP for length in images.shape[2:])  # pixels from one image to the next
    if axis is None:
        size = grid.shape[1] / width * scale, grid.shape[0] / height * scale
        # Labels and title lie outside the figure. The tight bounding box of `save` includes them.
        # Each pixel takes whole pixels of the file, of a large grid one, because each of them costs 100 bytes of memory.
        zoom = math.ceil(300 * scale / width) if grid.size < 1_000_000 else 1
        dpi = zoom * width / scale
        axis = Figure(size, dpi=dpi, layout="none").add_axes((0, 0, 1, 1))
    axis.imshow(grid, cmap=GREYS, vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_yticks([(row + 0.5) * height for row in range(len(row_labels))], row_labels)
    axis.set_xticks([(column + 0.5) * width for column in dict(headings).values()], headings)
    axis.set_title(title)
    for index in marked:
        corner = index % columns * width + 0.5, index // columns * height + 0.5
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=COLORS[6], linewidth=2))
    return axis.figure


def grid_of(images, columns):
    """Join images (N, 1, H, W) to one array, with grey between them."""
    return make_grid(images.detach().float().cpu(), nrow=columns, padding=GAP, pad_value=0.5)[0].numpy()


def save_images(path, images, columns, *labels, **options):
    """Write a grid of images as PNG. `draw_images` explains the arguments after `path`."""
    save(draw_images(images, columns, *labels, **options), path, vector=False)


def save_rows(path, kinds, columns=COLUMNS):
    """Write rows of images of each kind in turn; `kinds` maps labels to images (N, 1, H, W)."""
    rows = torch.stack([images.unflatten(0, (-1, columns)) for images in kinds.values()], 1)
    save_images(path, rows.flatten(0, 2), columns, [*kinds] * len(rows))


def save_grid_table(path, columns, images_across, row_labels=("",), marked=(), note=""):
    """Write a table of image grids as PNG, with a note below it.

    `columns` maps titles to a grid for each row, (N, 1, H, W), and `marked` to the indices of images to be framed.
    """
    largest = max(len(images) for grids in columns.values() for images in grids)
    height = WIDTH / len(columns) * math.ceil(largest / images_across) / images_across
    size = WIDTH, height * len(row_labels) + (0.35 if note else 0.2)
    shape = len(row_labels), len(columns)
    with new_figure(path, *size, *shape, vector=False, squeeze=False) as (figure, axes):
        figure.supxlabel(note, fontsize="medium")
        for column, (title, grids) in zip(axes.T, columns.items()):
            for axis, images in zip(column, grids):
                draw_images(images, images_across, axis=axis, marked=dict(marked).get(title, ()))
            column[0].set_title(title)
        for axis, label in zip(axes[:, 0], row_labels):
            axis.set_ylabel(label)


@our_style()
def save_latent_plane(path, images, side):
    """Write images (side^2, 1, H, W) at quantiles of the prior as PNG: z_1 to the right, z_2 upwards."""
    figure = draw_images(images, side, scale=HALF / side * 0.9)
    axis = figure.axes[0]
    height, width = axis.images[0].get_size()
    # The share of the plane before each value.
    below = {f"${value}$": NormalDist().cdf(value) for value in (-2, -1, -0.5, 0, 0.5, 1, 2)}
    axis.set_xticks([share * width - 0.5 for share in below.values()], below)
    axis.set_yticks([(1 - share) * height - 0.5 for share in below.values()], below)
    axis.set(xlabel="$z_1$, quantiles of the prior", ylabel="$z_2$, quantiles of the prior")
    axis.tick_params(length=3, labeltop=False, labelbottom=True)
    save(figure, path, vector=False)


def save_scatter(path, points, labels, title):
    """Write points (N, 2) of the latent plane, without the outermost, which would press the others together.

    Each digit is named where its points outnumber the others most.
    """
    low = points.quantile(0.002, 0, interpolation="lower")  # of few points all are shown
    high = points.quantile(0.998, 0, interpolation="higher")
    inside = ((low <= points) & (points <= high)).all(1)
    points, labels = points[inside], labels[inside]
    spacing = max(points.std().item() / 4, 1e-6)
    cells, index = (points / spacing).round().unique(dim=0, return_inverse=True)
    counts = torch.zeros(len(cells), 10).index_put((index, labels), torch.ones(len(points)), accumulate=True)
    places = spacing * cells[(2 * counts - counts.sum(1, keepdim=True)).argmax(0)]
    with new_figure(path, HALF, HALF) as (_, axis):
        colors = np.array(DIGIT_COLORS)[labels]
        axis.scatter(*points.numpy().T, 1.5, colors, alpha=0.5, linewidths=0, rasterized=True)
        for digit in labels.unique().tolist():
            box = dict(boxstyle="circle,pad=0.1", facecolor="white", edgecolor=DIGIT_COLORS[digit])
            axis.text(*places[digit].tolist(), digit, weight="bold", ha="center", va="center", bbox=box)
        axis.set(xlabel="$z_1$", ylabel="$z_2$", title=title)
        axis.set_aspect("equal", adjustable="datalim")


def save_curves(path, x, panels, xlabel="epoch", smooth=1, log=()):
    """Write curves over a common x, as running means over `smooth` points.

    `panels` lists (ylabel, curves, references): dicts of values over x, None and NaN left out, and of line heights.
    One reference is black, several have the colours of the curves. Axes with labels in `log` are logarithmic.
    """
    size, named = (min(WIDTH, HALF * len(panels)), 2.4), []
    with new_figure(path, *size, 1, len(panels), squeeze=False) as (_, [axes]):
        for axis, (ylabel, curves, references) in zip(axes, panels):
            for marker, (label, values) in zip(MARKERS, curves.items()):
                points = _running_means(x, values, smooth)
                axis.plot(*points, label=label, marker=marker if len(points[0]) < 40 else None, markersize=3)
            colors = COLORS if len(references) > 1 else ["black"]
            for color, (label, height) in zip(colors, references.items()):
                axis.axhline(height, color=color, linestyle="-.", linewidth=0.8, label=label)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            ticks = dict(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
            axis.xaxis.set_major_locator(MaxNLocator(min(6, 12 // len(panels)), **ticks))
            _set_logarithmic(axis, log)
            named = _draw_legend(axis, named)


def save_batches(path, batches, ylabel, references):
    """Write the loss over the batches of a short training, a table with iteration and loss."""
    panel = ylabel, {"training batches": batches["loss"]}, references
    save_curves(path, batches["iteration"], [panel], "batch", smooth=1 + len(batches["loss"]) // 20)


def _set_logarithmic(axis, log):
    """Make those axes logarithmic whose labels are in `log`, with ticks that fit into a small panel."""
    for side, scale in ((axis.xaxis, "xscale"), (axis.yaxis, "yscale")):
        if side.get_label_text() in log:
            axis.set(**{scale: "log"})
            low, high = side.get_view_interval()
            side.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter(NullFormatter())


def _draw_legend(axis, known=()):
    """Draw a legend of two rows above the axis, unless it is empty or `known`; return its labels."""
    labels = axis.get_legend_handles_labels()[1]
    if labels and labels != known:
        columns = math.ceil(len(labels) / 2)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=columns)
    return labels


def _running_means(x, values, width):
    """Return the last x of each window of `width` points, and the mean of the window without None and NaN."""
    values = np.array(values, dtype=float)
    known, window = np.isfinite(values), np.ones(min(width, len(values)))
    sums, counts = (np.convolve(each, window, mode="valid") for each in (np.where(known, values, 0), known))
    return np.asarray(x)[len(window) - 1 :][counts > 0], sums[counts > 0] / counts[counts > 0]


def save_map(path, values, label, seen_from=None):
    """Write a number for each pixel, (H, W), as colours with a scale.

    With `seen_from`, row and column of a pixel, they are how much its prediction depends on each pixel. Earlier pixels
    that it does not depend on, the blind spot, then have a colour of their own.
    """
    values = values.cpu().numpy()
    with new_figure(path, HALF, 2.4) as (_, axis):
        if seen_from:
            values = np.where(values > 1e-5 * values.max(), values, 0)  # a GPU's rounding leaves 1e-7
            order = np.arange(values.size).reshape(values.shape)
            blind = (order < order[seen_from]) & (values == 0)
            axis.imshow(np.where(blind, 1, np.nan), cmap=ListedColormap([COLORS[1]]))
            axis.plot(*reversed(seen_from), "x", color="black", label="predicted pixel")
            axis.plot([], [], "s", color=COLORS[1], label="blind spot")
            axis.legend(loc="lower right")
        norm = LogNorm() if seen_from else None  # which leaves out zeros
        image = axis.imshow(values, cmap="Blues", norm=norm)
        axis.figure.colorbar(image, ax=axis, label=label, format="%g" if seen_from else None)
        axis.grid(False)
        axis.set(xlabel="column", ylabel="row", facecolor="0.8")  # of pixels without a value


def save_ablation(path, rows, panels, log=(), note=""):
    """Write the means and standard deviations of variants, lines at the means of the first one, the default, and a note.

    `rows` are dicts with a "variant", and KEY_mean and KEY_std for the keys in `panels`, which maps xlabels to keys by
    their labels. A panel is left out if the rows lack its keys. Axes with labels in `log` are logarithmic.
    """
    panels = {x: keys for x, keys in panels.items() if all(f"{key}_mean" in rows[0] for key in keys.values())}
    size, at = (WIDTH, 0.17 * len(rows) + 0.7), range(len(rows))
    with new_figure(path, *size, 1, len(panels), sharey=True, squeeze=False) as (figure, [axes]):
        figure.supxlabel(note, fontsize="medium")
        for axis, (xlabel, keys) in zip(axes, panels.items()):
            for (label, key), color, marker in zip(keys.items(), COLORS, MARKERS):
                means = np.array([row[f"{key}_mean"] for row in rows], float)  # None becomes NaN
                errors = np.array([row[f"{key}_std"] for row in rows], float)
                axis.errorbar(means, at, None, errors, marker, color=color, markersize=4, label=label)
                axis.axvline(means[0], color=color, linestyle="--", linewidth=0.8)
            axis.set_xlabel(xlabel)
            _set_logarithmic(axis, log)
            _draw_legend(axis)
        axes[0].set(yticks=at, yticklabels=[row["variant"] for row in rows])
        axes[0].invert_yaxis()
