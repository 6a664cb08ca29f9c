"""Data: forms of the files, verification, downloads, other data sets, ranges, binarisation and distortion."""

import errno
import gzip
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from tests.conftest import ROOT
from utils import data
from utils.data import DATASETS, NUM_HELD_OUT, binarize, distort, load_data, to_symmetric, to_unit
from utils.files import UserError

NAMES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
# The bytes of the files of three small data sets, with 30 training and 20 test images each.
FILES = {}
for seed, dataset in enumerate(DATASETS):
    noise, FILES[dataset] = torch.Generator().manual_seed(seed), {}
    for name, sizes in zip(NAMES, ([30, 28, 28], [30], [20, 28, 28], [20])):
        values = torch.randint(256 if "images" in name else 10, sizes, generator=noise, dtype=torch.uint8)
        header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
        FILES[dataset][name] = header + values.numpy().tobytes()

pack = partial(gzip.compress, mtime=0)


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Return a function that writes the files of a small data set; their sums replace the real ones.

    `put(dataset, form, source)` fills the folder of `dataset` with the files of `source`, by default its own.
    `form` makes a path of a name, and of the name with a dot. Nothing can be downloaded.
    """
    known = {}
    for dataset, files in FILES.items():
        source = getattr(datasets, dataset)
        monkeypatch.setattr(source, "mirrors", ["http://127.0.0.1:9/"])
        monkeypatch.setattr(source, "resources", [(f"{name}.gz", md5(pack(files[name]))) for name in NAMES])
        for name, content in files.items():
            known[md5(pack(content) if dataset == "KMNIST" else content)] = f"{dataset}/{name}"
    monkeypatch.setattr(data, "KNOWN_FILES", known)
    data._unpack.cache_clear()  # two changes of a file may fall into one tick of the clock

    def put(dataset="MNIST", form="{0}.gz", source=None):
        raw = tmp_path / dataset / "raw"
        for name, content in FILES[source or dataset].items():
            path = raw / form.format(name, name.replace("-idx", ".idx"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pack(content) if path.suffix == ".gz" else content)
        return raw

    return put


def check(raw, loaded=None):
    """Check loaded tensors against the bytes of the files."""
    train_set, test_set = loaded or load_data(raw.parent.parent, raw.parent.name)
    for tensor, content in zip((*train_set, *test_set), FILES[raw.parent.name].values()):
        assert tensor.to(torch.uint8).numpy().tobytes() == content[-tensor.numel() :]


def refused(raw, *parts):
    """Check that loading is refused in one line that holds these parts and the flag that helps."""
    with pytest.raises(UserError) as refusal:
        load_data(raw.parent.parent, raw.parent.name)
    message = str(refusal.value)
    assert all(part in message for part in (str(raw), "--data-dir", *parts)), message
    assert "\n" not in message


def state(folder):
    """Return the times of a folder and of all that is in it."""
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_loads_mnist_and_leaves_its_folder_alone():
    before = state(ROOT / "data")
    (images, labels), (test_images, test_labels) = load_data(ROOT / "data")
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert test_images.shape == (10_000, 1, 28, 28) and test_images.dtype == torch.uint8
    assert labels.shape == (60_000,) and test_labels.shape == (10_000,) and labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]

    (kept, kept_labels), (held_out, held_out_labels) = load_data(ROOT / "data", held_out=True)
    assert len(kept) == 50_000 and len(held_out) == NUM_HELD_OUT == 10_000
    assert torch.equal(torch.cat([kept, held_out]), images)
    assert torch.equal(torch.cat([kept_labels, held_out_labels]), labels)
    assert before == state(ROOT / "data")


@pytest.mark.parametrize("form", ["{0}.gz", "{1}.gz", "{0}", "{1}", "{0}/{0}", "{0}/{1}"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_reads_every_form_and_writes_nothing(dataset, form, put):
    raw = put(dataset, form)
    before = state(raw)
    if dataset == "KMNIST" and not form.endswith(".gz"):  # only its archives can be verified
        refused(raw, f"is not KMNIST/{NAMES[0]}", f"put the original {NAMES[0]}.gz into {raw}")
    else:
        check(raw)
    assert before == state(raw)


def test_reads_archives_repacked_or_unpacked_by_a_browser_whatever_lies_beside(put):
    raw = put()
    for name, content in FILES["MNIST"].items():
        (raw / f"{name}.gz").write_bytes(content if "images" in name else gzip.compress(content, 1, mtime=1))
    (raw / NAMES[0]).mkdir()
    (raw / NAMES[1]).write_bytes(b"damaged")
    check(raw)


def test_reads_again_what_has_changed_and_nothing_else(put, monkeypatch):
    raw = put()
    load_data(raw.parent.parent)[0][0].zero_()  # the caller's own copy
    with monkeypatch.context() as patch:
        patch.delattr(Path, "read_bytes")
        check(raw)
    (raw / f"{NAMES[3]}.gz").write_bytes(b"damaged")
    refused(raw, f"{NAMES[3]}.gz is not")


@pytest.mark.parametrize("dataset, suffix", [("MNIST", ""), ("MNIST", ".gz"), ("KMNIST", ".gz")])
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_files_are_refused_by_name(dataset, suffix, damage, put):
    for name in NAMES:
        path = put(dataset, "{0}" + suffix) / (name + suffix)
        content = path.read_bytes()
        altered = content[:20] + bytes([content[20] ^ 1]) + content[21:]
        path.write_bytes(dict(truncated=content[:20], altered=altered, empty=b"")[damage])
        words = f"{path} is not {dataset}/{name} but damaged", f"put the original {name}.gz into"
        refused(path.parent, *words)


def test_swapped_files_and_other_data_sets_are_recognised(put):
    for first, second in ((0, 1), (0, 2), (1, 3)):
        raw = put(form="{0}")
        (raw / NAMES[first]).write_bytes(FILES["MNIST"][NAMES[second]])
        refused(raw, f"{raw / NAMES[first]} is not MNIST/{NAMES[first]} but MNIST/{NAMES[second]}")
    for source in DATASETS[1:]:
        refused(put(source=source), f"but {source}/{NAMES[0]}", "another --dataset")


def test_data_dir_too_deep(put, tmp_path):
    raw = put()
    before = state(tmp_path)
    for below in ("MNIST", "MNIST/raw"):
        with pytest.raises(UserError) as refusal:
            load_data(tmp_path / below)
        assert str(refusal.value) == f"the files are in {raw}: use --data-dir {tmp_path}"
    assert before == state(tmp_path)


def test_missing_archives_are_downloaded(put, tmp_path):
    raw, archive = put("FashionMNIST"), f"{NAMES[3]}.gz"
    (raw / archive).rename(tmp_path / archive)
    refused(raw, f"{raw} lacks {archive}, and the download failed", "put it there")
    website = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), website) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        datasets.FashionMNIST.mirrors.append(f"http://127.0.0.1:{server.server_port}/")
        with ThreadPoolExecutor(4) as pool:
            for loaded in pool.map(load_data, [tmp_path] * 4, ["FashionMNIST"] * 4):
                check(raw, loaded)
        assert {path.name for path in raw.iterdir()} == {f"{name}.gz" for name in NAMES}
        (raw / archive).unlink()
        (tmp_path / archive).write_bytes(b"something else")
        refused(raw, f"{raw} lacks {archive}, and the download failed", "put it there")
        server.shutdown()
    assert {path.name for path in raw.iterdir()} == {f"{name}.gz" for name in NAMES[:3]}


def test_full_disk(put, monkeypatch):
    raw = put()
    (raw / f"{NAMES[0]}.gz").unlink()

    def fill(_, folder, **__):
        (Path(folder) / f"{NAMES[0]}.gz").write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "download_url", fill)
    refused(raw, f"no room for {NAMES[0]}.gz: make some")
    assert {path.name for path in raw.iterdir()} == {f"{name}.gz" for name in NAMES[1:]}


def test_unreadable_file_and_a_file_as_folder(put, monkeypatch, tmp_path):
    raw = put()
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "MNIST" / "raw", "Not a directory")
    monkeypatch.setattr(Path, "read_bytes", lambda path: tmp_path.read_text())
    refused(raw, f"{raw / NAMES[0]}.gz cannot be read (Is a directory)")


def test_ranges_and_binarisation():
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert to_unit(pixels).tolist() == pytest.approx([0, 127 / 255, 128 / 255, 1])
    assert to_symmetric(pixels).tolist() == pytest.approx([-1, -1 / 255, 1 / 255, 1], abs=1e-6)
    assert binarize(pixels, "threshold").tolist() == [0, 0, 1, 1]
    assert torch.equal(binarize(pixels, "none"), to_unit(pixels))
    drawn = binarize(pixels.repeat(20_000, 1), "stochastic")
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), to_unit(pixels), atol=0.02)
    noise = torch.Generator()
    first, second = (binarize(pixels.repeat(50), "stochastic", noise.manual_seed(seed)) for seed in (3, 3))
    assert torch.equal(first, second)


def test_distortion_is_small_and_leaves_the_other_images_alone():
    images = torch.zeros(400, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 12:16] = 255
    assert torch.equal(distort(images, 0), images)
    distorted = distort(images, 0.5)
    assert distorted.dtype == torch.uint8 and distorted.shape == images.shape
    changed = (distorted != images).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.6
    assert len(distorted[changed].flatten(1).unique(dim=0)) == changed.sum(), "two are distorted alike"
    # No ink is lost and none is moved far: the bar grows or shrinks by its scale, about its centre.
    ink = to_unit(distorted[changed]).sum((1, 2, 3)) / to_unit(images[0]).sum()
    assert ink.mean().item() == pytest.approx(1, abs=0.05) and 0.5 < ink.min() and ink.max() < 2
    rows = torch.arange(28.0).view(1, 1, 28, 1)
    centre = (to_unit(distorted) * rows).sum((1, 2, 3)) / to_unit(distorted).sum((1, 2, 3))
    assert centre.sub(13.5).abs().max() < 0.5
