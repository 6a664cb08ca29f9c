"""Files: written whole or not at all, locked, and read without running code or trusting their content."""

import pickle
import random
import shutil

import pytest
import torch
from torch import nn

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests.children import STEPS
from tests.conftest import assert_refused, content, flags_of, same
from utils import files
from utils.files import UserError

# ---------------------------------------------------------------------------------------------------------
# Writing and locking


def test_a_csv_is_read_as_it_was_written(tmp_path):
    table = {"name": ["a", "b"], "value": [0.5, None], "count": [3, 4]}
    files.write_csv(tmp_path / "table.csv", table)
    assert files.read_csv(tmp_path / "table.csv") == [
        {"name": "a", "value": 0.5, "count": 3.0},
        {"name": "b", "value": None, "count": 4.0},
    ]


def test_half_written_files_never_replace_whole_ones(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "checkpoint.pt"
    files.save_tensors(path, {"step": "a"})
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        files.save_tensors(path, {"step": "b"})
    assert files.load_tensors(path, ("a",), "checkpoint") == {"step": "a"}
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_second_run_into_the_same_folder_is_refused(call_step, bare_steps, tmp_path):
    flags = flags_of("vae", tmp_path)
    assert call_step(step3, *flags).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files.lock(tmp_path):
        assert_refused(call_step(step3, *flags), "another run writes into", str(tmp_path))
        assert_refused(call_step(step3, *flags, "--resume"), "another run writes into")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert call_step(step3, *flags).returncode == 0


# ---------------------------------------------------------------------------------------------------------
# Reading


def test_damage_at_random_places_is_seen(tmp_path):
    """Bytes changed, cut off, put in or taken out: refused, unless what is read is what was written."""
    path, chance = tmp_path / "checkpoint.pt", random.Random(0)
    saved = {"step": "a", "weights": {"w": torch.randn(20, 5)}, "position": [1, 2]}
    files.save_tensors(path, saved)
    good, refused = path.read_bytes(), 0
    for _ in range(400):
        at, length = chance.randrange(len(good)), chance.choice([1, 1, 3, 50])
        kind = chance.choice(["change", "cut", "insert", "remove"])
        end = at if kind == "insert" else len(good) if kind == "cut" else at + length
        put = chance.randbytes(length) if kind in ("change", "insert") else b""
        path.write_bytes(good[:at] + put + good[end:])
        try:
            assert same(files.load_tensors(path, ("a",), "checkpoint"), saved)
        except UserError:
            refused += 1
    assert refused > 300


class _Payload:
    """A pickle that would create a file on loading."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "damage",
    ["empty", "random", "truncated", "altered", "pickle", "pickle in a zip", "other step", "other values"],
)
@pytest.mark.parametrize("file, flags", [("checkpoint.pt", ["--resume"]), ("model.pt", ["--sample-only"])])
def test_bad_files_are_refused(damage, file, flags, call_step, bare_steps, trained, tmp_path):
    shutil.copytree(trained["vae"], tmp_path / "run")
    path = tmp_path / "run" / file
    good = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "random":
        path.write_bytes(bytes(torch.randint(256, (5000,), dtype=torch.uint8).tolist()))
    elif damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "altered":
        middle = len(good) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    elif damage == "pickle in a zip":
        torch.save(_Payload(tmp_path / "pwned"), path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(_Payload(tmp_path / "pwned")))
    elif damage == "other step":
        torch.save({**content(path.parent, file), "step": "step1_gan"}, path)
    else:
        torch.save({"step": "step3_vae"}, path)
    before = path.read_bytes()
    flags = flags_of("vae", path.parent, *flags)
    done = call_step(step3, *flags, *(["--model", path] if file == "model.pt" else []))
    assert_refused(done, file)
    assert path.read_bytes() == before and not (tmp_path / "pwned").exists()
    assert "delete" not in done.stderr and "remove" not in done.stderr


def fill_with_nan(value):
    """Return the same nested value with every floating tensor NaN."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, torch.nan) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: fill_with_nan(each) for key, each in value.items()}
    return [*map(fill_with_nan, value)] if isinstance(value, list) else value


def cut(value):
    """Return the same nested value with every tensor shortened to its first item."""
    if isinstance(value, torch.Tensor):
        return value[:1] if value.dim() else value
    if isinstance(value, dict):
        return {key: cut(each) for key, each in value.items()}
    return [*map(cut, value)] if isinstance(value, list) else value


@pytest.mark.parametrize("name", STEPS)
def test_checkpoints_and_models_of_nan_or_of_another_network(name, call_step, bare_steps, trained, tmp_path):
    folder = shutil.copytree(trained[name], tmp_path / "run")
    flags = flags_of(name, folder)
    draw = ["--sample-only", "--model", folder / "model.pt"]
    checkpoint, model = content(folder, "checkpoint.pt"), content(folder, "model.pt")
    nan = fill_with_nan(checkpoint["tracked"])
    other = {"weight": torch.zeros(3)}
    for file, whole, wrong, more, expected in (
        ("checkpoint.pt", checkpoint, {"tracked": nan}, ["--resume"], "not finite"),
        ("checkpoint.pt", checkpoint, {"tracked": cut(checkpoint["tracked"])}, ["--resume"], "does not fit"),
        ("checkpoint.pt", checkpoint, {"version": 1}, ["--resume"], "of another version"),
        ("checkpoint.pt", checkpoint, {"version": None}, ["--resume"], "of another version"),
        ("model.pt", model, {"weights": fill_with_nan(model["weights"])}, draw, "not finite"),
        ("model.pt", model, {"weights": other}, draw, "train anew"),
        ("model.pt", model, {"network": {"nonsense": 1}}, draw, "train anew"),
    ):
        torch.save({**whole, **wrong}, folder / file)
        assert_refused(call_step(STEPS[name], *flags, *more), expected, file)


def test_models_of_the_other_network_are_refused(call_step, bare_steps, trained, tmp_path):
    for name, flags in (("pixelcnn", ["--conditional"]), ("conditional", [])):
        model = trained[name] / "model.pt"
        done = call_step(step2, "--sample-only", *flags, "--model", model, "--out-dir", tmp_path / "out")
        assert_refused(done, "model.pt")
    with pytest.raises(UserError, match=r"step2_pixelcnn\b"):
        step1.load_model(trained["pixelcnn"] / "model.pt")


def test_a_device_or_a_memory_that_is_too_small_is_no_damage(trained, monkeypatch):
    path = trained["gan"] / "model.pt"
    with pytest.raises(UserError, match="moved to cuda") as refusal:
        step1.load_model(path, "cuda")
    assert "damaged" not in str(refusal.value)

    def allocate(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    for owner, name, error in (
        (files.torch, "load", allocate),
        (nn.Module, "load_state_dict", allocate),
        (files.torch, "load", lambda *_, **__: bytearray(2**62)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, error)
            with pytest.raises(UserError, match="memory") as refusal:
                step1.load_model(path)
        assert "damaged" not in str(refusal.value) and "train anew" not in str(refusal.value)


def test_loading_leaves_the_random_state_alone(trained):
    before = torch.get_rng_state()
    assert not step1.load_model(trained["gan"] / "model.pt").training
    assert torch.equal(before, torch.get_rng_state())
