"""The benchmark, shortened: every ratio is there, positive, with its hardware and number of images."""

import hw2_step2_main as step2
from models.AR import PixelCNN
from tests import children
from utils import benchmark, files


def test_every_ratio_is_measured_and_labelled(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "NUMS_SAMPLES", (1, 2))
    monkeypatch.setattr(step2, "load_model", lambda path: PixelCNN(**children.SMALL))
    written = {}
    monkeypatch.setattr(files, "make_folder", lambda folder: None)
    monkeypatch.setattr(files, "write_json", lambda path, entries: written.update(entries))
    benchmark.measure()
    assert written.keys() == {"sampling_1", "sampling_2"}
    printed = capsys.readouterr().out
    for count, entry in enumerate(written.values(), 1):
        assert entry["value"] > 0 and entry["hardware"] and entry["formula"] in printed
        assert entry["num_samples"] == count
