"""The benchmark, shortened: every ratio is there, positive, with its hardware and batch size or number of images."""

import hw2_step2_main as step2
from models.AR import PixelCNN
from tests import children
from utils import benchmark, files


def test_every_ratio_is_measured_and_labelled(monkeypatch, capsys):
    for name, value in (("FRACTION", 400), ("STEPS", 1), ("ROUNDS", 1), ("NUMS_SAMPLES", (2,))):
        monkeypatch.setattr(benchmark, name, value)
    for name, value in children.SMALL.items():
        monkeypatch.setitem(PixelCNN.__init__.__kwdefaults__, name, value)
    monkeypatch.setattr(step2, "load_model", lambda path: PixelCNN())
    written = {}
    monkeypatch.setattr(files, "make_folder", lambda folder: None)
    monkeypatch.setattr(files, "write_json", lambda path, entries: written.update(entries))
    benchmark.measure()
    expected = {"feeding", "full_kernels_float32", "sampling_2"}
    assert expected <= written.keys() <= expected | {"full_kernels_bfloat16"}
    printed = capsys.readouterr().out
    for entry in written.values():
        assert entry["value"] > 0 and entry["hardware"] in printed and entry["formula"] in printed
        assert ("batch_size" in entry) != ("num_samples" in entry)
