"""Write the tables of README.md and results/README.md from the files in results/: `python -m utils.tables`.

A table stands between <!-- table: NAME --> and <!-- end -->. NAME is a method of `Tables`, followed by a step
if the method takes one. With --check nothing is written, and the first line that differs is named. Only files
that git tracks, or would add, are read, so experiments stay out. The caption of a figure is its line in the
docstring of the step script.
"""

import json
import math
import re
import subprocess
import sys

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from utils import machine
from utils.cli import exit_code
from utils.files import ROOT, UserError, read_csv, write_atomically
from utils.flags import ArgumentParser

PAGES = ("README.md", "results/README.md")
SCRIPTS = {"step1": step1, "step2": step2, "step3": step3}
# The columns of the results and of the ablations, which are ranked by their first metric.
COLUMNS = {
    "step1": "frechet_distance classifier_score precision recall largest_share parzen",
    "step2": "binarize num_epochs test_nll train_nll mixture_nll bayes_accuracy recognised unsure frechet_distance "
    "classifier_score",
    "step3": "latent_dim num_epochs test_negative_elbo test_bound test_nll test_negative_elbo_grey test_kl "
    "active_units neighbour_accuracy reconstruction_accuracy frechet_distance",
    "classifier": "accuracy_none accuracy_threshold accuracy_stochastic",
}
HEADINGS = dict(
    frechet_distance="Fréchet distance", parzen="Parzen (nats)", largest_share="most frequent digit",
    binarize="pixels", num_epochs="epochs", test_nll="test NLL (nats)", train_nll="training NLL (nats)",
    mixture_nll="NLL without label", latent_dim="latent dimensions", test_negative_elbo="-ELBO (nats)",
    test_kl="KL (nats)", test_bound="importance bound (nats)", test_negative_elbo_grey="-ELBO, grey pixels",
    accuracy_none="grey", accuracy_threshold="thresholded", accuracy_stochastic="stochastic",
)  # fmt: skip
# Folder, model, metric, its name, and what others have published.
HEADLINES = [
    ("step1_gan", "GAN", "frechet_distance", "Fréchet distance", "none with this classifier"),
    ("step1_gan", "GAN", "parzen", "Parzen log-likelihood",
     "[225](https://arxiv.org/abs/1406.2661) GAN, [340](https://arxiv.org/abs/1511.05644) adversarial autoencoder"),
    ("step2_pixelcnn", "PixelCNN", "test_nll", "test NLL, thresholded pixels",
     "[54](https://github.com/jfrancis71/pygen_models) PixelCNN++, given without decimals"),
    ("step2_conditional_pixelcnn", "conditional PixelCNN", "test_nll", "test NLL, thresholded pixels",
     "[53](https://github.com/jfrancis71/pygen_models) PixelCNN++, given without decimals"),
    ("step2_pixelcnn/variants/stochastic", "PixelCNN", "test_nll", "test NLL, stochastic pixels",
     "[81.30](https://arxiv.org/abs/1601.06759) PixelCNN, [77.56](https://github.com/ajayjain/lmconv) LMConv"),
    ("step3_vae", "VAE, 2-D", "test_bound", "importance bound",
     "[135.73](https://arxiv.org/abs/1804.00891) with codes in the plane, 132.50 on a sphere"),
    ("step3_vae/variants/long-20", "VAE, 20-D", "test_bound", "importance bound",
     "[88.90](https://arxiv.org/abs/1804.00891), [86.76](https://arxiv.org/abs/1509.00519) in 50 dimensions"),
]  # fmt: skip
# The folders whose commands README has.
COMMANDS = (
    "step1_gan", "step2_pixelcnn", "step2_pixelcnn/float32", "step2_conditional_pixelcnn", "step3_vae"
)  # fmt: skip


def reported_files(root=ROOT):
    """Return the files of results/ that git tracks or would add, sorted."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "results"]
    try:
        names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"git lists no files in {root}: work in a clone of the repository") from None
    return sorted(root / name for name in {*names.split("\0")} - {""} if (root / name).is_file())


def load_runs(root, paths):
    """Return the finished runs by folder below results/: the content of config.json, with the metrics."""
    runs = {}
    for path in paths:
        metrics, of_several = path.with_name("metrics.json"), {"ablation", "ablation_dropped", "seeds"}
        if path.name == "config.json" and metrics in paths and not of_several & {*path.parts}:
            run = {**json.loads(path.read_text()), "metrics": json.loads(metrics.read_text())}
            runs[path.parent.relative_to(root / "results").as_posix()] = run
    return runs


def shown(value, error=None):
    """Return a number as text, rounded to its standard error or else to four significant digits.

    The error keeps one digit, or two if the first one is 1.
    """
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if error:
        power = math.floor(math.log10(error))
        decimals = max(0, -power + (error < 2 * 10.0**power))
        return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"
    decimals = 0 if value.is_integer() else min(4, max(0, 3 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{decimals}f}"


def cell(run, key):
    """Return a hyperparameter or a metric as text. Parentheses hold the metric of real images, where there is one."""
    entry = run["metrics"].get(key) or {"value": run["hyperparameters"].get(key)}
    real = entry.get("floor")
    return shown(entry["value"], entry.get("standard_error")) + (f" ({shown(real)})" if real else "")


def command(run):
    """Return the command of a run. Older runs did not record theirs."""
    step = run["step"][:5]
    words = [f"hw2_{step}_main.py" if step in SCRIPTS else "train_classifier.py"]
    words += ["--conditional"] * ("conditional" in run["step"])
    words += [f"--variant {run['variant']}"] * (run["variant"] != "default")
    words += ["--held-out"] * (run["evaluated_on"] != "test images")
    recorded = run.get("command", " ".join(words))
    return f"`python {recorded}`".replace("train_classifier.py", "-m utils.train_classifier")


def duration(run):
    """Return the time of the training, with the evaluation after each epoch, as text."""
    minutes = run["metrics"]["wall_time"]["value"] / 60
    return f"{minutes:.{0 if minutes >= 10 else 1}f} min"


def table(headings, rows):
    """Return a Markdown table without its empty columns. Names of metrics are spelt out as headings."""
    kept = [column for column in range(len(headings)) if any(row[column] for row in rows)]
    headings = [HEADINGS.get(each, each.replace("_", " ")) for each in headings]
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line[each] for each in kept) + " |" for line in lines if rows)


class Tables:
    """The tables of the reported runs, each as Markdown. A `step` begins the names of its folders."""

    def __init__(self, root=ROOT):
        self._folder, self._files = root / "results", reported_files(root)
        self._runs = load_runs(root, self._files)

    def headlines(self):
        rows = [row for row in HEADLINES if row[0] in self._runs]
        rows = [(model, name, cell(self._runs[run], key), others) for run, model, key, name, others in rows]
        return table(["model", "figure", "here", "published"], rows)

    def commands(self):
        rows, first = [], {row[0]: row for row in reversed(HEADLINES)}
        for folder in COMMANDS:
            if folder in self._runs:
                run = self._runs[folder]
                _, _, key, name, _ = first[folder if folder in first else run["step"]]
                rows.append((command(run), duration(run), run["hardware"], f"{name}: {cell(run, key)}"))
        return table(["command", "time", "on", "expect"], rows)

    def results(self, step):
        keys, runs = COLUMNS[step].split(), self._of(step).items()
        rows = [[f"[{name}]({name})", *(cell(run, key) for key in keys)] for name, run in runs]
        return table(["run", *keys], rows)

    def ablation(self, step):
        """Means over the seeds, and the standard deviation over them where there are several."""
        keys, tables, variants = COLUMNS[step].split(), [], SCRIPTS[step].VARIANTS
        for rows in self._read(step, "ablation.csv"):
            ranked_by = next(f"{key}_mean" for key in keys if f"{key}_mean" in rows[0])
            cells = []
            for row in sorted(rows, key=lambda row: row[ranked_by] or math.inf):
                changes = variants.get(row["variant"], ("", {}))[1]
                change = ", ".join(f"{name}={value}" for name, value in changes.items())
                means = [shown(row.get(f"{key}_mean"), row.get(f"{key}_std")) for key in keys]
                cells.append([f"`{row['variant']}`", change, shown(row["seeds"]), *means])
            tables.append(table(["variant", "change", "seeds", *keys], cells))
        return "\n\n".join(tables)

    def quality(self, step):
        """The quality of samples over the epochs of the reported run."""
        tables = self._read(step, "quality.csv")
        return "\n\n".join(
            table([*rows[0]], [[*map(shown, row.values())] for row in rows]) for rows in tables
        )

    def speed(self):
        path, keys = self._folder / "benchmark" / "metrics.json", ("usual_seconds", "seconds", "value")
        entries = json.loads(path.read_text()).values() if path in self._files else ()
        rows = [[each["formula"], *(shown(each[key]) for key in keys), each["hardware"]] for each in entries]
        return table(["comparison", "plain (s)", "cached (s)", "ratio", "on"], rows)

    def runs(self):
        rows = [
            (f"[{name}]({name})", command(run), str(run["seed"]), duration(run), run["hardware"])
            for name, run in self._runs.items()
        ]
        return table(["run", "command", "seed", "time", "on"], rows)

    def gallery(self, step):
        """The figures of the step's default runs, with their lines in the docstring of the script."""
        rows, lines = [], re.findall(r"^ {4}(\S.*?) {2,}(.+)$", SCRIPTS[step].__doc__, re.MULTILINE)
        for folder in (name for name in self._of(step) if "/" not in name):
            for name, text in ((name, text) for names, text in lines for name in names.split(", ")):
                if name.endswith((".png", ".gif")) and self._folder / folder / name in self._files:
                    rows.append((f'<img src="{folder}/{name}" width="360">', f"`{folder}/{name}`: {text}"))
        return table(["figure", "what it shows"], rows)

    def _of(self, step):
        """The runs of a step, other data sets last."""
        names = [name for name, run in self._runs.items() if run["step"].startswith(step)]
        return {name: self._runs[name] for name in sorted(names, key=lambda name: not name.startswith(step))}

    def _read(self, step, name):
        folders = sorted(self._folder.glob(f"{step}*"))
        return [read_csv(folder / name) for folder in folders if folder / name in self._files]


def pages(root=ROOT):
    """Return the text of each page, by its path, with all tables made anew."""
    tables = Tables(root)

    def make(match):
        kind, *step = match[2].split()
        return f"{match[1]}{getattr(tables, kind)(*step) or 'There is no such run yet.'}\n"

    pattern = re.compile(r"(<!-- table: ([a-z][\w ]*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    return {root / page: pattern.sub(make, (root / page).read_text(encoding="utf-8")) for page in PAGES}


def differences(root=ROOT):
    """Return for each page that differs from the results its first line that is missing, as text."""
    found = []
    for path, text in pages(root).items():
        old = path.read_text(encoding="utf-8")
        missing = [line for line in text.splitlines() if line not in old.splitlines()]
        found += [f"{path.name} lacks {missing[:1]}"] if text != old else []
    return found


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    parser = ArgumentParser(prog="python -m utils.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")

    def work():
        if not parser.parse_args(argv or []).check:
            for path, text in pages().items():
                write_atomically(path, text.encode())
                machine.say(f"wrote {path}")
        elif differences():
            raise UserError("; ".join(differences()) + ": python -m utils.tables writes it")

    return exit_code(work, "tables.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
