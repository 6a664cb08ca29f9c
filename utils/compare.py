"""Compare runs of one step: `python -m utils.compare RUN [RUN ...]`, folders of which the first is the reference.

It prints what differs in the options, and each metric with its error. Two figures differ if they lie more than two
standard errors of their difference apart. Means over the same images with the same pixels are compared image by image.
Metrics of samples have a standard error each, by the jackknife. Folders of --seeds give means over the seeds, and have
their spread. It draws the losses over one another, and the samples beside them, into compare.png. Without a folder it
lists the runs of each step.
"""

import math
import os
import re
import statistics
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils import files, machine
from utils.cli import exit_code
from utils.files import ROOT, UserError
from utils.options import ArgumentParser, folder
from utils.plotting import WIDTH, new_figure

DATA = ("dataset", "evaluated_on")
SAME_SCALE = (*DATA, "unit", "formula", "binarization", "pixels", "test_images", "samples", "against")
LOSS = {"step1": "d_loss", "step2": "test_nll", "step3": "test_elbo"}  # column of losses.csv
# Words in the names of metrics that are better if they are higher, and if they are lower.
HIGHER = ("score", "precision", "recall", "coverage", "accuracy", "recognised", "parzen", "smallest_share")
LOWER = ("nll", "bits", "bound", "elbo", "frechet", "largest_share", "unsure")


class Compared:
    """A folder of a run, or of the runs of --seeds."""

    def __init__(self, path):
        if not os.path.isdir(path):
            raise UserError(f"there is no folder {path}: name the folder of a run")
        self.path, self.folders = path, sorted(path.glob("seeds/seed_*")) or [path]
        hint = "name the folder of a finished run"
        self.metrics = [files.read_json(each / "metrics.json", hint) for each in self.folders]
        config = files.read_json(self.folders[0] / "config.json", hint)
        try:
            self.step, self.options = config["step"], config["hyperparameters"]
            self.options |= {name: config[name] for name in ("seed", *DATA)}
            speed, seconds = (self.metrics[0][name]["value"] for name in ("speed", "wall_time"))
        except KeyError as error:
            raise UserError(f"config.json or metrics.json in {path} lacks {error}: {hint}") from None
        self.images_seen = round(speed * seconds)

    def values(self, name):
        return [each[name]["value"] for each in self.metrics if name in each]


def per_image(path, name):
    """Return the values `name` in a per_image.npz, means over the draws, and the check sum of the pixels."""
    try:
        with np.load(path) as content:
            return content[name].mean(0).tolist(), str(content["pixels"])
    except (FileNotFoundError, KeyError):
        return None, None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged: train anew or remove it") from None


def paired_difference(folder, name, other_folder, other_name):
    """Return the mean difference of two runs' values per image, and its error. It is None without equal pixels."""
    values, pixels = per_image(folder / "per_image.npz", name)
    others, other_pixels = per_image(other_folder / "per_image.npz", other_name)
    return paired(values, others) if pixels and pixels == other_pixels else None


def paired(values, others):
    """Return the mean difference of two lists of values of the same images, and its standard error."""
    differences = [value - other for value, other in zip(values, others)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def over_seeds(values, others):
    """Return the difference of the means over seeds, and its standard error. One side needs two runs or more.

    The spread is pooled: the variances of both, weighted by their degrees of freedom.
    """
    freedom = len(values) + len(others) - 2
    squares = sum(len(each) * statistics.pvariance(each) for each in (values, others))
    error = math.sqrt(squares / freedom * (1 / len(values) + 1 / len(others)))
    return statistics.fmean(values) - statistics.fmean(others), error


def difference(run, reference, name):
    """Return how a metric differs from the reference's and the error of that, or None where they do not compare."""
    values, others, key = run.values(name), reference.values(name), name.removeprefix("test_")
    several = len(values) + len(others) > 2
    found = None if several else paired_difference(run.folders[0], key, reference.folders[0], key)
    ours, theirs = ({**each.options, **each.metrics[0].get(name, {})} for each in (run, reference))
    if found or any(ours.get(each) != theirs.get(each) for each in SAME_SCALE):
        return found
    if several:
        return over_seeds(values, others)
    if "standard_error" in ours and "standard_error" in theirs:
        return values[0] - others[0], math.hypot(ours["standard_error"], theirs["standard_error"])
    return None


def verdict(run, reference, name):
    """Return whether a metric differs from the reference's, and for better or worse, as text."""
    found = difference(run, reference, name)
    if found is None:
        return "not compared"
    change, error = found
    word = "no difference"
    if abs(change) > 2 * error:
        higher, lower = (any(each in name for each in words) for words in (HIGHER, LOWER))
        word = "differs" if higher == lower else "better" if higher == (change > 0) else "worse"
    return f"{change:+.3g} ± {error:.2g} {word}"


def report(runs):
    """Yield the lines of the comparison; the first of the runs is the reference."""
    reference = runs[0]
    if len({run.images_seen for run in runs}) > 1:
        yield "the runs have unequal lengths, so the comparison is one of lengths, too"
    for number, run in enumerate(runs):
        theirs, minutes = reference.options, statistics.fmean(run.values("wall_time")) / 60
        changed = [f"{key}={value}" for key, value in run.options.items() if theirs.get(key) != value]
        length = f"seeds: {len(run.folders)}, {run.images_seen:,} training images seen, {minutes:.1f} min"
        yield f"[{number}] {run.path} ({length}): {', '.join(changed) or run.step}"
    table = [["metric", *(text for n in range(len(runs)) for text in (f"[{n}]", f"[{n}] - [0]"))]]
    for name, entry in reference.metrics[0].items():
        if name == "test_bits":  # the NLL in other units
            continue
        cells = [f"{name.replace('_', ' ')} ({entry['unit']})"]
        for run in runs:
            cells += [value(run, name), verdict(run, reference, name)] if run.values(name) else ["", ""]
        table.append(cells)
    yield files.aligned([[*row[:2], *row[3:]] for row in table])


def value(run, name):
    """Return a metric as text, with its standard error or, of several seeds, their standard deviation."""
    values, error = run.values(name), run.metrics[0].get(name, {}).get("standard_error")
    error = statistics.stdev(values) if len(values) > 1 else error
    return f"{statistics.fmean(values):.5g}" + (f" ± {error:.2g}" if error else "")


def draw(path, runs):
    """Draw the losses over one another, and the samples beside them."""
    column, ratios = LOSS.get(runs[0].step[:5], "loss"), [2] + [1] * len(runs)
    with new_figure(path, WIDTH, 2.4, 1, len(ratios), vector=False, width_ratios=ratios) as (_, axes):
        for number, (run, axis) in enumerate(zip(runs, axes[1:])):
            losses = {}
            for row in files.read_csv(run.folders[0] / "losses.csv"):
                if row["epoch"]:  # the loss before the training would hide the others
                    losses.setdefault(row["epoch"], []).append(abs(row[column]))
            label = f"[{number}] {run.path.name}"
            axes[0].plot([*losses], [*map(statistics.fmean, losses.values())], marker=".", label=label)
            axis.imshow(Image.open(run.folders[0] / "samples.png"))
            axis.set_title(f"[{number}]")
            axis.axis("off")
        axes[0].set(xlabel="epoch", ylabel=column.replace("_", " "))
        axes[0].xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1))


def main(argv=None):
    """Compare the runs in a list of folders; return the exit code."""
    parser = ArgumentParser(prog="python -m utils.compare", description=__doc__)
    parser.add_argument("runs", type=folder, nargs="*", metavar="RUN", help="folder of a run")
    where = "folder for compare.png (the current one)"
    parser.add_argument("--out-dir", type=folder, default=Path(), help=where)

    def work():
        args = parser.parse_args(argv or [])
        runs = [Compared(path) for path in args.runs]
        steps = sorted({run.step for run in runs})
        if not runs:
            for path in sorted((ROOT / "results").rglob("config.json")):
                shown = not re.search("/(ablation|seeds)|classifier", path.relative_to(ROOT).as_posix())
                if shown and path.with_name("metrics.json").exists():
                    machine.say(os.path.relpath(path.parent))
            return
        if len({step[:5] for step in steps}) > 1:
            raise UserError(f"the runs are of {', '.join(steps)}: name runs of one step")
        machine.say("\n".join(report(runs)))
        try:
            draw(args.out_dir / "compare.png", runs)
        except OSError as error:  # tables of runs to choose by are kept without their losses and samples
            raise UserError(f"there is no figure: a run's file cannot be read ({error})") from None
        machine.say(f"figure in {args.out_dir / 'compare.png'}")

    return exit_code(work, "compare.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
