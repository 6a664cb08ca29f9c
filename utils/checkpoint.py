"""The folder of a training run: its checkpoint, its config.json, and whether a new run may write there."""

import itertools
import math
import platform

import matplotlib
import numpy
import torch
import torchvision
from torch.optim.lr_scheduler import LRScheduler

from utils import files, machine, parallel
from utils.data import DATASETS
from utils.files import UserError

VERSION = 6  # of the layout of checkpoint.pt
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


def find(step, folder, shorter):
    """Return the checkpoint in a folder, or in the first of the `shorter` runs' that has one, and its path."""
    folders = itertools.chain([folder], shorter)
    path = next((path for each in folders if (path := each / "checkpoint.pt").is_file()), None)
    if path is None:
        raise UserError(f"there is no checkpoint at {folder / 'checkpoint.pt'}: train without --resume")
    content = files.load_tensors(path, (step,), "checkpoint")
    if content.get("version") != VERSION:
        raise UserError(f"{path} is of another version: begin anew with --restart")
    return content, path


def require_free(folder, step, args):
    """Raise UserError if a new run in the folder would overwrite an unfinished run or results of something else."""
    hint = "name another --out-dir, or add --restart to replace it"
    names = ("config.json", "metrics.json", "losses.csv", "model.pt")
    if args.out_dir and any((folder / name).exists() for name in names):
        found = files.read_json(folder / "config.json", hint).get("step")
        if found != step:
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


def restore(modules, content, identity, path):
    """Load the states of a checkpoint into networks, optimisers and schedules, by name.

    Raises UserError unless it belongs to a run of the same `identity`. Without a schedule, more epochs are allowed.
    """
    theirs, hint = content["identity"], "resume with the same flags, or begin anew with --restart"
    if any(isinstance(each, LRScheduler) for each in modules.values()):
        hint += "; the learning rates follow the number of epochs"
    elif theirs["num_epochs"] < identity["num_epochs"]:
        theirs = {**theirs, "num_epochs": identity["num_epochs"]}
    for key in {**theirs, **identity}:
        if theirs.get(key) != identity.get(key):
            difference = f"{key} {theirs.get(key)}, not {identity.get(key)}"
            raise UserError(f"{path} was trained with {difference}: {hint}")
    for name, each in modules.items():
        files.load_state(each, content["modules"].get(name, {}), path, "begin anew with --restart")


def require_finite(values, where):
    """Raise UserError if a number of the dict `values` is not finite; `where` says in which batch."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} became {value} {where}: {KEPT}")


def headline(names, metrics, run):
    """Yield what a run prints at its end: its named metrics, beside those of the reported run where they compare."""
    alike = run.args.dataset == DATASETS[0] and not run.args.dry_run
    reported = files.metrics_of(files.ROOT / "results" / run.step) if alike else {}
    for name in filter(metrics.get, names):
        ours, theirs = metrics[name], reported.get(name, {})
        # Other pixels are on another scale.
        comparable = all(theirs.get(key) == ours.get(key) for key in ("unit", "binarization", "pixels"))
        beside = f"reported {theirs['value']:.4g}; " if comparable else ""
        yield f"{name.replace('_', ' ')}: {ours['value']:.4g} ({beside}{ours['unit']})"
    if run.epochs_done < 1 and not run.args.dry_run:
        yield f"the model is hardly trained: it saw {run.images_seen} images, less than an epoch"
