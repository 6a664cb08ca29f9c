"""Files: written whole or not at all, locked while a run uses their folder, loaded without running code."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import torch

fcntl = msvcrt = None  # Windows has the second, other systems have the first
try:
    import fcntl
except ImportError:
    import msvcrt

ROOT = Path(__file__).resolve().parent.parent
# The exceptions of zipfile, pickle and torch for a damaged file.
DAMAGED = (zipfile.BadZipFile, pickle.UnpicklingError, zlib.error, ArithmeticError, AttributeError, EOFError,
           LookupError, MemoryError, RuntimeError, TypeError, ValueError)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend. It is printed in one line, and the exit code is 2."""


@contextlib.contextmanager
def _writing(path):
    """Turn an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another --out-dir") from None


def make_folder(folder):
    """Make the folder and its parents where they are missing; raise UserError if that fails."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomically(path, content):
    """Write bytes through a temporary file, so that `path` is always the whole old or the whole new file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _writing(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
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
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
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
    """Make an entry of metrics.json: the number, its unit, its formula and the protocol.

    A tensor of several values stands for their mean, and the entry then has the standard error of that mean.
    """
    if torch.is_tensor(value):
        values = value.cpu().double()
        value = values.mean().item()
        if len(values) > 1:
            more = {"standard_error": values.std().item() / math.sqrt(len(values)), **more}
    return {"value": value, "unit": unit, "formula": formula, **more}


def lock(folder):
    """Lock the folder or raise UserError. Return the open lock file, whose closing ends the lock."""
    with _writing(folder):
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
            hint = "wait for it, or name another --out-dir"
            raise UserError(f"another run writes into {folder}: {hint}") from None
    return file


def save_tensors(path, content):
    """Write tensors and plain values with `torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def _loading(path, kind):
    """Turn what a missing, unreadable or damaged file raises into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"there is no {kind} at {path}: train first") from None
    except OSError as error:
        raise UserError(f"the {kind} {path} cannot be read: {error.strerror or error}") from None
    except DAMAGED as error:
        if lacks_memory(error):
            raise UserError(f"there is too little memory to load {path}") from None
        raise UserError(f"{path} is damaged or not a {kind}: train anew") from None


def load_tensors(path, steps, kind):
    """Load a file of `save_tensors`. Only tensors and plain values are read, so no code can run.

    Files of other steps than `steps` are refused. Messages name the `kind`, "model" or "checkpoint".
    """
    with _loading(path, kind):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not compare the check sums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    found = content.get("step") if isinstance(content, dict) else None
    if found not in steps:
        wanted, found = " or ".join(steps), found or "something else"
        raise UserError(f"{path} is not a {kind} of {wanted} but of {found}: name another file")
    return content


def save_model(path, step, network, arguments):
    """Write model.pt: the weights, and the arguments that rebuild the network."""
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    save_tensors(path, {"step": step, "network": arguments, "weights": weights})


def load_network(path, steps, build, device="cpu"):
    """Rebuild the network of a model.pt with `build(**arguments)`; return it on `device`, in eval mode."""
    content = load_tensors(path, steps, "model")
    # The initial weights are drawn, then replaced. The global random state stays as it is.
    with _loading(path, "model of this network"), torch.random.fork_rng(devices=[]):
        network = build(**content["network"])
        network.load_state_dict(content["weights"])
    if not all_finite(network.state_dict()):
        raise UserError(f"{path} holds weights that are not finite: train anew")
    try:
        return network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or too little memory on it
        raise UserError(f"the network cannot be moved to {device}: {str(error).splitlines()[0]}") from None


def lacks_memory(error):
    """Tell whether an exception means that a tensor did not fit into memory."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


def all_finite(value):
    """Tell whether every number in the tensors of a nested dict or list is finite."""
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(all_finite, parts))
