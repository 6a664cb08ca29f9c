"""Files: written whole or not at all, locked, and read without running code or trusting their content."""

import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests.children import STEPS
from tests.conftest import assert_refused, content, flags_of
from utils import files


def test_a_csv_is_read_as_it_was_written(tmp_path):
    rows = [dict(name="a", value=0.5, count=3), dict(name="b", value=None, count=4)]
    (tmp_path / "table.csv").write_text(files.csv_text(rows))
    assert files.read_csv(tmp_path / "table.csv") == rows


class _Payload:
    """A pickle that would create a file on loading."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def damaged(path, damage, other):
    """Return the bytes of a damaged file; `other` is a path that a pickle would create."""
    good, middle = path.read_bytes(), path.stat().st_size // 2
    if damage == "pickle in a zip":
        torch.save(_Payload(other), path)
    elif damage == "other step":
        torch.save({**content(path.parent, path.name), "step": "step1_gan"}, path)
    elif damage == "other values":
        torch.save({"step": "step3_vae"}, path)
    else:
        return {
            "empty": b"",
            "truncated": good[:middle],
            "altered": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "pickle": pickle.dumps(_Payload(other)),
        }[damage]
    return path.read_bytes()


DAMAGES = ["empty", "truncated", "altered", "pickle", "pickle in a zip", "other step", "other values"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file, mode", [("checkpoint.pt", "--resume"), ("model.pt", "--sample-only")])
def test_bad_files_are_refused(damage, file, mode, call_step, bare_steps, trained, tmp_path):
    path = shutil.copytree(trained["vae"], tmp_path / "run") / file
    before = damaged(path, damage, tmp_path / "pwned")
    path.write_bytes(before)
    flags = flags_of("vae", path.parent, mode, *(["--model", path] if file == "model.pt" else []))
    assert_refused(call_step(step3, *flags), file)
    assert path.read_bytes() == before and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", STEPS)
def test_checkpoints_and_models_of_nan_or_of_another_network(name, call_step, bare_steps, trained, tmp_path):
    folder = shutil.copytree(trained[name], tmp_path / "run")
    flags = flags_of(name, folder)
    draw = ["--sample-only", "--model", folder / "model.pt"]
    checkpoint, model = content(folder, "checkpoint.pt"), content(folder, "model.pt")
    states = {key: whole[key] for whole, key in ((checkpoint, "modules"), (model, "weights"))}
    nan = tree_map_only(torch.Tensor, lambda each: each * torch.nan, states)
    cut = tree_map_only(torch.Tensor, lambda each: each[:1] if each.dim() else each, states)
    first, *others = model["weights"]
    renamed = {"renamed" if key == first else key: model["weights"][key] for key in (first, *others)}
    for file, whole, wrong, more, *expected in (
        ("checkpoint.pt", checkpoint, {"modules": nan["modules"]}, ["--resume"], "not finite"),
        ("checkpoint.pt", checkpoint, {"modules": cut["modules"]}, ["--resume"], "does not fit"),
        ("checkpoint.pt", checkpoint, {"version": 1}, ["--resume"], "of another version"),
        ("model.pt", model, {"weights": nan["weights"]}, draw, "not finite"),
        ("model.pt", model, {"weights": cut["weights"]}, draw, "does not fit", "train anew"),
        ("model.pt", model, {"weights": renamed}, draw, first, "unexpected renamed", "models", "train anew"),
    ):
        torch.save({**whole, **wrong}, folder / file)
        assert_refused(call_step(STEPS[name], *flags, *more), file, *expected)


def test_buffers_may_differ(trained, tmp_path):
    """A textbook mask is saved with the weights, ours is not; a file of one is read into the other."""
    saved = content(trained["pixelcnn"], "model.pt")
    saved["weights"]["first.mask"] = torch.zeros(3)
    saved["weights"]["norm.running_mean"] = torch.zeros(3)
    torch.save(saved, tmp_path / "model.pt")
    step2.load_model(tmp_path / "model.pt")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.BatchNorm2d(1)
            self.register_buffer("mask", torch.ones(2))

    weights = {"layer.weight": torch.full((1,), 2.0), "layer.bias": torch.zeros(1)}
    torch.save({"step": "mine", "network": {}, "weights": weights}, tmp_path / "mine.pt")
    network = files.load_network(tmp_path / "mine.pt", ("mine",), Network)
    assert network.layer.weight == 2 and torch.equal(network.mask, torch.ones(2))


@pytest.mark.parametrize("owner, name", [(torch, "load"), (nn.Module, "load_state_dict")])
def test_too_little_memory_is_no_damage(owner, name, trained, monkeypatch):
    """The exception goes on to `cli.exit_code`, which knows it."""

    def allocate(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(owner, name, allocate)
    with pytest.raises(RuntimeError) as caught:
        step1.load_model(trained["gan"] / "model.pt")
    assert files.lacks_memory(caught.value)
