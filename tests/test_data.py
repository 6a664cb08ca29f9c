"""Data: verification, unpacking by many processes at once, other data sets, ranges."""

import gzip
import hashlib
import itertools
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torchvision import datasets

from tests.conftest import ROOT
from utils import data
from utils.data import DATASETS, NUM_HELD_OUT, binarize, distort, load_data, to_symmetric, to_unit
from utils.files import UserError

NAMES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
ARCHIVES = [f"{name}.gz" for name in NAMES]
NOWHERE = "http://127.0.0.1:9/"


def idx(tensor):
    """Return the bytes of a file in the format of MNIST."""
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, 8, tensor.dim()]) + sizes + tensor.numpy().tobytes()


def pack(content):
    return gzip.compress(content, mtime=0)


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture(scope="module")
def contents():
    """Three small data sets: the bytes of each file, by data set and name."""
    random = torch.Generator().manual_seed(0)

    def draw(name):
        shape = (30 if "train" in name else 20, *([28, 28] if "images" in name else []))
        return idx(torch.randint(256 if "images" in name else 10, shape, generator=random, dtype=torch.uint8))

    return {dataset: {name: draw(name) for name in NAMES} for dataset in DATASETS}


@pytest.fixture
def put(contents, tmp_path, monkeypatch):
    """Return a function that writes the files of a small data set; their sums replace the real ones.

    `put(dataset, suffix, source)` fills the folder of `dataset` with the files of `source`, by default its own.
    They are unpacked for the suffix "" and archives for ".gz". Nothing can be downloaded.
    """
    known = {}
    for dataset, files in contents.items():
        source = getattr(datasets, dataset)
        monkeypatch.setattr(source, "mirrors", [NOWHERE])
        monkeypatch.setattr(source, "resources", [(f"{name}.gz", md5(pack(files[name]))) for name in NAMES])
        for name, content in files.items():
            known[md5(pack(content) if dataset == "KMNIST" else content)] = dataset, name
    monkeypatch.setattr(data, "KNOWN_FILES", known)

    def put(dataset="MNIST", suffix=".gz", source=None, spelling="-idx"):
        raw = tmp_path / dataset / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name, content in contents[source or dataset].items():
            path = raw / (name.replace("-idx", spelling) + suffix)
            path.write_bytes(pack(content) if suffix else content)
        return raw

    return put


@pytest.fixture
def read_only():
    """Make a folder read-only, by a mount where the tests run as the administrator."""
    mounted = []

    def mount(*options):
        if not shutil.which("mount") or subprocess.run(["mount", *options], check=False).returncode:
            pytest.skip("the administrator can write everywhere, and nothing can be mounted")

    def make(folder):
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            mount("--bind", folder, folder)
            mounted.append(folder)
            mount("-o", "remount,bind,ro", folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def load(raw):
    return load_data(raw.parent.parent, raw.parent.name)


def refused(raw, *parts):
    """Check that loading is refused in one line that holds these parts and never says to delete a file."""
    with pytest.raises(UserError) as refusal:
        load(raw)
    message = str(refusal.value)
    assert all(part in message for part in (str(raw), *parts)), message
    assert "\n" not in message and "--data" in message
    assert not any(word in message for word in ("delete", "remove", "overwrite"))


def state(raw):
    """Return the times of the folder and its files."""
    return {path: path.stat().st_mtime_ns for path in [raw, *raw.iterdir()]}


def archives_of_mnist(folder):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in ARCHIVES:
        shutil.copy(ROOT / "data" / "MNIST" / "raw" / archive, raw)
    return raw


def test_unpacks_and_loads(tmp_path):
    raw = archives_of_mnist(tmp_path)
    (images, labels), (test_images, test_labels) = load_data(tmp_path)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert test_images.shape == (10_000, 1, 28, 28) and test_images.dtype == torch.uint8
    assert labels.shape == (60_000,) and test_labels.shape == (10_000,) and labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert images.max() == 255 and images.float().mean().item() == pytest.approx(33.318, abs=1e-3)
    assert {path.name for path in raw.iterdir()} == {*NAMES, *ARCHIVES}

    (kept, kept_labels), (held_out, held_out_labels) = load_data(tmp_path, held_out=True)
    assert len(kept) == 50_000 and len(held_out) == NUM_HELD_OUT == 10_000
    assert torch.equal(torch.cat([kept, held_out]), images)
    assert torch.equal(torch.cat([kept_labels, held_out_labels]), labels)
    assert not torch.equal(held_out, test_images)


def test_eight_processes_start_together(tmp_path, start):
    raw = archives_of_mnist(tmp_path)
    ended = [child.end() for child in [start(load_data, tmp_path) for _ in range(8)]]
    assert all(done.returncode == 0 for done in ended), ended
    assert {path.name for path in raw.iterdir()} == {*NAMES, *ARCHIVES}
    assert load_data(tmp_path)[0][0].sum() == 1567298545


@pytest.mark.parametrize(
    "dataset, suffix",
    [("MNIST", ""), ("MNIST", ".gz"), ("FashionMNIST", ""), ("FashionMNIST", ".gz"), ("KMNIST", ".gz")],
)
@pytest.mark.parametrize("spelling", ["-idx", ".idx"])
def test_reads_every_data_set_in_every_form(dataset, suffix, spelling, put, contents):
    raw = put(dataset, suffix, spelling=spelling)
    before = state(raw)
    train_set, test_set = load(raw)
    for tensor, content in zip((*train_set, *test_set), contents[dataset].values()):
        assert tensor.to(torch.uint8).numpy().tobytes() == content[-tensor.numel() :]
    if suffix:  # the first use unpacks
        before = state(raw)
    load(raw)
    after = state(raw)
    if dataset == "KMNIST":  # a temporary folder came and went
        before[raw] = after[raw]
    assert before == after


def test_repacked_archives_are_accepted(put, contents):
    raw = put()
    for name, content in contents["MNIST"].items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1, mtime=1))
    load(raw)


def test_read_only_archives_are_enough_if_none_is_missing(put, read_only):
    complete, incomplete = put("MNIST"), put("FashionMNIST")
    (incomplete / "train-labels-idx1-ubyte.gz").unlink()
    read_only(complete)
    read_only(incomplete)
    before = state(complete)
    assert len(load(complete)[0][0]) == 30
    assert before == state(complete)
    refused(incomplete, "lacks train-labels-idx1-ubyte.gz and cannot be written", "--data-dir")


@pytest.mark.parametrize("name", NAMES)
def test_missing_unpacked_file_is_unpacked_again(name, put, contents):
    raw = put()
    load(raw)
    (raw / name).unlink()
    for archive in {*ARCHIVES} - {f"{name}.gz"}:  # those of unpacked files are not needed
        (raw / archive).unlink()
    load(raw)
    assert (raw / name).read_bytes() == contents["MNIST"][name]


def test_kmnist_is_verified_by_its_archives(put):
    refused(put("KMNIST", ""), "train-images-idx3-ubyte.gz")
    load(put("KMNIST", ".gz"))


def test_downloads_only_what_is_missing(put, contents, tmp_path):
    raw = put("FashionMNIST")
    website = tmp_path / "website"
    shutil.copytree(raw, website)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=website)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        datasets.FashionMNIST.mirrors.append(f"http://127.0.0.1:{server.server_port}/")
        load(raw)
        assert set(asked) == {"/t10k-labels-idx1-ubyte.gz"}
        assert not list(raw.glob(".unpack-*"))
        for name, content in contents["FashionMNIST"].items():
            assert (raw / name).read_bytes() == content
        # A download that is not the file is refused and not kept.
        (website / "train-labels-idx1-ubyte.gz").write_bytes(b"something else")
        for path in raw.glob("train-labels*"):
            path.unlink()
        refused(raw, "train-labels-idx1-ubyte.gz", "download failed", "--data-dir")
        assert not list(raw.glob("train-labels*"))
        server.shutdown()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dataset, suffix", [("MNIST", ""), ("MNIST", ".gz"), ("KMNIST", ".gz")])
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "folder"])
def test_damaged_files_are_refused_by_name(name, dataset, suffix, damage, put):
    path = put(dataset, suffix) / (name + suffix)
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "altered":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 if damage == "truncated" else 0 :]
    path.mkdir() if damage == "folder" else path.write_bytes(content)
    complaint = "cannot be loaded" if damage == "folder" else f"is damaged or is not the file of {dataset}:"
    refused(path.parent, f"{path} {complaint}", "--data-dir")
    assert path.is_dir() or path.stat().st_size == len(content)


@pytest.mark.parametrize("first, second", [*itertools.combinations(NAMES, 2)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_swapped_files_are_refused_by_name(first, second, suffix, put):
    raw = put(suffix=suffix)
    for source, target in ((first, "aside"), (second, first), ("aside", second)):
        (raw / (source + suffix)).rename(raw / (target + suffix))
    refused(raw, first, "is not the file of MNIST")


@pytest.mark.parametrize("source, suffix", [("FashionMNIST", ""), ("FashionMNIST", ".gz"), ("KMNIST", ".gz")])
def test_files_of_another_data_set_are_recognised(source, suffix, put):
    refused(put("MNIST", suffix, source), f"these are the files of {source}, not MNIST: --dataset {source}")


@pytest.mark.parametrize("name", NAMES)
def test_missing_archive_that_cannot_be_downloaded_is_named(name, put):
    raw = put()
    (raw / f"{name}.gz").unlink()
    refused(raw, f"{name}.gz", "--data-dir")


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("")
    refused(tmp_path / "data" / "MNIST" / "raw", "--data-dir")


def test_unknown_data_set(tmp_path):
    with pytest.raises(UserError, match="'mnist'.*MNIST, FashionMNIST, KMNIST"):
        load_data(tmp_path, "mnist")
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(ValueError, match="'thresold'"):
        binarize(pixels, "thresold")


def test_distortion_is_small_and_leaves_the_other_images_alone():
    images = torch.zeros(400, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 12:16] = 255
    assert torch.equal(distort(images, 0.0), images)
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
