"""Compare runs of one step: `python -m utils.compare RUN [RUN ...]`, folders of which the first is the reference.

It prints what differs in the options, and each metric with its error and whether it differs from the reference's
(utils/differ.py). Folders of --seeds give means over the seeds. It draws the losses over one another and the samples
side by side into compare.png. Without a folder it lists the runs of each step.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from utils import differ, files, machine
from utils.cli import exit_code
from utils.figures import WIDTH, new_figure
from utils.files import ROOT, UserError
from utils.options import ArgumentParser, folder

# Values per image of the metric, by its name in per_image.npz.
PER_IMAGE = {"test_nll": "nll", "mixture_nll": "mixture_nll", "test_bound": "bound"}
SAME_SCALE = ("unit", "formula", "binarization", "pixels", "test_images", "samples", "against")
LOSS = {"step1": "d_loss", "step2": "test_nll", "step3": "test_elbo"}  # column of losses.csv
# Words in the names of metrics that are better if they are higher, and if they are lower.
HIGHER = ("score", "precision", "recall", "coverage", "accuracy", "recognised", "parzen", "smallest_share")
LOWER = ("nll", "bits", "bound", "elbo", "frechet", "largest_share", "unsure")


class Compared:
    """A folder of a run, or of the runs of --seeds."""

    def __init__(self, path):
        self.path = path
        self.folders = sorted(path.glob("seeds/seed_*")) or [path]
        if not all((each / "metrics.json").exists() for each in self.folders):
            raise UserError(f"{path} holds no finished run: it lacks metrics.json")
        self.config = files.read_json(self.folders[0] / "config.json")
        self.metrics = [files.read_json(each / "metrics.json") for each in self.folders]
        self.step, self.options = self.config["step"], self.config["hyperparameters"]
        self.data = self.config["dataset"], self.config["evaluated_on"]

    @property
    def images_seen(self):
        first = self.metrics[0]
        return round(first["speed"]["value"] * first["wall_time"]["value"])

    def values(self, name):
        return [each[name]["value"] for each in self.metrics if name in each]


def per_image(folder, name):
    """Return a run's values of the test images, means over the draws of pixels, and the check sum of the pixels."""
    path = folder / "per_image.npz"
    if not path.exists():
        return None, None
    with np.load(path) as content:
        return (content[name].mean(0).tolist(), str(content["pixels"])) if name in content else (None, None)


def difference(run, reference, name):
    """Return how a metric differs from the reference's and the error of that, or None where they do not compare."""
    ours, theirs = run.metrics[0].get(name), reference.metrics[0].get(name)
    if len(run.folders) == len(reference.folders) == 1:
        sides = [per_image(each.folders[0], PER_IMAGE.get(name)) for each in (run, reference)]
        (values, pixels), (others, other_pixels) = sides
        if pixels and pixels == other_pixels:
            return differ.paired(values, others)
    if not (ours and theirs) or any(ours.get(key) != theirs.get(key) for key in SAME_SCALE):
        return None
    if len(run.folders) + len(reference.folders) > 2:
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
    word = "no difference"
    if differ.differ(*found):
        up = any(each in name for each in HIGHER) - any(each in name for each in LOWER)
        word = {0: "differs", 1: "better", -1: "worse"}[up * (1 if found[0] > 0 else -1)]
    return f"{found[0]:+.3g} ± {found[1]:.2g} {word}"


def describe(number, run, reference):
    """Return a line about a run: what differs from the reference, its length and its time."""
    ours, theirs = ({**each.options, "seed": each.config["seed"]} for each in (run, reference))
    changed = ", ".join(f"{key}={value}" for key, value in ours.items() if theirs.get(key) != value)
    seconds, seeds = statistics.fmean(run.values("wall_time")), len(run.folders)
    length = (
        f"{seeds} seed{'s' * (seeds > 1)}, {run.images_seen:,} training images seen, {seconds / 60:.1f} min"
    )
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
        cells = []
        for number, run in compared.items():
            if values := run.values(name):
                beside = f" ({verdict(run, reference, name)})" if number else ""
                cells.append(f"[{number}] {statistics.fmean(values):.5g}{beside}")
        yield f"{name.replace('_', ' ')}, {entry['unit']}: {'  '.join(cells)}"


def draw(path, runs):
    """Draw the losses over one another and the samples side by side."""
    column = LOSS.get(runs[0].step[:5], "loss")
    with new_figure(path, WIDTH, 4.6, 2, len(runs), vector=False, squeeze=False) as (figure, axes):
        grid = axes[0, 0].get_gridspec()
        for axis in axes[0]:
            axis.remove()
        top = figure.add_subplot(grid[0, :])
        for number, (run, axis) in enumerate(zip(runs, axes[1])):
            rows = [row for row in files.read_csv(run.folders[0] / "losses.csv") if row["epoch"]]
            means = {}
            for row in rows:
                means.setdefault(row["epoch"], []).append(abs(row[column]))
            top.plot(
                [*means],
                [sum(each) / len(each) for each in means.values()],
                label=f"[{number}] {run.path.name}",
            )
            axis.imshow(Image.open(run.folders[0] / "samples.png"))
            axis.set_title(f"[{number}]")
            axis.axis("off")
        top.set(xlabel="epoch", ylabel=column.replace("_", " "))
        top.legend()


def list_runs():
    """Print the folders of finished runs, for the command line."""
    for path in sorted((ROOT / "results").glob("step*/**/metrics.json")):
        if "ablation" not in path.parts:
            machine.say(path.parent.relative_to(Path.cwd()) if Path.cwd() in path.parents else path.parent)


def main(argv=None):
    """Compare the runs in a list of folders; return the exit code."""
    parser = ArgumentParser(prog="python -m utils.compare", description=__doc__)
    parser.add_argument("runs", type=folder, nargs="*", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out-dir", type=folder, default=Path(), help="folder for compare.png (the current one)"
    )

    def work():
        args = parser.parse_args(argv or [])
        if not args.runs:
            return list_runs()
        runs = [Compared(path) for path in args.runs]
        if len({run.step[:5] for run in runs}) > 1:
            raise UserError(
                f"the runs are of {', '.join(sorted({run.step for run in runs}))}: name runs of one step"
            )
        for line in report(runs):
            machine.say(line)
        files.make_folder(args.out_dir)
        draw(args.out_dir / "compare.png", runs)
        machine.say(f"figure in {args.out_dir / 'compare.png'}")

    return exit_code(work, "compare.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
