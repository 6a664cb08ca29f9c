"""The kinds of figure that the three steps and the ablations draw, each in a function that writes its file."""

import math

import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import MaxNLocator
from torch.nn.functional import pad

from utils.figures import COLORS, WIDTH, draw_images, new_figure, our_style, save

# A colour for each digit: Paul Tol, "Colour Schemes", 2021, the scheme "muted", and black.
COLOR_CODES = "332288 CC6677 117733 DDCC77 88CCEE 882255 44AA99 999933 AA4499 000000"
DIGIT_COLORS = [f"#{code}" for code in COLOR_CODES.split()]


def save_images(path, images, columns, *labels, **options):
    """Write a grid of images as PNG. `draw_images` explains the arguments after `path`."""
    save(draw_images(images, columns, *labels, **options), path, vector=False)


def save_side_by_side(path, grids, columns, marked=()):
    """Write grids of images beside one another; `grids` maps each title to images (N, 1, H, W)."""
    save_grid_table(path, {title: [images] for title, images in grids.items()}, [""], columns, marked)


def save_grid_table(path, columns, row_labels, images_across, marked=()):
    """Write a table of image grids as PNG.

    `columns` maps titles to a grid for each row, (N, 1, H, W), and `marked` to the indices of images to be framed.
    """
    largest = max(len(images) for grids in columns.values() for images in grids)
    height = WIDTH / len(columns) * math.ceil(largest / images_across) / images_across
    size = WIDTH, height * len(row_labels) + 0.2
    with new_figure(path, *size, len(row_labels), len(columns), vector=False, squeeze=False) as (_, axes):
        for column, (title, grids) in zip(axes.T, columns.items()):
            for axis, images in zip(column, grids):
                draw_images(images, images_across, axis=axis, marked=dict(marked).get(title, ()))
            column[0].set_title(title)
        for axis, label in zip(axes[:, 0], row_labels):
            axis.set_ylabel(label)


def save_strips(path, strips, xlabel, ylim, smooth=400):
    """Write a page with a strip for each run: its name, running means over `smooth` points, and a row of images.

    `strips` is a list of (name, x, curves, images); `curves` maps labels, the same for all runs, to values over x.
    """
    size = WIDTH, min(0.6 * len(strips), 8.6) + 0.7  # all strips fit on a page
    with new_figure(path, *size, len(strips), 2, squeeze=False, width_ratios=[1, 3]) as (figure, axes):
        figure.get_layout_engine().set(h_pad=0.02, hspace=0)
        longest = max(x[-1] for _, x, _, _ in strips)
        for (left, right), (name, x, curves, images) in zip(axes, strips):
            for color, (label, values) in zip(COLORS, curves.items()):
                means = _running_means(x, values, smooth)
                left.plot(*means, color=color, linewidth=1, label=label, rasterized=True)
            left.set(xlim=(0, longest), ylim=ylim, yticks=ylim)
            left.tick_params(labelsize=6, length=2, pad=1, labelbottom=False)
            left.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small", labelpad=2)
            draw_images(images, len(images), axis=right)
        axes[-1, 0].tick_params(labelbottom=True)
        axes[-1, 0].set_xlabel(xlabel, fontsize="small")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)


def gaussian_quantiles(count):
    """Return the (count,) points, ascending, that cut N(0, 1) into parts of equal probability."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)


@our_style()
def draw_latent_plane(images, side):
    """Return a figure of images (side^2, 1, H, W) at `gaussian_quantiles` of z_1, to the right, and z_2, upwards."""
    figure = draw_images(images, side)
    axis = figure.axes[0]
    height, width = axis.images[0].get_size()
    values = torch.tensor([-2, -1, -0.5, 0, 0.5, 1, 2])
    below = torch.distributions.Normal(0.0, 1.0).cdf(values).numpy()  # part of the plane before each value
    labels = [f"${value:g}$" for value in values.tolist()]
    axis.set_xticks(below * width - 0.5, labels)
    axis.set_yticks((1 - below) * height - 0.5, labels)
    axis.set(xlabel="$z_1$", ylabel="$z_2$")
    axis.tick_params(length=3, labeltop=False, labelbottom=True)
    return figure


@our_style()
def save_territories(path, images, side, digits, title=""):
    """Write a latent plane in negative, and the territory of each digit; `digits` (R, R) cover the same plane."""
    digits = digits.cpu()
    figure = draw_latent_plane(1 - images, side)
    axis = figure.axes[0]
    axis.set_title(title)
    height, width = axis.images[0].get_size()
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(digits.numpy(), ListedColormap(DIGIT_COLORS), vmin=0, vmax=9, alpha=0.3, extent=extent)
    middles = (np.arange(len(digits)) + 0.5) / len(digits)  # of the points, as a part of the plane
    rows, columns = middles * height - 0.5, middles * width - 0.5
    for digit in digits.unique().tolist():
        inside = digits == digit
        if not inside.all():
            axis.contour(columns, rows, inside.numpy(), [0.5], colors=[DIGIT_COLORS[digit]], linewidths=1.5)
        points, others = inside.nonzero(), pad(~inside, (1, 1, 1, 1), value=True).nonzero() - 1
        room = torch.cdist(points.float(), others.float()).min(1).values  # up to the region's border
        row, column = points[room.argmax()].tolist()
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": DIGIT_COLORS[digit]}
        axis.text(columns[column], rows[row], digit, weight="bold", ha="center", va="center", bbox=box)
    save(figure, path, vector=False)


def save_scatter(path, points, labels, title):
    """Write points (N, 2) of the latent plane, coloured by their digits (N,), with a legend."""
    with new_figure(path, 3.6, 2.8) as (_, axis):
        colors = [DIGIT_COLORS[digit] for digit in labels.tolist()]
        axis.scatter(*points.numpy().T, c=colors, s=1.5, alpha=0.5, linewidths=0, rasterized=True)
        for digit in labels.unique().tolist():
            axis.plot([], [], "o", color=DIGIT_COLORS[digit], label=digit, markersize=4)
        axis.legend(title="digit", loc="center left", bbox_to_anchor=(1, 0.5))
        axis.set(xlabel="$z_1$", ylabel="$z_2$", title=title, aspect="equal")


def save_posterior(path, z):
    """Write how points z (N, 2) lie against the prior N(0, I): in the plane, and each coordinate by itself."""
    z = z.numpy()
    limit = max(4.0, float(np.quantile(abs(z), 0.999)))
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    with new_figure(path, WIDTH, 2.4, 1, 3) as (_, (plane, *sides)):
        plane.hist2d(*z.T, bins=80, range=[[-limit, limit]] * 2, cmap="Blues", norm=LogNorm())
        angle = np.linspace(0, 2 * np.pi, 200)
        for probability, line in ((0.5, "-"), (0.9, "--"), (0.99, ":")):
            radius = (-2 * np.log(1 - probability)) ** 0.5
            plane.plot(radius * np.cos(angle), radius * np.sin(angle), line, color=COLORS[1])
            style = {"color": COLORS[1], "size": "small", "ha": "center", "va": "center", "bbox": box}
            plane.text(0, -radius, f"{probability:.0%}", **style)
        plane.set(xlabel="$z_1$", ylabel="$z_2$", title="regions of the prior", aspect="equal")
        at = np.linspace(-limit, limit, 200)
        density = np.exp(-(at**2) / 2) / (2 * np.pi) ** 0.5
        for axis, values, xlabel in zip(sides, z.T, ("$z_1$", "$z_2$")):
            style = {"range": (-limit, limit), "density": True, "histtype": "stepfilled", "alpha": 0.6}
            axis.hist(values, bins=80, label="aggregated posterior", **style)
            axis.plot(at, density, color=COLORS[1], label="prior")
            axis.set(xlabel=xlabel, ylabel="density", ylim=(0, 1.35 * axis.get_ylim()[1]))
            axis.legend(loc="upper right")


def save_curves(path, x, panels, xlabel="epoch", smooth=1):
    """Write curves over a common x, with running means over `smooth` points and the raw values faintly behind.

    `panels` lists (ylabel, curves, references): dicts of values over x, None and NaN left out, and of line heights.
    """
    with new_figure(path, WIDTH, 2.6, 1, len(panels), squeeze=False) as (_, axes):
        for axis, (ylabel, curves, references) in zip(axes[0], panels):
            for color, (label, values) in zip(COLORS, curves.items()):
                points = _running_means(x, values, 1)
                if 1 < smooth < len(x):
                    # These are tens of thousands of points, so they become pixels in the PDF, too.
                    axis.plot(*points, color=color, alpha=0.15, linewidth=0.5, rasterized=True)
                    points = _running_means(x, values, smooth)
                axis.plot(*points, color=color, label=label, marker="." if len(points[0]) < 40 else None)
            # A single reference is for all curves. Several are for a curve each, in its colour.
            colors = COLORS if len(references) > 1 else ["black"]
            for color, (label, height) in zip(colors, references.items()):
                axis.axhline(height, color=color, linestyle="--", linewidth=1, label=label)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            axis.xaxis.set_major_locator(MaxNLocator(min(6, 12 // len(panels)), integer=True))
            axis.legend()


def _running_means(x, values, width):
    """Return the last x of each window of `width` points, and the mean of the window without None and NaN."""
    values = np.array(values, dtype=float)
    known = np.isfinite(values)
    width = min(width, len(values))
    sums = np.convolve(np.where(known, values, 0), np.ones(width), mode="valid")
    counts = np.convolve(known, np.ones(width), mode="valid")
    return np.asarray(x)[width - 1 :][counts > 0], sums[counts > 0] / counts[counts > 0]


def save_optimal_discriminator(path, x, panels):
    """Write panels of (title, trained D, formula of D, [p_data, p_g]), which are tensors (N,) over x."""
    with new_figure(path, WIDTH, 2.8, 1, len(panels), sharey=True) as (figure, axes):
        for axis, (title, trained, formula, densities) in zip(axes, panels):
            for color, label, density in zip(COLORS[2:], ("$p_{data}$", "$p_g$"), densities):
                axis.fill_between(x, density, alpha=0.3, color=color, linewidth=0, label=label)
            axis.plot(x, formula, color=COLORS[4], linewidth=4, label="$p_{data} / (p_{data} + p_g)$")
            axis.plot(x, trained, color=COLORS[0], linewidth=1.2, label="$D(x)$, trained")
            axis.axhline(0.5, color="black", linestyle="--", linewidth=1, label="1/2")
            axis.set(xlabel="x", title=title, ylim=(0, 1))
        axes[0].set_ylabel("probability, density")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def save_map(path, values, label):
    """Write a number for each pixel, (H, W), as colours with a scale."""
    with new_figure(path, 3.0, 2.4) as (_, axis):
        _draw_map(axis, values.cpu().numpy(), label)


def _draw_map(axis, values, label, **options):
    image = axis.imshow(values, cmap="cividis", **options)
    axis.figure.colorbar(image, ax=axis, label=label)
    axis.grid(False)
    axis.set(xlabel="column", ylabel="row")


def save_receptive_field(path, sensitivity, pixel):
    """Write the mean |d logit / d pixel|, (H, W), of the logit at `pixel`. The blind spot has a colour of its own."""
    values = sensitivity.cpu().numpy()
    earlier = np.arange(values.size).reshape(values.shape) < np.ravel_multi_index(pixel, values.shape)
    with new_figure(path, 3.6, 2.7) as (_, axis):
        blind = np.ma.masked_where(~earlier | (values != 0), np.ones_like(values))
        axis.imshow(blind, cmap=ListedColormap([COLORS[1]]))
        seen = np.ma.masked_where(~earlier | (values == 0), values)
        _draw_map(axis, seen, "mean |d logit / d pixel|", norm=LogNorm())
        axis.plot(pixel[1], pixel[0], "x", color="black", label="predicted pixel")
        axis.plot([], [], "s", color=COLORS[1], label="blind spot")
        axis.legend(loc="lower right")


def save_bars(path, names, heights, xlabel, ylabel):
    """Write a bar for each name, with its height as a whole number on it."""
    with new_figure(path, 3.3, 2.4) as (_, axis):
        bars = axis.bar([str(name) for name in names], heights, color=COLORS[0])
        axis.bar_label(bars, fmt="%.0f")
        axis.margins(y=0.1)
        axis.grid(axis="x", visible=False)
        axis.set(xlabel=xlabel, ylabel=ylabel)


def save_confusion(path, labels, guesses, xlabel):
    """Write how many images of each digit (row) were taken for which digit (column); both (N,) integers."""
    counts = (10 * labels + guesses).cpu().bincount(minlength=100).reshape(10, 10)
    mistakes = counts.clone().fill_diagonal_(0)
    with new_figure(path, 3.9, 3.6) as (_, axis):
        axis.imshow(mistakes.numpy(), cmap="Blues", vmax=max(1, 2 * mistakes.max().item()))
        for row, column in counts.nonzero().tolist():
            axis.text(column, row, counts[row, column].item(), ha="center", va="center", fontsize="small")
        axis.set(xticks=range(10), yticks=range(10), xlabel=xlabel, ylabel="digit")
        axis.grid(False)


def save_ablation(path, groups, panels):
    """Write metrics of variants with standard deviations, a row of panels for each group.

    `groups` maps titles to names, and `panels` lists (xlabel, {label: {name: (mean, deviation or None)}}).
    """
    sizes = [len(names) + 0.8 for names in groups.values()]
    size, shape = (WIDTH, 0.19 * sum(sizes) + 0.9), (len(groups), len(panels))
    with new_figure(path, *size, *shape, squeeze=False, height_ratios=sizes) as (_, axes):
        for row, (title, names) in zip(axes, groups.items()):
            for axis, (_, series) in zip(row, panels):
                _draw_points(axis, names, series)
            row[0].set(yticklabels=names)
            row[0].set_title(title, loc="left")
        for top, bottom, (xlabel, _) in zip(axes[0], axes[-1], panels):
            top.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=2.2, borderpad=0)
            bottom.set_xlabel(xlabel)


def _draw_points(axis, names, series):
    for (label, values), color, marker in zip(series.items(), COLORS, "os^"):
        means, deviations = zip(*(values[name] for name in names))
        errors = [deviation or 0 for deviation in deviations]
        axis.errorbar(means, range(len(names)), None, errors, marker, color=color, markersize=4, label=label)
    low, high = axis.get_xlim()
    if 0 < 3 * low < high:
        axis.set_xscale("log")
    axis.set(yticks=range(len(names)), yticklabels=[], ylim=(len(names) - 0.5, -0.5))
    axis.tick_params(labelsize="small", which="both")
