"""The parts of every figure: its look, its files (PNG, PDF, GIF) and grids of images.

The user's settings of matplotlib change no figure, and drawing changes no setting: there is no pyplot, no backend.
"""

import contextlib
import io
import math
import threading
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
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
GAP = 2  # pixels between two images of a grid
GIF_LIMIT = 700_000  # bytes
MAX_FRAMES = 24  # of the picture of a training
UNKNOWN = (86, 180, 233)  # the sixth of COLORS, for NaN in a GIF
_lock = threading.RLock()


@contextlib.contextmanager
def our_style():
    """Draw with matplotlib's defaults and STYLE, one thread at a time, then restore the settings of the process."""
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with _lock, matplotlib.rc_context({**defaults, **STYLE}):
        yield


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
    """Draw a grid of images (N, 1, H, W) in [0, 1], with `columns` images in a row, and return its figure.

    Args:
        row_labels, headings: a label for each row; columns by heading, where 0.5 is between the first two.
        scale: inches per image in a new figure.
        axis: where to draw, or None for a new figure that has exactly the size of the grid.
        marked: indices of images that get a bright frame.
    """
    grid = _grid(images, columns)
    height, width = (length + GAP for length in images.shape[2:])  # pixels from one image to the next
    if axis is None:
        size = grid.shape[1] / width * scale, grid.shape[0] / height * scale
        # Labels and title lie outside the figure. The tight bounding box of `save` includes them.
        dpi = math.ceil(300 * scale / width) * width / scale  # whole pixels of the file for each pixel
        axis = Figure(size, dpi=dpi, layout="none").add_axes((0, 0, 1, 1))
    axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
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


def _grid(images, columns):
    """Join images (N, 1, H, W) to one array, with grey between them."""
    return make_grid(images.detach().float().cpu(), nrow=columns, padding=GAP, pad_value=0.5)[0].numpy()


def save_gif(path, frames, columns=10, captions=(), duration=150, hold=2000):
    """Write a moving picture of image grids, smaller or with fewer greys if it exceeds GIF_LIMIT.

    Args:
        frames: (F, N, 1, H, W) in [0, 1] for F frames, or a dict of such tensors by the titles of grids side by side.
        captions: a text for each frame, above the grids.
        duration, hold: milliseconds for which a frame, and the last frame, stay.
    """
    panels = frames if isinstance(frames, dict) else {"": frames}
    grids = [[_grid(images, columns) for images in panel] for panel in panels.values()]
    captions = captions or [""] * len(grids[0])
    times = [duration] * (len(grids[0]) - 1) + [hold]
    for scale, greys in ((2, 15), (2, 8), (1, 15), (1, 4)):
        pictures = [_draw_frame(parts, panels, text, scale, greys) for text, *parts in zip(captions, *grids)]
        buffer = io.BytesIO()
        pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
        if buffer.tell() <= GIF_LIMIT:
            break
    write_atomically(Path(path), buffer.getvalue())


def save_training_gif(path, snapshots, columns):
    """Write a moving picture of uint8 images (N, 1, H, W) by epoch: up to MAX_FRAMES, with the last one."""
    shown = [*snapshots][:: -max(1, -(-len(snapshots) // MAX_FRAMES))][::-1]
    frames = torch.stack([snapshots[epoch] for epoch in shown]) / 255
    save_gif(path, frames, columns, [f"epoch {epoch}" for epoch in shown])


def _draw_frame(grids, titles, caption, scale, greys):
    """Draw a caption, and grids (H, W) with titles below it, in few greys. `scale`: screen pixels per pixel."""
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
    levels = np.rint(np.linspace(0, 255, greys)).astype(int)
    palette.putpalette([*levels.repeat(3).tolist(), *UNKNOWN])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)
