"""Data: verification, unpacking by many processes at once, batches, ranges."""

import itertools
import shutil

import pytest
import torch

from tests import children
from tests.conftest import ROOT
from utils.data import UNPACKED_MD5, batches, binarize, distort, load_mnist, to_symmetric, to_unit
from utils.runs import UserError

RAW = ROOT / "data" / "MNIST" / "raw"


@pytest.fixture
def archives(tmp_path):
    """A data folder with the four archives, as in a fresh clone."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in UNPACKED_MD5:
        shutil.copy(RAW / f"{name}.gz", raw)
    return tmp_path


@pytest.fixture(scope="module")
def unpacked_once(tmp_path_factory):
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in UNPACKED_MD5:
        shutil.copy(RAW / f"{name}.gz", raw)
    load_mnist(raw.parent.parent)
    return raw


@pytest.fixture
def unpacked(unpacked_once, tmp_path):
    """A data folder with archives and unpacked files, as after the first run."""
    shutil.copytree(unpacked_once, tmp_path / "MNIST" / "raw")
    return tmp_path


def test_unpacks_and_loads(archives):
    (images, labels), (test_images, test_labels) = load_mnist(archives)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert (
        labels.shape == (60_000,)
        and test_images.shape == (10_000, 1, 28, 28)
        and test_labels.shape == (10_000,)
    )
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert images.max() == 255 and images.float().mean().item() == pytest.approx(33.318, abs=1e-3)
    names = {path.name for path in (archives / "MNIST" / "raw").iterdir()}
    assert names == set(UNPACKED_MD5) | {f"{name}.gz" for name in UNPACKED_MD5}


def test_eight_processes_start_together(archives, start):
    together = [start(children.print_sum, archives) for _ in range(8)]
    ended = [child.end() for child in together]
    assert all(done.returncode == 0 for done in ended), ended
    assert {done.stdout.strip() for done in ended} == {"1567298545"}
    assert not list((archives / "MNIST" / "raw").glob(".unpack-*"))


def test_existing_data_needs_no_archives_and_nothing_is_written(unpacked):
    raw = unpacked / "MNIST" / "raw"
    for name in UNPACKED_MD5:
        (raw / f"{name}.gz").unlink()
    before = {path: path.stat().st_mtime_ns for path in [raw, *raw.iterdir()]}
    load_mnist(unpacked)
    assert before == {path: path.stat().st_mtime_ns for path in [raw, *raw.iterdir()]}


@pytest.mark.parametrize("name", sorted(UNPACKED_MD5))
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "folder"])
def test_damaged_files_are_refused_by_name(request, name, suffix, damage):
    folder = request.getfixturevalue("archives" if suffix else "unpacked")
    path = folder / "MNIST" / "raw" / (name + suffix)
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_mnist(folder)


@pytest.mark.parametrize("first, second", [*itertools.combinations(sorted(UNPACKED_MD5), 2)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_swapped_files_are_refused_by_name(request, first, second, suffix):
    folder = request.getfixturevalue("archives" if suffix else "unpacked")
    raw = folder / "MNIST" / "raw"
    for source, target in ((first, "aside"), (second, first), ("aside", second)):
        (raw / (source + suffix)).rename(raw / (target + suffix))
    with pytest.raises(UserError, match=f"{first}|{second}"):
        load_mnist(folder)


@pytest.mark.parametrize("name", sorted(UNPACKED_MD5))
def test_missing_archive_that_cannot_be_downloaded_is_named(archives, name, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    (archives / "MNIST" / "raw" / f"{name}.gz").unlink()
    with pytest.raises(UserError, match=f"{name}.gz"):
        load_mnist(archives)


@pytest.mark.parametrize("name", sorted(UNPACKED_MD5))
def test_missing_unpacked_file_is_unpacked_again(unpacked, name):
    path = unpacked / "MNIST" / "raw" / name
    before = path.read_bytes()
    path.unlink()
    load_mnist(unpacked)
    assert path.read_bytes() == before


def test_archives_of_unpacked_files_are_not_needed(unpacked, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    raw = unpacked / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte.gz").unlink()
    (raw / "t10k-labels-idx1-ubyte").unlink()
    assert load_mnist(unpacked)[1][1][:3].tolist() == [7, 2, 1]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="--data-dir"):
        load_mnist(tmp_path / "data")


def test_batches_cover_everything_once_in_an_order_of_the_generator():
    images, labels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)

    def drawn(seed):
        return [y.tolist() for _, y in batches(images, labels, 4, torch.Generator().manual_seed(seed))]

    assert [len(batch) for batch in drawn(0)] == [4, 4, 2]
    assert sorted(sum(drawn(0), [])) == list(range(10))
    assert drawn(0) == drawn(0) != drawn(1)
    assert [y.tolist() for _, y in batches(images, labels, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for x, y in batches(images, labels, 4, torch.Generator()):
        assert x.flatten().tolist() == y.tolist()


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


def test_held_out_images_are_the_last_of_the_training_set():
    (images, labels), (test_images, _) = load_mnist(ROOT / "data")
    (kept, kept_labels), (held_out, held_out_labels) = load_mnist(ROOT / "data", held_out=True)
    assert len(kept) == 50_000 and len(held_out) == 10_000
    assert torch.equal(torch.cat([kept, held_out]), images)
    assert torch.equal(torch.cat([kept_labels, held_out_labels]), labels)
    assert not torch.equal(held_out, test_images)


def test_distortion_is_small_and_leaves_the_other_images_alone():
    images = torch.zeros(400, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 12:16] = 255
    assert torch.equal(distort(images, 0.0), images)
    distorted = distort(images, 0.5)
    assert distorted.dtype == torch.uint8 and distorted.shape == images.shape
    changed = (distorted != images).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.6
    assert len(distorted[changed].flatten(1).unique(dim=0)) == changed.sum(), (
        "each has a distortion of its own"
    )
    # No ink is lost and none is moved far: the bar grows or shrinks by its scale, about its centre.
    ink = to_unit(distorted[changed]).sum((1, 2, 3)) / to_unit(images[0]).sum()
    assert ink.mean().item() == pytest.approx(1, abs=0.05) and 0.5 < ink.min() and ink.max() < 2
    rows = torch.arange(28.0).view(1, 1, 28, 1)
    centre = (to_unit(distorted) * rows).sum((1, 2, 3)) / to_unit(distorted).sum((1, 2, 3))
    assert centre.sub(13.5).abs().max() < 0.5
