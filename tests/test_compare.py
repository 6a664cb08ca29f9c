"""Our extra, comparing runs: the three errors of a difference, and what `python -m utils.compare` prints and draws."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from utils import compare, files


def test_paired_errors_leave_out_what_the_images_share():
    hard, easy = [100.0, 20.0, 60.0], [99.0, 18.0, 57.0]
    difference, error = compare.paired(hard, easy)
    assert difference == pytest.approx(2.0) and error == pytest.approx(1 / math.sqrt(3))


def test_errors_over_seeds_are_pooled():
    difference, error = compare.over_seeds([1.0, 3.0], [7.0, 9.0, 11.0])
    assert difference == -7
    variance = (2 * 1 + 3 * 8 / 3) / 3  # squares about the means over the degrees of freedom
    assert error == pytest.approx(math.sqrt(variance * (1 / 2 + 1 / 3)))


@pytest.fixture
def runs(trained, tmp_path):
    """Three folders of step 2: a run, the same with a network that is better by 2 +- 0.1 nats, and of other pixels."""
    places = [tmp_path / name for name in ("first", "better", "other-pixels")]
    noise = np.random.default_rng(0).normal(0, 1, (3, 400)).astype("float32")
    for place, shift, spread, pixels in zip(places, (0, -2, -2), (0, 2, 2), ("a", "a", "b")):
        shutil.copytree(trained["pixelcnn"], place)
        Image.new("L", (28, 28)).save(place / "samples.png")
        values = 50 + 30 * noise[:1] + shift + spread * noise[1:2]
        np.savez(place / "per_image.npz", nll=values, pixels=pixels)
        entries = files.read_json(place / "metrics.json")
        entries["test_nll"] |= {"value": float(values.mean()), "standard_error": 1.5}
        entries["test_nll"]["binarization"] = "threshold" if pixels == "a" else "stochastic"
        (place / "metrics.json").write_text(json.dumps(entries))
    return places


@pytest.fixture
def printed(tmp_path, capsys):
    """Return a function that compares folders, checks the exit code, and returns the lines."""

    def compared(code, *folders):
        assert compare.main([*map(str, folders), "--out-dir", str(tmp_path)]) == code
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == (code == 2)
        return [*out.splitlines(), *err.splitlines()]

    return compared


def test_a_gain_below_the_error_of_one_run_is_found_in_pairs(runs, printed, tmp_path):
    better, other = next(each for each in printed(0, *runs) if each.startswith("test nll")).split("better")
    assert better.endswith(" ± 0.1 ") and other.endswith("not compared")
    (runs[1] / "per_image.npz").unlink()  # errors of 1.5 nats each remain
    assert any(each.endswith(" ± 2.1 no difference") for each in printed(0, *runs[:2]))
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width > 1000


def test_seeds_are_means_and_unequal_lengths_are_said_first(runs, printed, tmp_path):
    several = tmp_path / "several"
    for seed, run in enumerate(runs[:2]):
        shutil.copytree(run, several / "seeds" / f"seed_{seed}")
    longer = files.read_json(runs[0] / "metrics.json")
    longer["speed"]["value"] *= 2
    (runs[0] / "metrics.json").write_text(json.dumps(longer))
    first, *lines = printed(0, several, runs[0])
    assert "unequal lengths" in first and "seeds: 2" in lines[0]
    values = [files.read_json(run / "metrics.json")["test_nll"]["value"] for run in runs[:2]]
    nll = next(each for each in lines if each.startswith("test nll"))
    assert f"{sum(values) / 2:.5g}" in nll


def test_folders_that_do_not_compare_are_refused(trained, printed, tmp_path):
    assert "metrics.json" in printed(2, tmp_path)[0]
    assert "there is no folder" in printed(2, "x" * 300)[0]
    assert "one step" in printed(2, trained["gan"], trained["vae"])[0]
    assert any("step2_pixelcnn" in line for line in printed(0))


def test_files_that_a_run_lacks_are_named(runs, printed):
    """Metrics are printed all the same if only the figure lacks something."""
    (runs[1] / "samples.png").write_text("no picture")
    lines = printed(2, *runs[:2])
    assert any("test nll" in line for line in lines) and "samples.png" in lines[-1]
    (runs[0] / "losses.csv").unlink()
    assert "losses.csv" in printed(2, runs[0])[-1]
    (runs[1] / "per_image.npz").write_text("no archive")
    assert "per_image.npz is damaged" in printed(2, *runs[:2])[-1]
    (runs[2] / "config.json").write_text('{"step": "step2_pixelcnn"}')
    assert "config.json" in printed(2, runs[2])[-1]
    (runs[0] / "metrics.json").write_text("{}")
    assert "lacks 'speed'" in printed(2, runs[0])[-1]
