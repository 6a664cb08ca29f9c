"""Figures: drawn without a display, readable in print, in colours that the colour-blind tell apart."""

import io

import matplotlib
import numpy as np
import torch
from torchvision.utils import make_grid

from utils.runs import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from matplotlib.colors import ListedColormap, LogNorm  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

WIDTH = 6.3  # inches between the report's margins; figures are drawn in the size in which it prints them
# Okabe & Ito, "Color Universal Design", 2008.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
# A colour for each digit: Paul Tol's "muted" scheme and black, "Colour Schemes", 2021.
DIGIT_COLORS = [
    "#332288",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
]
DIGIT_COLORS.append("#000000")
plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": "medium",
        "grid.alpha": 0.25,
        "figure.constrained_layout.use": True,
        "font.size": 9,  # as the report's captions
        "legend.fontsize": "medium",
        "legend.frameon": False,
        "pdf.fonttype": 42,
        "savefig.dpi": 300,
    }
)


def save(figure, path, vector=True):
    """Write the figure and close it; with `vector` also a PDF beside it, which is what print takes."""
    # Without its date the same figure is the same file.
    formats = {".png": {}, ".pdf": dict(metadata={"CreationDate": None})} if vector else {".png": {}}
    try:
        for suffix, options in formats.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], **options)
            write_atomically(path.with_suffix(suffix), buffer.getvalue())
    finally:
        plt.close(figure)


def save_curves(path, x, panels, xlabel="epoch", smooth=1):
    """Curves over a common x, a panel each.

    Args:
        panels: list of (ylabel, curves, references): `curves` maps labels to values, of which None and NaN
            leave a gap; `references` maps labels to the height of a dashed horizontal line.
        smooth: width of the running mean; the raw values are then drawn faintly behind it.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.6), squeeze=False)
    x = np.asarray(x, dtype=float)
    for axis, (ylabel, curves, references) in zip(axes[0], panels):
        for color, (label, values) in zip(COLORS, curves.items()):
            values = np.array(values, dtype=float)
            known = np.isfinite(values)
            at, values = x[known], values[known]
            if smooth > 1 and len(values) > smooth:
                # As pixels, also in the PDF: tens of thousands of points.
                axis.plot(at, values, color=color, alpha=0.15, linewidth=0.5, rasterized=True)
                values = np.convolve(values, np.ones(smooth) / smooth, mode="valid")
                at = at[smooth - 1 :]
            axis.plot(at, values, color=color, label=label, marker="." if len(values) < 40 else None)
        # A reference for each curve has the curve's colour, one for all of them is black.
        for color, (label, height) in zip(COLORS if len(references) > 1 else ["black"], references.items()):
            axis.axhline(height, color=color, linestyle="--", linewidth=1, label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(min(6, 12 // len(panels)), integer=True))
        axis.legend()
    save(figure, path)


def save_images(path, images, columns, row_labels=(), title="", scale=0.3):
    """Grid of (N, 1, H, W) images in [0, 1], `columns` in a row, pixels as they are.

    Args:
        row_labels: a label for each row, left of it.
        scale: inches per image.
    """
    save(draw_images(images, columns, row_labels, title, scale), path, vector=False)


def draw_images(images, columns, row_labels=(), title="", scale=0.3, axis=None):
    """The grid of `save_images`, on `axis` or a figure of its own, which is returned."""
    rows = -(-len(images) // columns)
    grid = make_grid(images.detach().float().cpu(), nrow=columns, padding=2, pad_value=0.5)[0].numpy()
    figure = None
    if axis is None:
        margin = 0.1 + 0.09 * max(map(len, row_labels)) if len(row_labels) else 0
        figure, axis = plt.subplots(figsize=(columns * scale + margin, rows * scale + (0.3 if title else 0)))
    axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    height = grid.shape[0] / rows
    axis.set(xticks=[], yticks=[(row + 0.5) * height for row in range(rows)] if len(row_labels) else [])
    if len(row_labels):
        axis.set_yticklabels(row_labels)
    axis.tick_params(length=0)
    axis.set_title(title)
    return figure


def save_side_by_side(path, grids, columns):
    """Grids of images beside one another, `grids` mapping the title of each to its images."""
    rows = -(-max(map(len, grids.values())) // columns)
    height = WIDTH / len(grids) * rows / columns + 0.2
    figure, axes = plt.subplots(1, len(grids), figsize=(WIDTH, height))
    for axis, (title, images) in zip(axes, grids.items()):
        draw_images(images, columns, title=title, axis=axis)
    save(figure, path, vector=False)


def save_scatter(path, points, labels, title):
    """Points (N, 2) of the latent plane, coloured by digit, with a legend."""
    figure, axis = plt.subplots(figsize=(3.6, 2.8))
    for digit in range(10):
        chosen = points[labels == digit]
        style = dict(s=1.5, alpha=0.5, linewidths=0, rasterized=True)
        axis.scatter(chosen[:, 0], chosen[:, 1], color=DIGIT_COLORS[digit], label=digit, **style)
    axis.legend(title="digit", markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set(xlabel="$z_1$", ylabel="$z_2$", title=title, aspect="equal")
    save(figure, path)


def save_map(path, values, label):
    """A number for each pixel, (H, W), as colours with a scale."""
    figure, axis = plt.subplots(figsize=(3.0, 2.4))
    _draw_scale(figure, axis, axis.imshow(values.cpu().numpy(), cmap="cividis"), label)
    save(figure, path)


def save_receptive_field(path, sensitivity, pixel):
    """How much the prediction at `pixel`, (row, column), changes with each pixel of `sensitivity`, (H, W).

    Pixels that it may not see, because they come later, are white; those that it could but does not see, the blind
    spot, have the second colour of the palette.
    """
    height, width = sensitivity.shape
    earlier = np.arange(height * width).reshape(height, width) < pixel[0] * width + pixel[1]
    values = sensitivity.cpu().numpy()
    seen = np.ma.masked_where(~earlier | (values == 0), values)
    blind = np.ma.masked_where(~earlier | (values != 0), np.ones_like(values))
    figure, axis = plt.subplots(figsize=(3.6, 2.7))
    axis.imshow(blind, cmap=ListedColormap([COLORS[1]]))
    _draw_scale(figure, axis, axis.imshow(seen, norm=LogNorm(), cmap="cividis"), "mean |d logit / d pixel|")
    axis.plot(pixel[1], pixel[0], "x", color="black", label="predicted pixel")
    axis.plot([], [], "s", color=COLORS[1], label="blind spot")
    axis.legend(loc="lower right")
    save(figure, path)


def _draw_scale(figure, axis, image, label):
    figure.colorbar(image, ax=axis, label=label)
    axis.grid(False)
    axis.set(xlabel="column", ylabel="row")


def save_bars(path, names, heights, xlabel, ylabel):
    figure, axis = plt.subplots(figsize=(3.3, 2.4))
    bars = axis.bar([str(name) for name in names], heights, color=COLORS[0])
    axis.bar_label(bars, fmt="%.0f")
    axis.grid(axis="x", visible=False)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    save(figure, path)


def save_confusion(path, labels, guesses, xlabel):
    """How many images of each digit, a row, were taken for which, a column; both (N,) integers."""
    counts = torch.zeros(10, 10, dtype=torch.long)
    counts.index_put_((labels.cpu(), guesses.cpu()), torch.tensor(1), accumulate=True)
    figure, axis = plt.subplots(figsize=(3.9, 3.6))
    mistakes = counts.clone().fill_diagonal_(0)
    axis.imshow(mistakes, cmap="Blues", vmax=max(1, 2 * mistakes.max().item()))
    for row in range(10):
        for column in range(10):
            axis.text(column, row, counts[row, column].item() or "", ha="center", va="center")
    axis.set(xticks=range(10), yticks=range(10), xlabel=xlabel, ylabel="digit")
    axis.grid(False)
    save(figure, path)


def save_optimal_discriminator(path, x, panels):
    """A trained discriminator over the formula p_data / (p_data + p_g), with the densities behind both.

    Args:
        panels: list of (title, trained, formula, [p_data, p_g]), each with a value for each of x: tensors.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.8), sharey=True)
    for axis, (title, trained, formula, densities) in zip(axes, panels):
        for color, name, density in zip(COLORS[2:], ("$p_{data}$", "$p_g$"), densities):
            axis.fill_between(x.numpy(), density.numpy(), alpha=0.3, color=color, linewidth=0, label=name)
        axis.plot(
            x.numpy(), formula.numpy(), color=COLORS[4], linewidth=4, label="$p_{data} / (p_{data} + p_g)$"
        )
        axis.plot(x.numpy(), trained.numpy(), color=COLORS[0], linewidth=1.2, label="$D(x)$, trained")
        axis.axhline(0.5, color="black", linestyle="--", linewidth=1, label="1/2")
        axis.set(xlabel="x", title=title, ylim=(0, 1))
    axes[0].set_ylabel("probability, density")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    save(figure, path)


def save_strips(path, strips, xlabel, ylim, smooth=400):
    """A strip for each of several runs, one below another on a page: its name, its curves, a row of its images.

    Args:
        strips: list of (name, x, curves, images), `curves` mapping labels to values, the same labels in each.
        ylim: common limits of the curves.
        smooth: width of the running mean.
    """
    height = min(0.6, 8.6 / len(strips))  # inches; all of them fit on a page
    figure, axes = plt.subplots(
        len(strips), 2, figsize=(WIDTH, height * len(strips) + 0.7), squeeze=False, width_ratios=[1, 3]
    )
    figure.get_layout_engine().set(h_pad=0.02, hspace=0)
    longest = max(x[-1] for _, x, _, _ in strips)
    for (left, right), (name, x, curves, images) in zip(axes, strips):
        for color, (label, values) in zip(COLORS, curves.items()):
            width = min(smooth, len(values))
            means = np.convolve(values, np.ones(width) / width, mode="valid")
            left.plot(x[width - 1 :], means, color=color, linewidth=1, label=label, rasterized=True)
        left.set(xlim=(0, longest), ylim=ylim, yticks=ylim)
        left.tick_params(labelsize=6, length=2, pad=1, labelbottom=False)
        left.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small", labelpad=2)
        draw_images(images, len(images), axis=right)
    axes[-1, 0].tick_params(labelbottom=True)
    axes[-1, 0].set_xlabel(xlabel, fontsize="small")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    save(figure, path)


def save_grid_table(path, columns, row_labels, images_across):
    """Grids of images in a table: `columns` maps the title of each to its grids, one for each of `row_labels`."""
    figure, axes = plt.subplots(
        len(row_labels),
        len(columns),
        figsize=(WIDTH, (WIDTH / len(columns) + 0.05) * len(row_labels) + 0.2),
        squeeze=False,
    )
    for column, (title, grids) in enumerate(columns.items()):
        for row, images in enumerate(grids):
            draw_images(images, images_across, title="" if row else title, axis=axes[row, column])
    for axis, label in zip(axes[:, 0], row_labels):
        axis.set_ylabel(label)
    save(figure, path, vector=False)


def save_territories(path, images, side, digits):
    """The plane of `images`, a side x side grid, under the colour, outline and number of each digit's territory.

    Args:
        digits: (R, R) integers, the digit at each of R x R points of the same plane, the top row first.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, WIDTH))
    draw_images(images, side, axis=axis)
    height, width = axis.images[0].get_array().shape
    size = len(digits)
    rows, columns = ((np.arange(size) + 0.5) * length / size - 0.5 for length in (height, width))
    axis.imshow(
        digits,
        cmap=ListedColormap(DIGIT_COLORS),
        vmin=0,
        vmax=9,
        alpha=0.35,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    points = torch.cartesian_prod(torch.arange(size), torch.arange(size)).float()
    for digit in digits.unique().tolist():
        inside = digits.flatten() == digit
        if inside.all():
            continue
        axis.contour(
            columns, rows, digits == digit, levels=[0.5], colors=[DIGIT_COLORS[digit]], linewidths=1.5
        )
        # The number stands where the territory is widest.
        from_others = torch.cdist(points[inside], points[~inside]).min(1).values
        from_edges = torch.cat([points[inside], size - 1 - points[inside]], 1).min(1).values
        room = torch.minimum(from_others, from_edges + 1)
        row, column = points[inside][room.argmax()].int().tolist()
        box = dict(boxstyle="circle,pad=0.15", facecolor=DIGIT_COLORS[digit], edgecolor="white")
        axis.text(
            columns[column],
            rows[row],
            digit,
            color="white",
            weight="bold",
            ha="center",
            va="center",
            bbox=box,
        )
    save(figure, path, vector=False)


def save_posterior(path, z):
    """How points z (N, 2) lie against the prior N(0, I): in the plane, and each coordinate by itself."""
    z = z.numpy()
    limit = max(4.0, float(np.quantile(abs(z), 0.999)))
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.4))
    axes[0].hist2d(*z.T, bins=80, range=[[-limit, limit]] * 2, cmap="Blues", norm=LogNorm())
    angle = np.linspace(0, 2 * np.pi, 200)
    for share, style in ((0.5, "-"), (0.9, "--"), (0.99, ":")):
        radius = (-2 * np.log(1 - share)) ** 0.5
        axes[0].plot(radius * np.cos(angle), radius * np.sin(angle), style, color=COLORS[1])
        box = dict(boxstyle="round,pad=0.1", facecolor="white", edgecolor="none", alpha=0.8)
        axes[0].text(
            0, -radius, f"{share:.0%}", color=COLORS[1], size="x-small", ha="center", va="center", bbox=box
        )
    axes[0].set(xlabel="$z_1$", ylabel="$z_2$", title="shares of the prior", aspect="equal")
    at = np.linspace(-limit, limit, 200)
    density = np.exp(-(at**2) / 2) / (2 * np.pi) ** 0.5
    for axis, values, name in zip(axes[1:], z.T, ("$z_1$", "$z_2$")):
        axis.hist(
            values, bins=80, range=(-limit, limit), density=True, alpha=0.6, label="aggregated posterior"
        )
        axis.plot(at, density, color=COLORS[1], label="prior")
        axis.set(xlabel=name, ylabel="density", ylim=(0, 1.25 * axis.get_ylim()[1]))
        axis.legend(fontsize="x-small", loc="upper right")
    save(figure, path)


def save_ablation(path, groups, panels):
    """Figures of variants, a row of panels for each group of them, points with standard deviations.

    Args:
        groups: the names of the variants in each group, by the group's title.
        panels: list of (xlabel, series); `series` maps labels to {name: (mean, standard deviation or None)}.
    """
    sizes = [len(names) + 0.8 for names in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        len(panels),
        figsize=(WIDTH, 0.19 * sum(sizes) + 0.7),
        squeeze=False,
        height_ratios=sizes,
    )
    for row, (title, names) in zip(axes, groups.items()):
        for axis, (xlabel, series) in zip(row, panels):
            for (label, values), color, marker in zip(series.items(), COLORS, "os^"):
                means, deviations = zip(*(values[name] for name in names))
                axis.errorbar(
                    means,
                    range(len(names)),
                    xerr=[each or 0 for each in deviations],
                    fmt=marker,
                    color=color,
                    markersize=4,
                    label=label,
                )
            low, high = axis.get_xlim()
            if 0 < 3 * low < high:
                axis.set_xscale("log")
            axis.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
            axis.tick_params(labelsize="small", which="both")
            axis.set_yticklabels(names if axis is row[0] else [])
        row[0].set_title(title, loc="left")
    for axis, (xlabel, series) in zip(axes[-1], panels):
        axis.set_xlabel(xlabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    save(figure, path)


def gaussian_quantiles(count):
    """`count` points that cut N(0, 1) into equal shares of probability, ascending: a tensor (count,)."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
