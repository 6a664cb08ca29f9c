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

NAMES = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
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

    `put(dataset, source)` fills the folder of `dataset` with the archives of `source`, by default its own. Nothing can
    be downloaded.
    """
    for dataset, files in FILES.items():
        source = getattr(datasets, dataset)
        monkeypatch.setattr(source, "mirrors", ["http://127.0.0.1:9/"])
        monkeypatch.setattr(source, "resources", [(name, md5(pack(files[name]))) for name in NAMES])

    def put(dataset="MNIST", source=None):
        raw = tmp_path / dataset / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name, content in FILES[source or dataset].items():
            (raw / name).write_bytes(pack(content))
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
    assert images.sum() == 1567298545

    (kept, kept_labels), (held_out, held_out_labels) = load_data(ROOT / "data", held_out=True)
    assert len(kept) == 50_000 and len(held_out) == NUM_HELD_OUT == 10_000
    assert torch.equal(torch.cat([kept, held_out]), images)
    assert torch.equal(torch.cat([kept_labels, held_out_labels]), labels)
    assert before == state(ROOT / "data")


@pytest.mark.parametrize("dataset", DATASETS)
def test_reads_archives_and_writes_nothing(dataset, put):
    raw = put(dataset)
    before = state(raw)
    check(raw)
    load_data(raw.parent.parent, dataset)[0][0].zero_()  # the caller's own copy
    check(raw)
    assert before == state(raw)


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_files_are_refused_by_name(damage, put):
    for name in NAMES:
        path = put() / name
        content = path.read_bytes()
        altered = content[:20] + bytes([content[20] ^ 1]) + content[21:]
        path.write_bytes(dict(truncated=content[:20], altered=altered, empty=b"")[damage])
        refused(path.parent, f"{path} is not the original archive of MNIST", f"put the original {name} into")


def test_swapped_files_and_other_data_sets_are_refused(put):
    raw = put()
    (raw / NAMES[0]).write_bytes((raw / NAMES[2]).read_bytes())
    refused(raw, f"{raw / NAMES[0]} is not the original archive of MNIST")
    for source in DATASETS[1:]:
        refused(put(source=source), "is not the original archive of MNIST", "another --dataset")


def test_missing_archives_are_downloaded(put, tmp_path):
    raw, archive = put("FashionMNIST"), NAMES[3]
    (raw / archive).rename(tmp_path / archive)
    refused(raw, f"{raw} lacks {archive}, and the download failed", "put it there")
    website = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), website) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        datasets.FashionMNIST.mirrors.append(f"http://127.0.0.1:{server.server_port}/")
        with ThreadPoolExecutor(4) as pool:
            for loaded in pool.map(load_data, [tmp_path] * 4, ["FashionMNIST"] * 4):
                check(raw, loaded)
        assert {path.name for path in raw.iterdir()} == {*NAMES}
        (raw / archive).unlink()
        (tmp_path / archive).write_bytes(b"something else")
        refused(raw, f"{raw} lacks {archive}, and the download failed", "put it there")
        server.shutdown()
    assert {path.name for path in raw.iterdir()} == {*NAMES[:3]}


def test_full_disk(put, monkeypatch):
    raw = put()
    (raw / NAMES[0]).unlink()

    def fill(_, folder, **__):
        (Path(folder) / NAMES[0]).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "download_url", fill)
    refused(raw, f"lacks {NAMES[0]}", "No space left on device")
    assert {path.name for path in raw.iterdir()} == {*NAMES[1:]}


def test_unreadable_file_and_a_file_as_folder(put, monkeypatch, tmp_path):
    raw = put()
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "MNIST" / "raw", "Not a directory")
    monkeypatch.setattr(Path, "read_bytes", lambda path: tmp_path.read_text())
    refused(raw, f"{raw / NAMES[0]} cannot be read (Is a directory)")


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
    with pytest.raises(KeyError, match="thresold"):
        binarize(pixels, "thresold")


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
