"""The benchmark, shortened: every ratio is there, positive, with its hardware and batch size or number of images."""

from utils import benchmark, runs


def test_every_ratio_is_measured_and_labelled(monkeypatch, capsys):
    for name, value in (("SHARE", 400), ("STEPS", 1), ("ROUNDS", 1), ("NUMS_SAMPLES", (2,))):
        monkeypatch.setattr(benchmark, name, value)
    written = {}
    monkeypatch.setattr(runs, "make_folder", lambda folder: None)
    monkeypatch.setattr(runs, "write_json", lambda path, entries: written.update(entries))
    benchmark.main()
    expected = {"step1_epoch", "step1_feeding", "step3_epoch", "step3_feeding"}
    expected |= {"full_kernels", "depthwise", "sampling_2"}
    assert expected <= written.keys() <= expected | {"full_kernels_bfloat16", "single_precision"}
    printed = capsys.readouterr().out
    for entry in written.values():
        assert entry["value"] > 0 and entry["hardware"] in printed and entry["formula"] in printed
        assert ("batch_size" in entry) != ("num_samples" in entry)
