"""MNIST as one tensor, verified, and batches of it."""

import os
import shutil
import tempfile
from pathlib import Path
from urllib.error import URLError

import torch
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from utils.runs import UserError

# MD5 sums of the unpacked files; those of the archives are torchvision's, `MNIST.resources`.
UNPACKED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


NUM_HELD_OUT = 10_000


def load_mnist(data_dir, device="cpu", held_out=False):
    """Training and test set: (images, labels), (test_images, test_labels).

    Images are uint8, (60000, 1, 28, 28) and (10000, 1, 28, 28), labels int64, all on `device`. The archives
    below `data_dir`/MNIST/raw are unpacked first where that has not been done, and downloaded where they
    are missing.

    Args:
        held_out: give the last 10,000 training images in place of the test images, and the others to train on.
            What is chosen by looking at results is chosen by these; the test images are for reporting.

    Raises:
        UserError: a file is missing, truncated or altered, or the folder cannot be used.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    missing = [name for name in UNPACKED_MD5 if not os.path.exists(raw / name)]
    if missing:
        _unpack(raw, missing)
    for name, md5 in UNPACKED_MD5.items():
        if not _verified(raw / name, md5):
            raise UserError(f"{raw / name} is damaged: delete it, and it is unpacked anew from {name}.gz")

    def load(name):
        images = read_image_file(str(raw / f"{name}-images-idx3-ubyte")).unsqueeze(1)
        labels = read_label_file(str(raw / f"{name}-labels-idx1-ubyte"))
        return images.to(device), labels.to(device)

    images, labels = load("train")
    if held_out:
        return (images[:-NUM_HELD_OUT], labels[:-NUM_HELD_OUT]), (
            images[-NUM_HELD_OUT:],
            labels[-NUM_HELD_OUT:],
        )
    return (images, labels), load("t10k")


def batches(images, labels, batch_size, generator=None):
    """DataLoader of (images, labels) batches; shuffled by `generator`, in order without one.

    The sampler hands out whole lists of indices, so that a batch is one indexing operation and no image is
    touched by itself. The last batch is short where `batch_size` does not divide the number of images.
    """
    dataset = TensorDataset(images, labels)
    order = RandomSampler(dataset, generator=generator) if generator else SequentialSampler(dataset)
    sampler = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(dataset, sampler=sampler, batch_size=None, generator=generator)


def to_unit(images):
    """uint8 in 0..255 -> float in [0, 1]."""
    return images.float() / 255


def to_symmetric(images):
    """uint8 in 0..255 -> float in [-1, 1], the range of tanh."""
    return to_unit(images) * 2 - 1


def binarize(images, how, generator=None):
    """uint8 in 0..255 -> float in {0, 1}, or in [0, 1] where nothing is to be done.

    Args:
        how: 'threshold' for x > 0.5; 'stochastic' for a fresh Bernoulli(x) draw at each call, with the
            random numbers of `generator` (the global ones without it); 'none' for the grey pixels. Anything else
            raises ValueError.
    """
    x = to_unit(images)
    if how == "none":
        return x
    if how == "threshold":
        return (x > 0.5).float()
    if how == "stochastic":
        return torch.bernoulli(x, generator=generator)
    raise ValueError(f"how is 'threshold', 'stochastic' or 'none', not {how!r}")


def distort(images, share):
    """Rotate, scale and shear a random share of uint8 images (N, 1, 28, 28) a little, each differently.

    The angle is normal with standard deviation 0.1 (6 degrees), the shear likewise; the scales are log-normal
    with 0.07. The random numbers are drawn on the CPU, so that every device gets the same.
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
    originals = images[chosen].float()
    grid = F.affine_grid(
        torch.stack([row_x, row_y], 1).to(images.device), originals.shape, align_corners=False
    )
    images = images.clone()
    images[chosen] = F.grid_sample(originals, grid, align_corners=False).round().to(torch.uint8)
    return images


def _verified(path, md5):
    """Whether the file has this sum; an unreadable one is reported, not raised."""
    try:
        return check_integrity(path, md5)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _unpack(raw, missing):
    """Put the missing unpacked files into `raw`, each at one stroke.

    Every process unpacks into a temporary folder of its own and moves the finished files into place, so any
    number of them may start together and none ever reads a file that another is still writing.
    """
    try:
        raw.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".unpack-", dir=raw)
    except OSError as error:
        raise UserError(
            f"{raw} lacks {', '.join(missing)} and cannot be written ({error.strerror}): "
            "unpack the data there or name another folder with --data-dir"
        ) from None
    with temporary as folder:
        for archive, md5 in MNIST.resources:
            name = archive.removesuffix(".gz")
            if name not in missing:
                continue
            try:
                _extract(raw / archive, md5, folder)
                if not os.path.exists(raw / name):
                    os.replace(Path(folder) / name, raw / name)
            except OSError as error:
                # Where another process was quicker, some systems refuse to replace its file.
                if not _verified(raw / name, UNPACKED_MD5[name]):
                    raise UserError(f"{raw / name} cannot be written: {error.strerror or error}") from None


def _extract(archive, md5, folder):
    """Unpack an archive, or download it where it is missing, into the folder."""
    if os.path.exists(archive):
        if not _verified(archive, md5):
            raise UserError(f"{archive} is damaged (its MD5 is not {md5}): delete it to have it downloaded")
        shutil.copyfile(archive, Path(folder) / archive.name)
        mirrors = [""]
    else:
        mirrors = MNIST.mirrors
    for mirror in mirrors:
        try:
            return download_and_extract_archive(mirror + archive.name, folder, filename=archive.name, md5=md5)
        except (RuntimeError, URLError, ConnectionError, TimeoutError):
            continue
    raise UserError(
        f"{archive.parent} lacks {archive.name}, and downloading it failed: put it there or name another folder "
        "with --data-dir"
    )
