"""Compare runs of one step: `python -m utils.compare RUN [RUN ...]`, folders of which the first is the reference.

It prints what differs in the options, and each metric with its error and whether it differs from the reference's
(utils/differ.py). Folders of --seeds give means over the seeds. It draws the losses over one another, and the samples
beside them, into compare.png. Without a folder it lists the runs of each step.
"""

import os
import statistics
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils import differ, files, machine
from utils.cli import exit_code
from utils.files import ROOT, UserError
from utils.options import ArgumentParser, folder
from utils.plotting import WIDTH, new_figure

SAME_SCALE = ("unit", "formula", "binarization", "pixels", "test_images", "samples", "against")
CONFIG, LENGTH = (
    {"step", "hyperparameters", "dataset", "evaluated_on", "seed"},
    {"speed", "wall_time"},
)  # needed
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
        if not all(os.path.exists(each / "metrics.json") for each in self.folders):
            raise UserError(f"{path} holds no finished run: it lacks metrics.json")
        self.config = files.read_json(self.folders[0] / "config.json")
        self.metrics = [files.read_json(each / "metrics.json") for each in self.folders]
        for file, keys, content in [
            ("config", CONFIG, self.config),
            *(("metrics", LENGTH, each) for each in self.metrics),
        ]:
            if not keys <= content.keys():
                raise UserError(f"{file}.json in {path} lacks {min(keys - content.keys())}: name another run")
        self.step, self.options = self.config["step"], self.config["hyperparameters"]
        self.data = self.config["dataset"], self.config["evaluated_on"]
        self.images_seen = round(self.values("speed")[0] * self.values("wall_time")[0])

    def values(self, name):
        return [each[name]["value"] for each in self.metrics if name in each]


def per_image(folder, name):
    """Return a run's values `name` of the test images, means over the draws, and the check sum of the pixels."""
    path = folder / "per_image.npz"
    if not path.exists():
        return None, None
    try:
        with np.load(path) as content:
            return (
                (content[name].mean(0).tolist(), str(content["pixels"])) if name in content else (None, None)
            )
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged: train anew or remove it") from None


def difference(run, reference, name):
    """Return how a metric differs from the reference's and the error of that, or None where they do not compare."""
    ours, theirs = (each.metrics[0].get(name, {}) for each in (run, reference))
    several = len(run.folders) + len(reference.folders) > 2
    (values, pixels), (others, other_pixels) = (
        per_image(each.folders[0], name.removeprefix("test_")) for each in (run, reference)
    )
    if pixels and pixels == other_pixels and not several:
        return differ.paired(values, others)
    if any(ours.get(key) != theirs.get(key) for key in SAME_SCALE):
        return None
    if several:
        return differ.over_seeds(run.values(name), reference.values(name))
    if "standard_error" in ours and "standard_error" in theirs:
        errors = ours["standard_error"], theirs["standard_error"]
        return differ.independent(ours["value"], errors[0], theirs["value"], errors[1])
    return None


def verdict(run, reference, name):
    """Return whether a metric differs from the reference's, and for better or worse, as text."""
    found = difference(run, reference, name)
    if found is None:
        return "not compared"
    change, error = found
    word = "no difference"
    if differ.differ(change, error):
        higher, lower = (any(each in name for each in words) for words in (HIGHER, LOWER))
        word = "differs" if higher == lower else "better" if higher == (change > 0) else "worse"
    return f"{change:+.3g} ± {error:.2g} {word}"


def describe(number, run, reference):
    """Return a line about a run: what differs from the reference, its length and its time."""
    ours, theirs = ({**each.options, "seed": each.config["seed"]} for each in (run, reference))
    changed = ", ".join(f"{key}={value}" for key, value in ours.items() if theirs.get(key) != value)
    minutes, seeds = statistics.fmean(run.values("wall_time")) / 60, len(run.folders)
    seeds = "1 seed" if seeds == 1 else f"{seeds} seeds"
    length = f"{seeds}, {run.images_seen:,} training images seen, {minutes:.1f} min"
    other = "" if run.data == reference.data else f"; not compared: {run.data[1]} of {run.data[0]}"
    return f"[{number}] {run.path} ({length}): {changed or run.step if number else 'the reference'}{other}"


def report(runs):
    """Yield the lines of the comparison; the first of the runs is the reference."""
    reference = runs[0]
    if len({run.images_seen for run in runs}) > 1:
        yield "the runs have unequal lengths, so the comparison is one of lengths, too"
    for number, run in enumerate(runs):
        yield describe(number, run, reference)
    compared = {number: run for number, run in enumerate(runs) if run.data == reference.data}
    for name, entry in reference.metrics[0].items():
        if name == "test_bits":  # the NLL in other units
            continue
        cells = []
        for number, run in compared.items():
            if values := run.values(name):
                beside = f" ({verdict(run, reference, name)})" if number else ""
                cells.append(f"[{number}] {statistics.fmean(values):.5g}{beside}")
        yield f"{name.replace('_', ' ')}, {entry['unit']}: {'  '.join(cells)}"
    if any(run.config.get("dry_run") for run in runs):
        yield "the numbers of dry runs mean nothing"


def draw(path, runs):
    """Draw the losses over one another, and the samples beside them."""
    column, ratios = LOSS.get(runs[0].step[:5], "loss"), [2] + [1] * len(runs)
    with new_figure(path, WIDTH, 2.4, 1, len(ratios), vector=False, width_ratios=ratios) as (_, axes):
        for number, (run, axis) in enumerate(zip(runs, axes[1:])):
            values = {}
            for row in files.read_csv(run.folders[0] / "losses.csv"):
                if row["epoch"]:  # the loss before the training would hide the others
                    values.setdefault(row["epoch"], []).append(abs(row[column]))
            label = f"[{number}] {run.path.name}"
            axes[0].plot([*values], [*map(statistics.fmean, values.values())], label=label)
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
        if not args.runs:
            finished = sorted((ROOT / "results").glob("step*/**/metrics.json"))
            for path in (each.parent for each in finished if "ablation" not in each.parts):
                machine.say(path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path)
            return
        runs = [Compared(path) for path in args.runs]
        steps = sorted({run.step for run in runs})
        if len({step[:5] for step in steps}) > 1:
            raise UserError(f"the runs are of {', '.join(steps)}: name runs of one step")
        for line in report(runs):
            machine.say(line)
        files.make_folder(args.out_dir)
        try:
            draw(args.out_dir / "compare.png", runs)
        except OSError as error:  # tables of runs to choose by are kept without their losses and samples
            raise UserError(f"there is no figure: a run's file cannot be read ({error})") from None
        machine.say(f"figure in {args.out_dir / 'compare.png'}")

    return exit_code(work, "compare.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
