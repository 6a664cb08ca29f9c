"""Data sets in the format of MNIST, as tensors: loading, verification, and changes to the pixels."""

import contextlib
import errno
import functools
import gzip
import hashlib
import os
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.utils import download_url

from utils.files import UserError

DATASETS = ("MNIST", "FashionMNIST", "KMNIST")  # torchvision's classes
NUM_HELD_OUT = 10_000  # training images that stand in for the test images while settings are chosen

# MD5 sums of the unpacked files, so a repacked archive is accepted. Of KMNIST we know the archives' sums alone.
KNOWN_FILES = {
    "6bbc9ace898e44ae57da46a324031adb": "MNIST/train-images-idx3-ubyte",
    "a25bea736e30d166cdddb491f175f624": "MNIST/train-labels-idx1-ubyte",
    "2646ac647ad5339dbf082846283269ea": "MNIST/t10k-images-idx3-ubyte",
    "27ae3e4e09519cfbb04c329615203637": "MNIST/t10k-labels-idx1-ubyte",
    "f4a8712d7a061bf5bd6d2ca38dc4d50a": "FashionMNIST/train-images-idx3-ubyte",
    "9018921c3c673c538a1fc5bad174d6f9": "FashionMNIST/train-labels-idx1-ubyte",
    "8181f5470baa50b63fa0f6fddb340f0a": "FashionMNIST/t10k-images-idx3-ubyte",
    "15d484375f8d13e6eb1aabb0c3f46965": "FashionMNIST/t10k-labels-idx1-ubyte",
    **{md5: f"KMNIST/{archive[:-3]}" for archive, md5 in datasets.KMNIST.resources},
}


def load_data(data_dir, dataset="MNIST", device="cpu", held_out=False):
    """Load a data set from the folder `data_dir`/`dataset`/raw. Missing archives are downloaded into it.

    Returns ((images, labels), (test_images, test_labels)). Images are uint8, (60000, 1, 28, 28) and
    (10000, 1, 28, 28). Labels are int64, (60000,) and (10000,). With `held_out`, the last 10,000 training
    images take the place of the test images, to choose settings by.
    """
    raw = Path(data_dir) / dataset / "raw"

    def load(split):
        images = _read(raw, dataset, f"{split}-images-idx3-ubyte").unsqueeze(1)
        labels = _read(raw, dataset, f"{split}-labels-idx1-ubyte").long()
        return images.to(device), labels.to(device)

    (images, labels), test_set = load("train"), load("t10k")
    if held_out:
        test_set = images[-NUM_HELD_OUT:], labels[-NUM_HELD_OUT:]
        images, labels = images[:-NUM_HELD_OUT], labels[:-NUM_HELD_OUT]
    return (images, labels), test_set


def _read(raw, dataset, name):
    """Verify a file and return its values as a new tensor."""
    path = _find(raw, name) or _download(raw, dataset, name)
    hint = f"put the original {name}.gz into {raw}, or choose another --dataset or --data-dir"
    try:
        content, found = _unpack(path, path.stat().st_size, path.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    if found != f"{dataset}/{name}":
        raise UserError(f"{path} is not {dataset}/{name} but {found}: {hint}")
    dimensions = content[3]  # after two zeros and 8, which stands for uint8; their sizes follow
    sizes = np.frombuffer(content, ">u4", dimensions, offset=4)
    return torch.tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes))


def _find(raw, name):
    """Return the path of an archive, else of a plain file, else of one in a folder of that name, else None."""
    names = [each + suffix for suffix in (".gz", "") for each in (name, name.replace("-idx", ".idx"))]
    paths = (raw / folder / each for folder in ("", *names) for each in names)
    return next(filter(os.path.isfile, paths), None)


@functools.lru_cache(maxsize=4)  # the files of a data set; a new size or time makes it read again
def _unpack(path, _size, _time):
    """Return a file's content without compression, and which of KNOWN_FILES it is."""
    packed = content = path.read_bytes()
    if packed.startswith(b"\x1f\x8b"):  # some browsers unpack an archive and keep its name
        with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):  # the sums tell the damage
            content = gzip.decompress(packed)
    sums = [hashlib.md5(form, usedforsecurity=False).hexdigest() for form in (content, packed)]
    return content, next((KNOWN_FILES[md5] for md5 in sums if md5 in KNOWN_FILES), "damaged or unknown")


def _download(raw, dataset, name):
    """Download an archive and return its path. Several processes can do so together."""
    source, archive, elsewhere = getattr(datasets, dataset), f"{name}.gz", "or name another --data-dir"
    data_dir = raw.parent.parent.absolute()
    for folder in (data_dir, data_dir / "raw"):
        if folder.parts[-2:] == (dataset, "raw") and _find(folder, name):
            raise UserError(f"the files are in {folder}: use --data-dir {folder.parent.parent}")
    for mirror in source.mirrors:
        try:
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=raw) as folder:
                download_url(mirror + archive, folder, md5=dict(source.resources)[archive])
                os.replace(Path(folder) / archive, raw / archive)
            return raw / archive
        except (OSError, RuntimeError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or error
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{raw} has no room for {archive}: make some, {elsewhere}") from None
    raise UserError(f"{raw} lacks {archive}, and the download failed ({reason}): put it there, {elsewhere}")


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
    if how == "stochastic":
        return torch.bernoulli(x.cpu() if generator else x, generator=generator).to(x.device)
    return {"threshold": (x > 0.5).float(), "none": x}[how]


def distort(images, share):
    """Rotate, scale and shear a random share of uint8 images (N, 1, 28, 28) a little, each differently.

    The angle (radians) and the shear are normal with standard deviation 0.1, the scales log-normal with 0.07.
    The random numbers are drawn on the CPU, so every device gets the same images.
    """
    chosen = torch.rand(len(images), dtype=torch.float32) < share
    normal = torch.randn(4, len(images), dtype=torch.float32)[:, chosen]
    if not chosen.any():
        return images
    (angle, shear), (width, height) = 0.1 * normal[:2], (0.07 * normal[2:]).exp()
    zero = torch.zeros_like(angle)
    row_x = [width * angle.cos(), shear - width * angle.sin(), zero]
    row_y = [height * angle.sin(), height * angle.cos(), zero]
    matrices = torch.stack(row_x + row_y, 1).view(-1, 2, 3).to(images.device)
    images, originals = images.clone(), images[chosen].float()
    grid = F.affine_grid(matrices, originals.shape, align_corners=False)
    images[chosen] = F.grid_sample(originals, grid, align_corners=False).round().to(torch.uint8)
    return images


def shuffled_batches(count, batch_size, seed, epoch):
    """Return the indices of each batch of an epoch, a tuple of tensors; they depend on seed and epoch alone."""
    # The factor keeps two pairs of seed and epoch from sharing an order.
    order = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
    torch.empty((), dtype=torch.int64).random_(generator=order)  # the committed runs drew one number first
    return torch.randperm(count, generator=order).split(batch_size)
