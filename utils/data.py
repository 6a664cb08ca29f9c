"""Data sets in the format of MNIST, as tensors: loading, verification, and changes to the pixels."""

import contextlib
import gzip
import os
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import calculate_md5, download_url, extract_archive

from utils.files import UserError

DATASETS = ("MNIST", "FashionMNIST", "KMNIST")  # torchvision's classes
NUM_HELD_OUT = 10_000  # training images that stand in for the test images while settings are chosen

# MD5 sums of the unpacked files, so a repacked archive is accepted. For KMNIST only torchvision's sums of the
# archives are known. We could not try its real files.
KNOWN_FILES = {
    "6bbc9ace898e44ae57da46a324031adb": ("MNIST", "train-images-idx3-ubyte"),
    "a25bea736e30d166cdddb491f175f624": ("MNIST", "train-labels-idx1-ubyte"),
    "2646ac647ad5339dbf082846283269ea": ("MNIST", "t10k-images-idx3-ubyte"),
    "27ae3e4e09519cfbb04c329615203637": ("MNIST", "t10k-labels-idx1-ubyte"),
    "f4a8712d7a061bf5bd6d2ca38dc4d50a": ("FashionMNIST", "train-images-idx3-ubyte"),
    "9018921c3c673c538a1fc5bad174d6f9": ("FashionMNIST", "train-labels-idx1-ubyte"),
    "8181f5470baa50b63fa0f6fddb340f0a": ("FashionMNIST", "t10k-images-idx3-ubyte"),
    "15d484375f8d13e6eb1aabb0c3f46965": ("FashionMNIST", "t10k-labels-idx1-ubyte"),
    **{md5: ("KMNIST", archive.removesuffix(".gz")) for archive, md5 in datasets.KMNIST.resources},
}

HINT = "put the original file into this folder, or name another folder with --data-dir"


def load_data(data_dir, dataset="MNIST", device="cpu", held_out=False):
    """Load a data set and verify its files.

    The files are in `data_dir`/`dataset`/raw. Archives are unpacked there at the first use, and missing ones
    are downloaded. KMNIST is read from its archives each time. Problems raise UserError.

    Args:
        held_out: split the training images into 50,000 to train on and 10,000 in place of the test images,
            to choose settings by.

    Returns:
        ((images, labels), (test_images, test_labels)). Images are uint8, (60000, 1, 28, 28) and
        (10000, 1, 28, 28). Labels are int64, (60000,) and (10000,).
    """
    if dataset not in DATASETS:
        raise UserError(f"there is no data set {dataset!r}: --dataset is one of {', '.join(DATASETS)}")
    raw = Path(data_dir) / dataset / "raw"

    def load(split):
        images = _read(raw, dataset, f"{split}-images-idx3-ubyte", read_image_file).unsqueeze(1)
        labels = _read(raw, dataset, f"{split}-labels-idx1-ubyte", read_label_file)
        return images.to(device), labels.to(device)

    (images, labels), test_set = load("train"), load("t10k")
    if held_out:
        test_set = images[-NUM_HELD_OUT:], labels[-NUM_HELD_OUT:]
        images, labels = images[:-NUM_HELD_OUT], labels[:-NUM_HELD_OUT]
    return (images, labels), test_set


def _read(raw, dataset, name, read):
    """Verify a file and return the tensor that `read` makes of it.

    An archive is unpacked in a temporary folder, and the complete file is moved into `raw`. So several
    processes can start together. A read-only `raw` is enough if it holds the archive.
    """
    suffixes = [".gz"] if dataset == "KMNIST" else ["", ".gz"]  # of KMNIST only archives can be verified
    spellings = name, name.replace("-idx", ".idx")
    paths = [raw / (spelling + suffix) for suffix in suffixes for spelling in spellings]
    path = next(filter(os.path.exists, paths), None)
    try:
        if path and path.suffix != ".gz":
            _verify(path, path, dataset, name)
            return read(str(path))
        with contextlib.suppress(OSError):
            raw.mkdir(parents=True, exist_ok=True)
        place = raw if os.access(raw, os.W_OK) else None  # None is the system's folder for temporary files
        if not (path or place):
            raise UserError(f"{raw} lacks {name}.gz and cannot be written: {HINT}")
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=place) as folder:
            archive = path or _download(raw, dataset, name, folder)
            unpacked = Path(folder) / archive.stem
            with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):  # damage; _verify reports it
                extract_archive(str(archive), folder)
            _verify(archive, unpacked, dataset, name)
            tensor = read(str(unpacked))
            kept = archive if dataset == "KMNIST" else unpacked
            with contextlib.suppress(OSError):  # read-only folder, or Windows while another process reads
                os.replace(kept, raw / kept.name)
            return tensor
    except OSError as error:
        raise UserError(f"{path or raw} cannot be loaded ({error.strerror}): {HINT}") from None


def _download(raw, dataset, name, folder):
    """Download an archive from torchvision's mirrors into `folder`."""
    source, archive = getattr(datasets, dataset), f"{name}.gz"
    for mirror in source.mirrors:
        try:
            download_url(mirror + archive, folder, md5=dict(source.resources)[archive])
            return Path(folder) / archive
        except (OSError, RuntimeError, HTTPException) as error:
            reason = error
    raise UserError(f"{raw} lacks {archive}, and the download failed ({reason}): {HINT}")


def _verify(path, unpacked, dataset, name):
    """Raise UserError unless the MD5 sum of a file or of its unpacked content is the right one."""
    known = [KNOWN_FILES.get(calculate_md5(file)) for file in {path, unpacked}]
    if (dataset, name) in known:
        return
    other = next((found[0] for found in known if found), dataset)
    if other == dataset:
        raise UserError(f"{path} is damaged or is not the file of {dataset}: {HINT}")
    raise UserError(
        f"{path}: these are the files of {other}, not {dataset}: --dataset {other} reads {other}/raw"
    )


def to_unit(images):
    """Convert uint8 in 0..255 to float in [0, 1]."""
    return images.float() / 255


def to_symmetric(images):
    """Convert uint8 in 0..255 to float in [-1, 1], the range of tanh."""
    return to_unit(images) * 2 - 1


def binarize(images, how, generator=None):
    """Convert uint8 to float by 'threshold' (x > 0.5), 'stochastic' (Bernoulli(x) draws) or 'none' (grey).

    A `generator` is the CPU's, so its draws are the same on every device.
    """
    x = to_unit(images)
    if how == "none":
        return x
    if how == "threshold":
        return (x > 0.5).float()
    if how == "stochastic":
        x_there = x.cpu() if generator else x
        return torch.bernoulli(x_there, generator=generator).to(x.device)
    raise ValueError(f"how is 'threshold', 'stochastic' or 'none', not {how!r}")


def distort(images, share):
    """Rotate, scale and shear a random share of uint8 images (N, 1, 28, 28) a little, each differently.

    The angle (radians) and the shear are normal with standard deviation 0.1, the scales log-normal with 0.07.
    The random numbers are drawn on the CPU, so every device gets the same images.
    """
    chosen = torch.rand(len(images)) < share
    angle, shear, log_width, log_height = torch.randn(4, len(images))[:, chosen]
    if not len(angle):
        return images
    angle, shear = 0.1 * angle, 0.1 * shear
    width, height = (0.07 * log_width).exp(), (0.07 * log_height).exp()
    zero = torch.zeros_like(angle)
    row_x = torch.stack([width * angle.cos(), shear - width * angle.sin(), zero], 1)
    row_y = torch.stack([height * angle.sin(), height * angle.cos(), zero], 1)
    matrices = torch.stack([row_x, row_y], 1).to(images.device)
    images, originals = images.clone(), images[chosen].float()
    grid = F.affine_grid(matrices, originals.shape, align_corners=False)
    images[chosen] = F.grid_sample(originals, grid, align_corners=False).round().to(torch.uint8)
    return images
