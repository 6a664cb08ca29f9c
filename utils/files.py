"""Files: written whole or not at all, locked while a run uses their folder, loaded without running code."""

import contextlib
import csv
import errno
import io
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # every other system
    msvcrt = None

ROOT = Path(__file__).resolve().parent.parent
# What zipfile, pickle and torch raise for a damaged file, with their subclasses.
DAMAGED = (zipfile.BadZipFile, pickle.UnpicklingError, zlib.error, ArithmeticError, AttributeError, EOFError,
           LookupError, RuntimeError, TypeError, ValueError)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend. It is printed in one line, and the exit code is 2."""


@contextlib.contextmanager
def _writing(problem):
    """Turn an OSError into a UserError that names the problem."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem} ({error.strerror}): name another --out-dir") from None


def make_folder(folder):
    """Make the folder and its parents where they are missing.

    Raises:
        UserError: the folder cannot be made.
    """
    with _writing(f"the folder {folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomically(path, content):
    """Write bytes by way of a temporary file, so that `path` is always the whole old or the whole new file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _writing(f"{path} cannot be written"):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # the file was renamed, or the disk is read-only
            temporary.unlink()


def write_json(path, content):
    """Write plain values as indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path, table):
    """Write a dict of columns. None leaves a cell empty; floats have six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values()):
        writer.writerow(
            "" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in row
        )
    write_atomically(path, text.getvalue().encode())


def read_csv(path):
    """Read the rows of a file of `write_csv` as dicts. Numbers become floats, empty cells None."""

    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def metric(value, unit, formula, **more):
    """Make an entry of metrics.json: the number, its unit, its formula and the protocol."""
    return {"value": value, "unit": unit, "formula": formula, **more}


def lock(folder):
    """Lock the folder for this process and return the open lock file. Closing the file ends the lock.

    Raises:
        UserError: another run holds the lock, or the folder cannot be written into.
    """
    with _writing(f"{folder} cannot be written into"):
        file = open(folder / ".lock", "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        # Other errors come from file systems without locks, such as some network drives.
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            file.close()
            raise UserError(
                f"another run writes into {folder}: wait for it, or name another --out-dir"
            ) from None
    return file


def save_tensors(path, content):
    """Write tensors and plain values with `torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_tensors(path, steps, kind, device="cpu"):
    """Load a file of `save_tensors`. Only tensors and plain values are read, so no code can run.

    Args:
        steps: names of the steps whose files are accepted.
        kind: "model" or "checkpoint", for messages.

    Raises:
        UserError: the file is missing, damaged, of another kind or of another step.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load checks no sums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {kind} at {path}: train first") from None
    except OSError as error:
        raise UserError(f"the {kind} {path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"there is too little memory to load {path}") from None
    except DAMAGED:
        raise UserError(f"{path} is damaged or not a {kind}: train anew") from None
    found = content.get("step") if isinstance(content, dict) else None
    if found not in steps:
        raise UserError(
            f"{path} is not a {kind} of {' or '.join(steps)} but of {found or 'something else'}: name another file"
        )
    return content


def save_model(path, step, network, arguments):
    """Write model.pt: the weights, and the arguments that rebuild the network."""
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    save_tensors(path, {"step": step, "network": arguments, "weights": weights})


def load_network(path, steps, build, device="cpu"):
    """Rebuild the network of a model.pt with `build(**arguments)`; return it on `device`, in eval mode.

    The global random state stays as it is.
    """
    content = load_tensors(path, steps, "model")
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
            network = build(**content["network"])
        network.load_state_dict(content["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(f"{path} does not hold the weights of the network it describes: train anew") from None
    if not all_finite(network.state_dict()):
        raise UserError(f"{path} holds weights that are not finite: train anew")
    try:
        return network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or too little memory on it
        reason = str(error).splitlines()[0]
        raise UserError(f"the network cannot be moved to {device}: {reason}") from None


def all_finite(value):
    """Tell whether every number in the tensors of a nested dict or list is finite."""
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(all_finite, parts))
