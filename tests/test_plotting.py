"""Figures: every kind is drawn, equal data give equal files, and the user's matplotlib stays as it was."""

import functools
import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.font_manager import fontManager
from PIL import Image

from utils import figures, plotting

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = {
    "axes.facecolor": "yellow",
    "figure.constrained_layout.use": True,
    "figure.dpi": 40,
    "font.family": "monospace",
    "font.size": 20,
    "image.cmap": "jet",
    "lines.linewidth": 5,
    "pdf.fonttype": 3,
    "savefig.bbox": "standard",
    "savefig.dpi": 40,
    "savefig.facecolor": "red",
}
IMAGES = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0))
POINTS = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
DIGITS = torch.arange(60) % 10
CURVES = {"training": [None, 3.0, 2.0, 1.5], "test": [9.0, 3.5, float("nan"), 2.0]}
PIXELS = torch.arange(28 * 28).reshape(28, 28)
X = torch.linspace(-1, 1, 20)

ROWS = [
    {"variant": "default", "elbo_mean": 9.0, "elbo_std": 0.1, "nll_mean": 8.0, "nll_std": 0.2},
    {"variant": "one seed", "elbo_mean": 9.0, "elbo_std": None, "nll_mean": None, "nll_std": None},
    {"variant": "collapsed", "elbo_mean": 9.0, "elbo_std": 0.1, "nll_mean": 800.0, "nll_std": 900.0},
]

# One call of each function, by its name: the arguments after the path.
CALLS = {
    "save_images": (IMAGES, 4, ["a", "b", "c"], "title"),
    "save_grid_table": ({"few": [IMAGES] * 2, "more": [IMAGES] * 2}, 4, ["samples", "plane"], {"more": [0, 3]}),
    "save_strips": ([(name, range(4), {"$D(x)$": [1, 0, 1, 0]}, IMAGES) for name in "ab"], "epoch", (0, 1)),
    "save_territories": (IMAGES[:9], 3, (torch.arange(81) // 30).reshape(9, 9)),
    "save_scatter": (POINTS, DIGITS, "title"),
    "save_curves": (
        range(4), [("loss", CURVES, {"optimum": 1.0}), ("error", CURVES, {"one": 1, "two": 2})], "epoch", 2, ["error"]
    ),
    "save_optimal_discriminator": (X, [(title, X**2, X**2, [X**2, X**4]) for title in "ab"]),
    "save_map": (PIXELS, "label"),
    "save_receptive_field": (((PIXELS > 100) & (PIXELS < 395)).float() * (PIXELS + 1), (14, 3)),
    "save_bars": (range(3), [1.0, 2.0, 3.0], "digit", "NLL"),
    "save_confusion": (DIGITS, DIGITS.flip(0), "guess"),
    "save_ablation": (ROWS, {"nats": {"ELBO": "elbo", "NLL": "nll"}, "distance": {"": "nll"}}, ["distance"]),
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
    grids = name in ("save_images", "save_grid_table", "save_territories")
    assert set(files) == ({".png"} if grids else {".png", ".pdf"})
    assert b"/Type3" not in files.get(".pdf", b"") and b"CreationDate" not in files.get(".pdf", b"")
    with Image.open(io.BytesIO(files[".png"])) as image:
        dpi = round(image.info["dpi"][0])
        assert dpi >= 300 and image.width <= 1.01 * figures.WIDTH * dpi, "the size in print"
        ink = (np.asarray(image.convert("L")) < 250).nonzero()
        for place, length in zip(ink, reversed(image.size)):
            # A legend outside the axes keeps 0.1 inches free around it.
            assert place.min() <= 0.1 * dpi and place.max() >= length - 0.1 * dpi - 1, "a white margin"


def test_settings_of_the_user_change_no_figure(tmp_path, drawn):
    with matplotlib.rc_context(HOSTILE):
        before = settings()
        hostile = {name: draw(name, tmp_path) for name in ("save_images", "save_curves", "save_confusion")}
        assert settings() == before
    assert hostile == {name: drawn(name)[0] for name in hostile}


def test_backend_that_is_not_installed_and_matplotlibrc(tmp_path, drawn):
    """What a notebook's `!python` passes on; pyplot would look for the backend."""
    (tmp_path / "matplotlibrc").write_text("".join(f"{key}: {value}\n" for key, value in HOSTILE.items()))
    code = (
        "import sys, pathlib, matplotlib; from tests import test_plotting as test; before = test.settings();"
        "test.draw('save_bars', pathlib.Path(sys.argv[1])); assert test.settings() == before;"
        "assert before[0]['backend'] == 'module://not_installed' and before[0]['font.size'] == 20;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    extra = {"MPLBACKEND": "module://not_installed", "MATPLOTLIBRC": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **extra}, check=True)
    assert {path.suffix: path.read_bytes() for path in tmp_path.glob("save_bars.*")} == drawn("save_bars")[0]


def test_threads_draw_the_same_files(tmp_path, drawn):
    names = ["save_images", "save_bars", "save_grid_table", "save_map"] * 2
    folders = [tmp_path / str(index) for index in range(len(names))]
    for folder in folders:
        folder.mkdir()
    before = settings()
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(draw, names, folders))
    assert settings() == before
    assert files == [drawn(name)[0] for name in names]


def test_an_error_while_drawing_writes_nothing_and_restores_the_settings(tmp_path):
    before = settings()
    with pytest.raises(ZeroDivisionError), figures.new_figure(tmp_path / "figure.png", 2, 2):
        raise ZeroDivisionError
    assert settings() == before and not list(tmp_path.iterdir())


def test_running_means_cover_equal_stretches_of_x():
    """A network that is updated every other iteration has every other value; the windows do not get longer."""
    at, means = plotting._running_means(range(6), [1, None, 3, float("nan"), 5, None], 3)
    assert at.tolist() == [2, 3, 4, 5] and means.tolist() == [2, 3, 4, 5]
    at, means = plotting._running_means(range(3), [None, 2.0, None], 1)
    assert at.tolist() == [1] and means.tolist() == [2]


def test_a_grid_has_its_labels_and_frames():
    figure = plotting.draw_images(IMAGES, 6, ["a", "b"], headings={"x": 0, "y": 3}, marked=[7])
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y"]
    assert axis.get_xticks().tolist() == [15, 105], "in the middle of columns 0 and 1 to 5, 30 pixels each"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [patch.get_xy() for patch in axis.patches] == [(30.5, 30.5)]


def test_the_latent_plane_has_its_values_on_the_axes():
    axis = plotting.draw_latent_plane(torch.zeros(400, 1, 28, 28), 20).axes[0]
    texts = [label.get_text() for label in axis.get_xticklabels()]
    at = dict(zip((float(re.sub(r"\$", "", text)) for text in texts), axis.get_xticks()))
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20) + 0.5) / 20)
    centres = 0.5 + 30 * (torch.arange(20) + 0.5)
    for value in (-1, 0, 0.5):
        assert at[value] == pytest.approx(np.interp(value, quantiles, centres), abs=1.5)
    assert axis.get_yticks()[0] > axis.get_yticks()[-1], "z_2 grows upwards"


def read_gif(path):
    """Return the frames (F, H, W, 3) and their times in milliseconds."""
    frames, times = [], []
    with Image.open(path) as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB")))
            times.append(gif.info["duration"])
    return np.stack(frames), times


def test_moving_picture(tmp_path):
    frames = torch.linspace(0, 1, 5)[:, None, None, None, None].expand(5, 12, 1, 28, 28)
    for name in ("one.gif", "two.gif"):
        figures.save_gif(tmp_path / name, frames, columns=6, duration=100, hold=900)
    pictures, times = read_gif(tmp_path / "one.gif")
    assert times == [100] * 4 + [900]
    assert pictures.shape == (5, 2 * 62, 2 * 182, 3)
    assert pictures[:, 4, 4, 0].tolist() == pytest.approx([0, 63, 127, 191, 255], abs=10)
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()


def test_moving_picture_with_captions_and_two_grids(tmp_path):
    images = torch.stack([IMAGES.round(), 1 - IMAGES.round()])
    unknown = images.clone()
    unknown[0, 0, 0, 10:] = torch.nan
    before = settings()
    figures.save_gif(tmp_path / "a.gif", {"a": images, "b": unknown}, 4, ["epoch 1", "epoch 2"])
    assert settings() == before
    pictures, _ = read_gif(tmp_path / "a.gif")
    left, right = pictures[:, 52:, :244], pictures[:, 52:, 256:]
    assert pictures.shape == (2, 52 + 184, 2 * 244 + 12, 3)
    assert (pictures[0, :26] != pictures[1, :26]).any(), "captions differ"
    assert (left[1] == right[1]).all() and (left[0, :22] == right[0, :22]).all()
    assert (right[0, 30, 10] == figures.UNKNOWN).all()
    # Every pixel of an image is a block of 2 x 2 equal ones on the screen.
    assert (
        left[0, 4:60, 4:60, 0]
        == 255 * images[0, 0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
    ).all()


def test_large_moving_picture_is_made_smaller(tmp_path, monkeypatch):
    noise = torch.rand(6, 40, 1, 28, 28)
    figures.save_gif(tmp_path / "large.gif", noise)
    large = (tmp_path / "large.gif").stat().st_size
    for limit in (0.9 * large, 0.4 * large):
        monkeypatch.setattr(figures, "GIF_LIMIT", limit)
        figures.save_gif(tmp_path / "small.gif", noise)
        assert (tmp_path / "small.gif").stat().st_size <= limit
        assert len(read_gif(tmp_path / "small.gif")[0]) == 6


def test_a_long_training_has_few_frames_and_its_last_epoch(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "save_gif", lambda path, frames, columns, captions: shown.append(captions))
    for last in (0, 23, 24, 100):
        images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
        figures.save_training_gif(tmp_path / "a.gif", {epoch: images for epoch in range(last + 1)}, 1)
        assert len(shown[-1]) <= figures.MAX_FRAMES and shown[-1][-1] == f"epoch {last}"
    assert len(shown[1]) == 24
