"""The folder of a training run: its checkpoint, its config.json, and whether a new run may write there."""

import math
import platform
from pathlib import Path

import matplotlib
import numpy
import torch
import torchvision

from utils import files, machine, parallel
from utils.data import DATASETS
from utils.files import UserError

VERSION = 7  # of the layout of checkpoint.pt
KEPT = "the checkpoint before it is kept; lower the learning rate or choose another --seed"


def means_of(batches):
    """Return the mean of each loss over the images of the batches, pairs of (losses by name, number of images).

    A loss of None is left out; the mean is None if no batch has the loss.
    """
    means = {}
    for name in dict.fromkeys(name for losses, _ in batches for name in losses):
        known = [(losses[name], images) for losses, images in batches if losses.get(name) is not None]
        total = sum(value * images for value, images in known)
        means[name] = total / sum(images for _, images in known) if known else None
    return means


def load(run, shorter):
    """Return the checkpoint that a run goes on from, and its path: its own, or that of the first of `shorter` runs.

    Raises UserError unless it belongs to a run of the same `identity`. Without a schedule, more epochs are allowed.
    """
    paths = [each / "checkpoint.pt" for each in (run.folder, *shorter)]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise UserError(f"there is no checkpoint at {paths[0]}: train without --resume")
    content = files.load_tensors(path, (run.step,), "checkpoint")
    if content.get("version") != VERSION:
        raise UserError(f"{path} is of another version: begin anew with --restart")
    ours, theirs = run.identity, content["identity"]
    hint = "resume with the same flags, or begin anew with --restart"
    if any("last_epoch" in state for state in content["modules"].values()):
        hint += "; the learning rates follow the number of epochs"
    elif theirs["num_epochs"] < ours["num_epochs"]:
        theirs = {**theirs, "num_epochs": ours["num_epochs"]}
    for key in {**theirs, **ours}:
        if theirs.get(key) != ours.get(key):
            difference = f"{key} {theirs.get(key)}, not {ours.get(key)}"
            raise UserError(f"{path} was trained with {difference}: {hint}")
    return content, path


def require_free(run):
    """Raise UserError if a new run would overwrite an unfinished run, or the results of something else."""
    folder, args = run.folder, run.args
    hint = "name another --out-dir, or add --restart to replace it"
    names = ("config.json", "metrics.json", "losses.csv", "model.pt")
    if args.out_dir and any((folder / name).exists() for name in names):
        found = files.read_json(folder / "config.json", hint).get("step")
        if found != run.step:
            raise UserError(f"{folder} holds results of {found}: {hint}")
    own_place = args.dry_run and not args.out_dir  # where nothing is lost
    if (folder / "checkpoint.pt").exists() and not own_place and not is_finished(folder):
        raise UserError(f"{folder} holds an unfinished run: --resume goes on, --restart begins anew over it")


def is_finished(folder):
    """Tell whether a run has written its metrics, and its checkpoint, where there is one, is of a finished run."""
    path = folder / "checkpoint.pt"
    finished = not path.exists() or files.load_tensors(path, None, "checkpoint").get("finished", False)
    return finished and (folder / "metrics.json").exists()


def describe(run):
    """Return the content of config.json: what a run is, and where it is made."""
    args = run.args
    packages = {each.__name__: each.__version__ for each in (torch, torchvision, matplotlib, numpy)}
    return {
        "step": run.step,
        "variant": args.variant or "default",
        **{name: getattr(args, name) for name in ("dry_run", "dataset", "seed", "minutes", "command")},
        "evaluated_on": "last 10,000 training images" if args.held_out else "test images",
        "processes": parallel.num_processes(),
        "device": str(run.device),
        "hardware": machine.hardware(run.device),
        "bfloat16_units": machine.has_bfloat16_units(run.device),
        "hyperparameters": run.options,
        "versions": {"python": platform.python_version(), **packages},
    }


def require_finite(values, where):
    """Raise UserError if a number of the dict `values` is not finite; `where` says in which batch."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} became {value} {where}: {KEPT}")


def headline(names, metrics, run):
    """Yield what a run prints at its end: its named metrics, beside those of the reported run where they compare."""
    alike = run.args.dataset == DATASETS[0] and not run.args.dry_run
    reported = files.read_if_there(files.ROOT / "results" / run.step / "metrics.json") if alike else {}
    for name in filter(metrics.get, names):
        ours, theirs = metrics[name], reported.get(name, {})
        # Other pixels are on another scale.
        comparable = all(theirs.get(key) == ours.get(key) for key in ("unit", "binarization", "pixels"))
        beside = f"reported {theirs['value']:.4g}; " if comparable else ""
        yield f"{name.replace('_', ' ')}: {ours['value']:.4g} ({beside}{ours['unit']})"
    if run.epochs_done < 1 and not run.args.dry_run:
        yield f"the model is hardly trained: it saw {run.images_seen} images, less than an epoch"
