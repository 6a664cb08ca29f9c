"""Checks of a run and its checkpoint."""

import json
import math

from utils import machine, parallel
from utils.files import UserError

VERSION = 3  # of the layout of checkpoint.pt
KEPT = "the checkpoint before it is kept; lower the learning rate or choose another --seed"


def description(run):
    """Return the content of config.json: what a run is, and where it is made."""
    return {
        "step": run.step,
        "variant": run.args.variant or "default",
        "dry_run": run.args.dry_run,
        "evaluated_on": "last 10,000 training images" if run.args.held_out else "test images",
        "dataset": run.args.dataset,
        "seed": run.args.seed,
        "minutes": run.args.minutes,
        "processes": parallel.num_processes(),
        "device": str(run.device),
        "hardware": machine.hardware(run.device),
        "bfloat16_units": machine.has_bfloat16_units(run.device),
        "command": run.args.command,
        "hyperparameters": run.options,
        "versions": machine.versions(),
    }


def require_same(theirs, ours, path, has_schedule):
    """Raise UserError unless a run with the settings `ours` may resume the checkpoint of a run with `theirs`.

    More epochs are allowed unless the training has a schedule, whose learning rates depend on their number.
    """
    different = [key for key in ours if theirs.get(key) != ours[key]]
    if different == ["num_epochs"] and has_schedule:
        why = "its learning rates follow that number: train anew with --epochs"
        raise UserError(f"{path} was trained for {theirs['num_epochs']} epochs, and {why}")
    if different == ["num_epochs"] and ours["num_epochs"] > theirs["num_epochs"]:
        return
    for key in different:
        hint = "resume with the same flags, or begin anew with --restart"
        raise UserError(f"{path} was trained with {key} {theirs.get(key)}, not {ours[key]}: {hint}")


def require_finite(values, where):
    """Raise UserError if a number of the dict `values` is not finite; `where` says in which batch."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name} became {value} {where}: {KEPT}")


def is_finished(folder):
    """Tell whether a run has written its metrics, and no later checkpoint is there."""
    metrics, checkpoint = folder / "metrics.json", folder / "checkpoint.pt"
    if not (metrics.exists() and checkpoint.exists()):
        return metrics.exists()
    return checkpoint.stat().st_mtime_ns <= metrics.stat().st_mtime_ns


def headline(names, metrics, reported):
    """Yield a line for each named metric, with its value in the folder `reported` where they compare."""
    try:
        theirs = json.loads((reported / "metrics.json").read_text()) if reported else {}
    except (OSError, ValueError):
        theirs = {}
    for name in filter(metrics.get, names):
        ours, other = metrics[name], theirs.get(name, {})
        # Other pixels are on another scale.
        compares = all(other.get(key) == ours.get(key) for key in ("unit", "binarization", "pixels"))
        beside = f"reported {other['value']:.4g}; " if compares else ""
        yield f"{name.replace('_', ' ')}: {ours['value']:.4g} ({beside}{ours['unit']})"
