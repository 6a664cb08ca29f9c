"""The parts of every figure: its look, its files (PNG, PDF, GIF) and grids of images.

The user's settings of matplotlib change no figure, and drawing changes no setting: there is no pyplot, no backend.
"""

import contextlib
import functools
import io
import math
from pathlib import Path

import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
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
GIF_PALETTE = Image.new("P", (1, 1))  # few greys make a small file
GIF_PALETTE.putpalette(GREYS([*torch.linspace(0, 1, 16), math.nan], bytes=True)[:, :3].tobytes())
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
    grid = _grid(images, columns)
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


def _grid(images, columns):
    """Join images (N, 1, H, W) to one array, with grey between them."""
    return make_grid(images.detach().float().cpu(), nrow=columns, padding=GAP, pad_value=0.5)[0].numpy()


@our_style()
def save_gif(path, frames, columns, captions, row_labels=()):
    """Write a moving picture of image grids (F, N, 1, H, W) in [0, 1], with a caption for each of the F frames."""
    figure, pictures = draw_images(frames[0], columns, row_labels), []
    for images, caption in zip(frames, captions):
        figure.axes[0].images[0].set_data(_grid(images, columns))
        figure.axes[0].set_title(caption)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=200)  # two dots per pixel of an image
        pictures.append(Image.open(buffer).convert("RGB").quantize(palette=GIF_PALETTE, dither=0))
    buffer = io.BytesIO()
    times = [150] * (len(pictures) - 1) + [2000]  # milliseconds; the last frame stays
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    write_atomically(Path(path), buffer.getvalue())
