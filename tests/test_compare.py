"""Our extra, comparing runs: the three errors of a difference, and what `python -m utils.compare` prints and draws."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from utils import compare, differ, files


def test_paired_errors_leave_out_what_the_images_share():
    hard, easy = [100.0, 20.0, 60.0], [99.0, 18.0, 57.0]
    difference, error = differ.paired(hard, easy)
    assert difference == pytest.approx(2.0) and error == pytest.approx(1 / math.sqrt(3))
    assert differ.differ(difference, error)
    assert not differ.differ(*differ.independent(60.0, 23.1, 58.0, 23.4))


def test_errors_over_seeds_are_pooled():
    difference, error = differ.over_seeds([1.0, 3.0], [7.0, 9.0, 11.0])
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


def test_a_gain_below_the_error_of_one_run_is_found_in_pairs(runs, tmp_path, capsys):
    assert compare.main([*map(str, runs), "--out-dir", str(tmp_path)]) == 0
    line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("test nll"))
    first, better, other = line.split("[0]")[1].replace("[2]", "[1]").split("[1]")
    assert " ± 0.1 better" in better and "not compared" in other
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width > 1000


def test_seeds_are_means_and_unequal_lengths_are_said_first(runs, tmp_path, capsys):
    several = tmp_path / "several"
    for seed, run in enumerate(runs[:2]):
        shutil.copytree(run, several / "seeds" / f"seed_{seed}")
    longer = files.read_json(runs[0] / "metrics.json")
    longer["speed"]["value"] *= 2
    (runs[0] / "metrics.json").write_text(json.dumps(longer))
    assert compare.main([str(several), str(runs[0]), "--out-dir", str(tmp_path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "unequal lengths" in first and "2 seeds" in lines[0]
    values = [files.read_json(run / "metrics.json")["test_nll"]["value"] for run in runs[:2]]
    nll = next(each for each in lines if each.startswith("test nll"))
    assert f"[0] {sum(values) / 2:.5g}" in nll


def test_folders_that_do_not_compare_are_refused(trained, tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 2
    assert "metrics.json" in capsys.readouterr().err
    assert compare.main([str(trained["gan"]), str(trained["vae"])]) == 2
    assert "one step" in capsys.readouterr().err
    assert compare.main([]) == 0
    assert "step2_pixelcnn" in capsys.readouterr().out


def test_files_that_a_run_lacks_are_named(trained, runs, tmp_path, capsys):
    """Metrics are printed all the same if only the figure lacks something."""

    def refused(*folders):
        assert compare.main([*map(str, folders), "--out-dir", str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert len(printed.err.splitlines()) == 1
        return printed

    (runs[1] / "samples.png").write_text("no picture")
    printed = refused(*runs[:2])
    assert "test nll" in printed.out and "samples.png" in printed.err
    (runs[0] / "losses.csv").unlink()
    assert "losses.csv" in refused(runs[0]).err
    (runs[1] / "per_image.npz").write_text("no archive")
    assert "per_image.npz is damaged" in refused(*runs[:2]).err
    (runs[2] / "config.json").write_text('{"step": "step2_pixelcnn"}')
    assert "config.json in" in refused(runs[2]).err
    (runs[0] / "metrics.json").write_text("{}")
    assert "lacks speed" in refused(runs[0]).err
    assert "there is no folder" in refused("x" * 300).err
