"""What a checkpoint holds beside the training's own state, when a run may go on from one, and whether a run is finished."""

import json
import math

import torch

from utils.files import UserError

VERSION = 2  # of the layout of checkpoint.pt
KEPT = "the checkpoint before it is kept; lower the learning rate or choose another --seed"


def random_states(device):
    """Return the states of the global random generators of the CPU and of the device, by name."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_states(states, device):
    """Set the global random generators. A device that the states lack goes on with other draws."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type].cpu())


def require_same(theirs, ours, path, has_schedule):
    """Check that a run with the settings `ours` may resume the checkpoint of a run with `theirs`.

    More epochs are allowed unless the training has a schedule, whose learning rates depend on their number.

    Raises:
        UserError: it may not; the message names the setting.
    """
    different = [key for key in ours if theirs.get(key) != ours[key]]
    if different == ["num_epochs"]:
        if has_schedule:
            raise UserError(
                f"{path} was trained for {theirs['num_epochs']} epochs, and its learning rate falls to zero at "
                "their end, so it cannot be lengthened: train anew with --epochs"
            )
        if ours["num_epochs"] > theirs["num_epochs"]:
            return
    if different:
        key = different[0]
        raise UserError(
            f"{path} was trained with {key} {theirs.get(key)}, not {ours[key]}: resume with the same flags, or begin "
            "anew with --restart"
        )


def require_finite(values, where):
    """Raise UserError if a number in the dict `values` is not finite; `where` in the training goes into the message."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name} became {value} {where}: {KEPT}")


def is_finished(folder):
    """Tell whether a run has written its metrics, and no later checkpoint is there."""
    metrics, checkpoint = folder / "metrics.json", folder / "checkpoint.pt"
    if not metrics.exists():
        return False
    return not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > metrics.stat().st_mtime_ns)


def read_metrics(folder):
    """Return the content of a run's metrics.json, empty without the file."""
    try:
        return json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return {}
