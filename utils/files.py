"""Files: written whole or not at all, locked while a run uses their folder, loaded without running code."""

import contextlib
import csv
import io
import json
import math
import os
import zipfile
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
# Last parts of the names of buffers. A file and a network need not have the same ones.
BUFFERS = ("mask", "running_mean", "running_var", "num_batches_tracked")


class UserError(Exception):
    """A flag, a file or the machine is at fault. It is printed in one line, and the exit code is 2."""


@contextlib.contextmanager
def _writing(path):
    """Turn an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another --out-dir") from None


def write_atomically(path, content):
    """Write bytes through a temporary file, so that `path` is always the whole old or the whole new file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
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


def read_json(path, hint="train anew", kind=dict):
    """Read a JSON file whose content is of a kind; raise UserError, which ends in the hint, if that fails."""
    try:
        return kind(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {hint}") from None


def read_if_there(path):
    """Read a JSON object as a dict, which is empty if there is no file."""
    return read_json(path) if path.exists() else {}


def csv_text(rows):
    """Write dicts as lines of CSV, below their header. None leaves a cell empty; floats have six digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row.values())
    return text.getvalue()


def aligned(rows):
    """Write rows of texts as lines with columns that stand below one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def read_columns(text):
    """Read the text of a CSV file as lists by the name of the column: numbers as floats, empty cells as None."""

    def read(cell):
        try:
            return float(cell) if cell else None
        except ValueError:  # a word
            return cell

    return {name: [read(cell) for cell in cells] for name, *cells in zip(*csv.reader(text.splitlines()))}


def read_csv(path):
    """Read a CSV file as dicts, one for each row."""
    columns = read_columns(path.read_text())
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


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
    """Make and lock the folder, or raise UserError. Return the open lock file, whose closing ends the lock."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another run writes into {folder}: wait for it, or name another --out-dir") from None
    except OSError:  # a file system without locks, such as some network drives
        pass
    return file


def save_tensors(path, content):
    """Write tensors and plain values with `torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_tensors(path, steps, kind):
    """Load a file of `save_tensors`. Only tensors and plain values are read, so no code can run.

    Files of other steps than `steps` are refused, unless it is None. Messages name the `kind`, "model" or "checkpoint".
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not compare the check sums
                raise zipfile.BadZipFile
        content = {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:  # a damaged file raises whatever it leads zipfile, pickle and torch to
        if lacks_memory(error):
            raise
        reason = getattr(error, "strerror", None) or f"it is damaged or not a {kind}"
        raise UserError(f"there is no {kind} to read at {path} ({reason}): train first") from None
    found = content.get("step", "something else")
    if steps and found not in steps:
        raise UserError(f"{path} is not a {kind} of {' or '.join(steps)} but of {found}: name another file")
    return content


def save_model(path, step, network, arguments, options):
    """Write model.pt: the weights, the arguments that rebuild the network, and the options of its training."""
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    save_tensors(path, {"step": step, "network": arguments, "options": options, "weights": weights})


def load_network(path, steps, build, device="cpu"):
    """Rebuild the network of a model.pt with `build(**arguments)`; return it on `device`, in eval mode."""
    content = load_tensors(path, steps, "model")
    if not {"network", "weights"} <= content.keys():
        raise UserError(f"{path} lacks its network or its weights: train anew or name another --model")
    # The initial weights are drawn, then replaced. The global random state stays as it is.
    with torch.random.fork_rng(devices=[]):
        network = build(**content["network"])
    load_state(network, content["weights"], path, "train anew or name another --model")
    return network.to(device).eval()


def load_state(module, state, path, hint):
    """Load the state of a network, an optimiser or a schedule; raise UserError with the hint if it does not fit.

    Buffers may differ: a mask follows from the arguments of its layer, and one file has it, another one not.
    """
    if not all_finite(state):
        raise UserError(f"{path} holds numbers that are not finite: {hint}")
    misfits = []
    try:
        if isinstance(module, torch.nn.Module):
            missing, unexpected = module.load_state_dict(state, strict=False)
            for what, names in (("missing", missing), ("unexpected", unexpected)):
                misfits += [f"{what} {name}" for name in names if name.rpartition(".")[2] not in BUFFERS]
        else:
            module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        if lacks_memory(error):
            raise
        misfits = [str(error).splitlines()[-1].strip()]
    if misfits:
        whose, reason = f"{type(module).__name__} in {type(module).__module__}", ", ".join(misfits[:2])
        raise UserError(f"{path} does not fit the {whose} ({reason}): {hint}")


def options_of(path):
    """Return the options with which the network of a model.pt was trained, or {} if neither it nor config.json says."""
    found = load_tensors(path, None, "model").get("options")
    return found or read_if_there(path.with_name("config.json")).get("hyperparameters", {})


def lacks_memory(error):
    """Tell whether an exception means that a tensor did not fit into memory."""
    words = ("DefaultCPUAllocator", "Storage size calculation overflowed")  # of torch, on the CPU
    of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return of_memory or any(each in str(error) for each in words)


def all_finite(value):
    """Tell whether every number in the tensors of a nested dict or list is finite."""
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(all_finite, parts))
