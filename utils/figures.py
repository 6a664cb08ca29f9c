"""The parts of every figure: its look, its files (PNG, PDF, GIF) and grids of images.

Every figure is drawn with matplotlib's defaults and STYLE. The user's own settings change no figure, and drawing
changes none of these settings: pyplot is not imported, and no backend is chosen.
"""

import contextlib
import io
import threading
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from utils.files import write_atomically

WIDTH = 6.3  # inches between the report's margins; figures have the size at which the report prints them
# Okabe & Ito, "Color Universal Design", 2008.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "grid.alpha": 0.25,
    "font.size": 9,  # like the report's captions
    "legend.fontsize": "small",
    "legend.edgecolor": "none",
    "pdf.fonttype": 42,  # TrueType, since many publishers refuse Type 3
    "savefig.bbox": "tight",  # no white margins
    "savefig.pad_inches": 0.02,
    "savefig.dpi": 300,
}
GAP = 2  # pixels between two images of a grid

_lock = threading.RLock()


@contextlib.contextmanager
def our_style():
    """Draw with matplotlib's defaults and STYLE, then restore the user's settings.

    The settings belong to the whole process. So only one thread draws at a time.
    """
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with _lock, matplotlib.rc_context({**defaults, **STYLE}):
        yield


@our_style()
def save(figure, path, vector=True):
    """Write the figure as PNG and, with `vector`, also as PDF for print. Equal figures give equal files."""
    path = Path(path)
    formats = {".png": {}}
    if vector:
        formats[".pdf"] = {"metadata": {"CreationDate": None}}
    for suffix, options in formats.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], **options)
        write_atomically(path.with_suffix(suffix), buffer.getvalue())


@contextlib.contextmanager
def new_figure(path, width, height, rows=1, columns=1, vector=True, **options):
    """Give a figure and its axes to a `with` block that draws on them, then write the figure.

    Args:
        width, height: size in inches.
        options: further arguments of `Figure.subplots`.
    """
    with our_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, **options)
        save(figure, path, vector)


@our_style()
def draw_images(images, columns, row_labels=(), title="", scale=0.3, axis=None, column_labels=(), marked=()):
    """Draw a grid of images on `axis`, or on a new figure that has exactly the size of the grid.

    Args:
        images: (N, 1, H, W) in [0, 1].
        columns: images in a row.
        row_labels: a label for each row, left of it.
        scale: inches per image in a new figure.
        column_labels: a label for each column, above it. Equal neighbours share one label.
        marked: indices of images that get a coloured frame.

    Returns:
        The figure that holds the grid.
    """
    grid = _grid(images, columns)
    height, width = (length + GAP for length in images.shape[2:])  # pixels from one image to the next
    if axis is None:
        size = grid.shape[1] / width * scale, grid.shape[0] / height * scale
        # Labels and title lie outside the figure. The tight bounding box of `save` includes them.
        axis = Figure(size, layout="none").add_axes((0, 0, 1, 1))
    axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_yticks([(row + 0.5) * height for row in range(len(row_labels))], row_labels)
    starts = [at for at, label in enumerate(column_labels) if at == 0 or label != column_labels[at - 1]]
    ends = [*starts[1:], len(column_labels)]
    centres = [(start + end) / 2 * width for start, end in zip(starts, ends)]
    axis.set_xticks(centres, [column_labels[start] for start in starts])
    axis.set_title(title)
    for index in marked:
        corner = index % columns * width + 0.5, index // columns * height + 0.5
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=COLORS[1], linewidth=1.5))
    return axis.figure


def _grid(images, columns):
    """Join images (N, 1, H, W) to one array, with grey between them."""
    images = images.detach().float().cpu()
    return make_grid(images, nrow=columns, padding=GAP, pad_value=0.5)[0].numpy()


# ---------------------------------------------------------------------------------------------------------
# Moving pictures

GIF_LIMIT = 700_000  # bytes
UNKNOWN = (86, 180, 233)  # the sixth of COLORS


def save_gif(path, frames, columns=10, captions=(), scale=2, duration=150, hold=2000):
    """Write a moving picture of image grids. Equal frames give equal files.

    A file of more than GIF_LIMIT bytes is written again with fewer greys or, if that is not enough, smaller.

    Args:
        frames: (F, N, 1, H, W) in [0, 1], N images for each of F frames. NaN becomes light blue. A dict of
            these tensors gives grids beside one another, with the keys as titles.
        columns: images in a row of a grid.
        captions: a text for each frame, above the grids.
        scale: screen pixels per pixel of an image.
        duration: milliseconds from one frame to the next.
        hold: milliseconds for which the last frame stays.
    """
    panels = frames if isinstance(frames, dict) else {"": frames}
    grids = [[_grid(images, columns) for images in panel] for panel in panels.values()]
    captions = captions or [""] * len(grids[0])
    times = [duration] * (len(grids[0]) - 1) + [hold]
    for zoom, greys in ((scale, 15), (scale, 8), (1, 15), (1, 4)):
        pictures = [
            _draw_frame(parts, panels, caption, zoom, greys) for caption, *parts in zip(captions, *grids)
        ]
        buffer = io.BytesIO()
        pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
        if buffer.tell() <= GIF_LIMIT:
            break
    write_atomically(Path(path), buffer.getvalue())


def _draw_frame(grids, titles, caption, scale, greys):
    """Draw a caption, and below it grids with their titles, as an image with a palette of few colours.

    Args:
        grids: list of arrays (H, W) in [0, 1].
        greys: number of greys in the palette.
    """
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 9 * scale)
    line, gap = 13 * scale, 6 * scale  # height of a line of text and space between grids, in screen pixels
    top = line * (bool(caption) + any(titles))
    heights, widths = zip(*(grid.shape for grid in grids))
    width = scale * sum(widths) + gap * (len(grids) - 1)
    picture = Image.new("RGB", (width, top + scale * max(heights)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, line / 2), caption, "black", font, anchor="mm")
    left = 0
    for title, grid in zip(titles, grids):
        grey = np.rint(255 * np.nan_to_num(grid).clip(0, 1))[..., None]
        pixels = np.where(np.isnan(grid)[..., None], UNKNOWN, grey).astype(np.uint8)
        part = Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))
        picture.paste(part, (left, top))
        draw.text((left + part.width / 2, top - line / 2), title, "black", font, anchor="mm")
        left += part.width + gap
    palette = Image.new("P", (1, 1))
    levels = [round(255 * level / (greys - 1)) for level in range(greys)]
    palette.putpalette([value for level in levels for value in (level, level, level)] + [*UNKNOWN])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)
