"""Figures: every kind is drawn, equal data give equal files, and the user's matplotlib stays as it was."""

import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.font_manager import fontManager
from PIL import Image

from utils import plotting

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 40,
    "font.size": 20,
    "image.cmap": "jet",
    "pdf.fonttype": 3,
    "savefig.dpi": 40,
    "savefig.facecolor": "red",
}
IMAGES = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0))
POINTS = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
DIGITS = torch.arange(60) % 10
CURVES = {"training": [None, 3.0, 2.0, 1.5], "test": [9.0, 3.5, float("nan"), 2.0]}
PIXELS = torch.arange(28 * 28).reshape(28, 28)

ROWS = [
    {"variant": "default", "elbo_mean": 9.0, "elbo_std": 0.1, "nll_mean": 8.0, "nll_std": 0.2},
    {"variant": "one seed", "elbo_mean": 9.0, "elbo_std": None, "nll_mean": None, "nll_std": None},
    {"variant": "collapsed", "elbo_mean": 9.0, "elbo_std": 0.1, "nll_mean": 800.0, "nll_std": 900.0},
]

# One call of each function, by its name: the arguments after the path.
CALLS = {
    "save_images": (IMAGES, 4, ["a", "b", "c"], "title"),
    "save_rows": (dict(real=IMAGES, drawn=IMAGES), 4),
    "save_grid_table": ({"few": [IMAGES] * 2, "more": [IMAGES] * 2}, 4, ["samples", "plane"], {"more": [0, 3]}, "a note"),
    "save_latent_plane": (IMAGES[:9], 3),
    "save_scatter": (POINTS, DIGITS, "title"),
    "save_curves": (
        range(4), [("loss", CURVES, {"optimum": 1.0}), ("error", CURVES, {"one": 1, "two": 2})], "epoch", 2, ["error"]
    ),
    "save_batches": (dict(iteration=[1, 2, 3], loss=[5.0, 4.0, 3.0]), "loss", {"test images": 3.5}),
    "save_map": (((PIXELS > 100) & (PIXELS < 395)).float() * (PIXELS + 1), "label", (14, 3)),
    "save_ablation": (ROWS, {"nats": {"ELBO": "elbo", "NLL": "nll"}, "distance": {"": "nll"}}, ["distance"], "a note"),
}  # fmt: skip


def settings():
    """The global state of matplotlib that a user would miss. The backend is read without resolving it."""
    return dict(dict.items(matplotlib.rcParams)), [font.fname for font in fontManager.ttflist]


def draw(name, folder):
    """Call a function of CALLS; return the bytes of its files by their suffix."""
    getattr(plotting, name)(folder / f"{name}.png", *CALLS[name])
    return {path.suffix: path.read_bytes() for path in folder.glob(f"{name}.*")}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Draw with a function of CALLS at its first use; return its files and whether the settings were left alone."""

    @functools.cache
    def once(name):
        before = settings()
        files = draw(name, tmp_path_factory.mktemp(name))
        return files, settings() == before

    return once


def test_every_function_is_called():
    assert set(CALLS) == {name for name in vars(plotting) if name.startswith("save_")}


@pytest.mark.parametrize("name", CALLS)
def test_drawing_writes_files_and_leaves_settings_alone(name, drawn):
    files, unchanged = drawn(name)
    assert unchanged
    grids = name in ("save_images", "save_rows", "save_grid_table", "save_latent_plane")
    assert set(files) == ({".png"} if grids else {".png", ".pdf"})
    assert b"/Type3" not in files.get(".pdf", b"") and b"CreationDate" not in files.get(".pdf", b"")
    with Image.open(io.BytesIO(files[".png"])) as image:
        dpi = round(image.info["dpi"][0])
        assert dpi >= 300 and image.width <= 1.01 * plotting.WIDTH * dpi, "the size in print"
        ink = (np.asarray(image.convert("L")) < 250).nonzero()
        for place, length in zip(ink, reversed(image.size)):
            # A legend outside the axes keeps 0.1 inches free around it, in some versions a few pixels more.
            assert place.min() <= 0.12 * dpi and place.max() >= length - 0.12 * dpi, "a white margin"


def test_the_users_backend_and_settings_change_no_figure(tmp_path, drawn):
    """A notebook's `!python` passes on a backend that may not be installed; pyplot would look for it."""
    (tmp_path / "matplotlibrc").write_text("".join(f"{key}: {value}\n" for key, value in HOSTILE.items()))
    code = (
        "import sys, pathlib; from tests import test_plotting as test; before = test.settings();"
        "[test.draw(name, pathlib.Path(sys.argv[1])) for name in sys.argv[2:]]; assert test.settings() == before;"
        "assert before[0]['backend'] == 'module://not_installed' and before[0]['font.size'] == 20;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    extra = {"MPLBACKEND": "module://not_installed", "MATPLOTLIBRC": str(tmp_path)}
    names = ["save_images", "save_curves", "save_scatter"]
    command = [sys.executable, "-c", code, str(tmp_path), *names]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **extra}, check=True)
    for name in names:
        assert {path.suffix: path.read_bytes() for path in tmp_path.glob(f"{name}.*")} == drawn(name)[0]


def test_running_means_cover_equal_stretches_of_x():
    """A network that is updated every other iteration has every other value; the windows do not get longer."""
    at, means = plotting._running_means(range(6), [1, None, 3, float("nan"), 5, None], 3)
    assert at.tolist() == [2, 3, 4, 5] and means.tolist() == [2, 3, 4, 5]
    at, means = plotting._running_means(range(3), [None, 2.0, None], 1)
    assert at.tolist() == [1] and means.tolist() == [2]


def test_a_grid_has_its_labels_and_frames():
    axis = plotting.draw_images(IMAGES, 6, ["a", "b"], headings={"x": 0, "y": 3}, marked=[7]).axes[0]
    assert axis.get_xticks().tolist() == [15, 105], "in the middle of columns 0 and 1 to 5, 30 pixels each"
    labels = axis.get_xticklabels() + axis.get_yticklabels()
    assert [label.get_text() for label in labels] == ["x", "y", "a", "b"]
    assert [patch.get_xy() for patch in axis.patches] == [(30.5, 30.5)]


def test_the_latent_plane_has_its_values_on_the_axes(monkeypatch):
    axis = saved(monkeypatch, plotting.save_latent_plane, torch.zeros(400, 1, 28, 28), 20).axes[0]
    texts = [label.get_text().strip("$").replace("\N{MINUS SIGN}", "-") for label in axis.get_xticklabels()]
    at = dict(zip(map(float, texts), axis.get_xticks()))
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20) + 0.5) / 20)
    centres = 0.5 + 30 * (torch.arange(20) + 0.5)
    for value in (-1, 0, 0.5):
        assert at[value] == pytest.approx(np.interp(value, quantiles, centres), abs=1.5)
    assert axis.get_yticks()[0] > axis.get_yticks()[-1], "z_2 grows upwards"
    assert "quantiles of the prior" in axis.get_xlabel()


def saved(monkeypatch, function, *arguments):
    """Return the figure that a function draws, with its texts and ticks laid out."""
    kept = []
    monkeypatch.setattr(plotting, "save", lambda figure, *_, **__: kept.append(figure))
    function("figure.png", *arguments)
    kept[0].canvas.draw()
    return kept[0]


def boxes(texts):
    """Return the places of texts that are not empty."""
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("x", [[0], [3], [0, 0.2], [0, 1, 2.2], [90_000, 93_750], range(121)])
def test_axes_of_short_and_long_runs(x, monkeypatch):
    """No ticks overlap, and a single point does not lie on an axis from -0.04 to 0.04."""
    panels = [("loss", {"a": [5.0 + value for value in x]}, {})] * 3
    figure = saved(monkeypatch, plotting.save_curves, x, panels)
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 1 and all(tick == round(tick) for tick in ticks)
        labels = zip(boxes(axis.get_xticklabels()), axis.get_xticks())
        places = [box for box, tick in labels if low <= tick <= high]
        assert all(left.x1 < right.x0 for left, right in zip(places, places[1:]))


def test_points_on_a_line_or_in_one_place_have_a_square_picture(monkeypatch):
    for points in (torch.tensor([[0.01, 1.0]]) * POINTS, torch.zeros(60, 2)):
        axis = saved(monkeypatch, plotting.save_scatter, points, DIGITS, "title").axes[0]
        assert axis.bbox.width > 0.7 * axis.bbox.height
