"""The kinds of figure that the three steps and the ablations draw, each in a function that writes its file."""

import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import MaxNLocator

from utils.figures import COLORS, WIDTH, draw_images, new_figure, our_style, save

# A colour for each digit: Paul Tol, "Colour Schemes", 2021, the scheme "muted", and black.
DIGIT_COLORS = [
    "#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE",
    "#882255", "#44AA99", "#999933", "#AA4499", "#000000",
]  # fmt: skip


def save_images(path, images, columns, row_labels=(), title="", scale=0.3, **options):
    """Write a grid of images as PNG. `draw_images` explains the arguments after `path`."""
    save(draw_images(images, columns, row_labels, title, scale, **options), path, vector=False)


def save_side_by_side(path, grids, columns, marked=None):
    """Write several grids of images beside one another as PNG.

    Args:
        grids: maps the title of each grid to its images, (N, 1, H, W) in [0, 1].
        columns: images in a row of a grid.
        marked: maps a title to the indices of the images that get a coloured frame.
    """
    height = WIDTH / len(grids) * -(-max(map(len, grids.values())) // columns) / columns + 0.2
    with new_figure(path, WIDTH, height, 1, len(grids), vector=False, squeeze=False) as (_, axes):
        for axis, (title, images) in zip(axes[0], grids.items()):
            draw_images(images, columns, title=title, axis=axis, marked=(marked or {}).get(title, ()))


def save_grid_table(path, columns, row_labels, images_across):
    """Write a table of image grids as PNG.

    Args:
        columns: maps the title of each column to its grids, one (N, 1, H, W) tensor for each row.
        row_labels: a label for each row of the table.
        images_across: images in a row of a grid.
    """
    size = WIDTH, (WIDTH / len(columns) + 0.02) * len(row_labels) + 0.2
    with new_figure(path, *size, len(row_labels), len(columns), vector=False, squeeze=False) as (_, axes):
        for column, (title, grids) in enumerate(columns.items()):
            for row, images in enumerate(grids):
                draw_images(images, images_across, title="" if row else title, axis=axes[row, column])
        for axis, label in zip(axes[:, 0], row_labels):
            axis.set_ylabel(label)


def save_strips(path, strips, xlabel, ylim, smooth=400):
    """Write one page about several runs. Each run has a strip: its name, its curves and a row of its images.

    Args:
        strips: list of (name, x, curves, images). `curves` maps labels to values; all runs have the same labels.
        ylim: limits of the vertical axis, for all runs.
        smooth: number of points of x that a running mean covers.
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
    """Draw images decoded from a plane of latent codes, with the axes z_1 and z_2, and return the figure.

    Args:
        images: (side * side, 1, H, W) in [0, 1]. Both coordinates of their codes are `gaussian_quantiles`.
            z_1 grows to the right and z_2 upwards. So the first row has the largest z_2.
    """
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
    """Write a latent plane in negative, with the colour, outline and number of each digit's territory.

    Args:
        images: (side * side, 1, H, W) in [0, 1], as in `draw_latent_plane`.
        digits: (R, R) integers, the digit at each of R x R points of the same plane, the top row first.
    """
    digits = digits.cpu()
    figure = draw_latent_plane(1 - images, side)
    axis = figure.axes[0]
    axis.set_title(title)
    height, width = axis.images[0].get_size()
    style = {"cmap": ListedColormap(DIGIT_COLORS), "vmin": 0, "vmax": 9, "alpha": 0.3}
    axis.imshow(digits.numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5), **style)
    rows, columns = (
        (np.arange(len(digits)) + 0.5) * length / len(digits) - 0.5 for length in (height, width)
    )
    for digit in digits.unique().tolist():
        inside = digits == digit
        if not inside.all():
            style = {"levels": [0.5], "colors": [DIGIT_COLORS[digit]], "linewidths": 1.5}
            axis.contour(columns, rows, inside.numpy(), **style)
        row, column = _widest_point(inside)
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": DIGIT_COLORS[digit]}
        style = {"weight": "bold", "ha": "center", "va": "center", "bbox": box}
        axis.text(columns[column], rows[row], digit, **style)
    save(figure, path, vector=False)


def _widest_point(inside):
    """Return (row, column) of the point of a region, (R, R) booleans, that is furthest from its border."""
    points, others = inside.nonzero().float(), (~inside).nonzero().float()
    room = torch.cat([points, len(inside) - 1 - points], 1).min(1).values + 1  # distance from the edges
    if len(others):
        room = torch.minimum(room, torch.cdist(points, others).min(1).values)
    return points[room.argmax()].int().tolist()


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
            style = {
                "bins": 80,
                "range": (-limit, limit),
                "density": True,
                "histtype": "stepfilled",
                "alpha": 0.6,
            }
            axis.hist(values, label="aggregated posterior", **style)
            axis.plot(at, density, color=COLORS[1], label="prior")
            axis.set(xlabel=xlabel, ylabel="density", ylim=(0, 1.35 * axis.get_ylim()[1]))
            axis.legend(loc="upper right")


def save_curves(path, x, panels, xlabel="epoch", smooth=1):
    """Write curves over a common x, in one panel or several.

    Args:
        panels: list of (ylabel, curves, references). `curves` maps labels to values; None and NaN leave a gap.
            `references` maps labels to the height of a dashed horizontal line.
        smooth: number of points of x that a running mean covers. The raw values are drawn faintly behind it.
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
    """Write what a discriminator has learnt over the formula p_data / (p_data + p_g), with both densities.

    Args:
        x: (N,) tensor.
        panels: list of (title, trained, formula, [p_data, p_g]), each a tensor (N,) over x.
    """
    x = x.numpy()
    with new_figure(path, WIDTH, 2.8, 1, len(panels), sharey=True) as (figure, axes):
        for axis, (title, trained, formula, densities) in zip(axes, panels):
            for color, label, density in zip(COLORS[2:], ("$p_{data}$", "$p_g$"), densities):
                axis.fill_between(x, density.numpy(), alpha=0.3, color=color, linewidth=0, label=label)
            axis.plot(x, formula.numpy(), color=COLORS[4], linewidth=4, label="$p_{data} / (p_{data} + p_g)$")
            axis.plot(x, trained.numpy(), color=COLORS[0], linewidth=1.2, label="$D(x)$, trained")
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
    """Write how much the prediction at `pixel`, (row, column), changes with each earlier pixel.

    Later pixels are white. Earlier pixels without influence, the blind spot, have a colour of their own.

    Args:
        sensitivity: (H, W), the mean of |d logit / d pixel|.
    """
    height, width = sensitivity.shape
    earlier = np.arange(height * width).reshape(height, width) < pixel[0] * width + pixel[1]
    values = sensitivity.cpu().numpy()
    seen = np.ma.masked_where(~earlier | (values == 0), values)
    blind = np.ma.masked_where(~earlier | (values != 0), np.ones_like(values))
    with new_figure(path, 3.6, 2.7) as (_, axis):
        axis.imshow(blind, cmap=ListedColormap([COLORS[1]]))
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
    counts = torch.zeros(10, 10, dtype=torch.long)
    counts.index_put_((labels.cpu(), guesses.cpu()), torch.tensor(1), accumulate=True)
    mistakes = counts.clone().fill_diagonal_(0)
    with new_figure(path, 3.9, 3.6) as (_, axis):
        axis.imshow(mistakes.numpy(), cmap="Blues", vmax=max(1, 2 * mistakes.max().item()))
        for row, column in counts.nonzero().tolist():
            axis.text(column, row, counts[row, column].item(), ha="center", va="center", fontsize="small")
        axis.set(xticks=range(10), yticks=range(10), xlabel=xlabel, ylabel="digit")
        axis.grid(False)


def save_ablation(path, groups, panels):
    """Write the metrics of variants as points with standard deviations, a row of panels for each group.

    Args:
        groups: maps the title of each group to the names of its variants.
        panels: list of (xlabel, series). `series` maps labels to {name: (mean, standard deviation or None)}.
    """
    sizes = [len(names) + 0.8 for names in groups.values()]
    shape = len(groups), len(panels)
    size = WIDTH, 0.19 * sum(sizes) + 0.9
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
    """Draw means with their standard deviations, a line for each name, without the names."""
    for (label, values), color, marker in zip(series.items(), COLORS, "os^"):
        means, deviations = zip(*(values[name] for name in names))
        style = {"fmt": marker, "color": color, "markersize": 4, "label": label}
        axis.errorbar(means, range(len(names)), xerr=[each or 0 for each in deviations], **style)
    low, high = axis.get_xlim()
    if 0 < 3 * low < high:
        axis.set_xscale("log")
    axis.set(yticks=range(len(names)), yticklabels=[], ylim=(len(names) - 0.5, -0.5))
    axis.tick_params(labelsize="small", which="both")
