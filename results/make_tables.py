"""Write the tables of README.md and results/README.md, and comparisons.json: `python results/make_tables.py`.

A table stands between <!-- table: NAME --> and <!-- end -->. NAME is a method of `Tables`, followed by its
arguments. With --check nothing is written, and pages that differ are named. Only files that git tracks, or would
add, are read, so experiments stay out. The runs of some tables, and what others have published, are in families.csv
and published.csv. The caption of a figure is its line in the docstring of the step script.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from utils.cli import exit_code
from utils.compare import paired_difference
from utils.files import ROOT, UserError, metric, read_csv, read_json, write_atomically
from utils.machine import say
from utils.options import ArgumentParser

PAGES = ("README.md", "results/README.md")
SCRIPTS = {"step1": step1, "step2": step2, "step3": step3}
# The headings of metrics and hyperparameters whose names do not say it all.
HEADINGS = dict(
    frechet_distance="Fréchet distance", parzen="Parzen (nats)", largest_share="most frequent digit",
    binarize="pixels", num_epochs="epochs", test_nll="test NLL (nats)", train_nll="training NLL (nats)",
    mixture_nll="NLL without label", latent_dim="latent dimensions", test_negative_elbo="-ELBO (nats)",
    test_kl="KL (nats)", test_bound="importance bound (nats)", test_negative_elbo_grey="-ELBO, grey pixels",
    accuracy_none="grey", accuracy_threshold="thresholded", accuracy_stochastic="stochastic",
    formula="comparison", usual_seconds="plain (s)", seconds="cached (s)", hardware="on",
)  # fmt: skip
LONG = "step3_vae/ablation_long/seed_0"
# The first run's values per image minus the second's, by the name in comparisons.json.
COMPARISONS = dict(
    label_gain=("step2_pixelcnn", "nll", "step2_conditional_pixelcnn", "nll"),
    mixture_gain=("step2_pixelcnn", "nll", "step2_conditional_pixelcnn", "mixture_nll"),
    latent_gain=("step3_vae", "bound", "step3_vae/variants/long-20", "bound"),
    length_gain=("step2_pixelcnn", "nll", "step2_pixelcnn/ablation_long/seed_0/epochs-6", "nll"),
    distortion_gain=(f"{LONG}/undistorted", "bound", "step3_vae/variants/long-20", "bound"),
)


def reported_files(root):
    """Return the files of results/ that git tracks or would add, sorted."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "results"]
    try:
        names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"git lists no files in {root}: work in a clone of the repository") from None
    return sorted(root / name for name in names.split("\0") if (root / name).is_file())


def shown(value, error=None):
    """Return a number as text, rounded to one digit of its error (two if the first is 1), or to four digits."""
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


def made(run):
    """Return the command of a run, its time with the evaluation after each epoch, and the hardware, as text."""
    # A command names its script alone, and the first classifier did not record one.
    command = re.sub("^train", "results/train", run.get("command", "train_classifier.py"))
    minutes = run["metrics"]["wall_time"]["value"] / 60
    return f"`python {command}`", f"{minutes:.{0 if minutes >= 10 else 1}f} min", run["hardware"]


def table(headings, *rows):
    """Return a Markdown table without its empty columns. Names of metrics are spelt out as headings."""
    kept = [column for column in range(len(headings)) if any(row[column] for row in rows)]
    headings = [HEADINGS.get(each, each.replace("_", " ")) for each in headings]
    lines = [headings, ["---"] * len(headings), *rows]
    text = "\n".join("| " + " | ".join(line[each] for each in kept) + " |" for line in lines)
    return text if rows else "There is no such run yet."


class Tables:
    """The tables: each method yields the headings, then the rows. A run is named by its folder below results/."""

    def __init__(self, root):
        self._folder, self._runs = root / "results", {}
        for path in reported_files(root):
            name, metrics = path.parent.relative_to(self._folder).as_posix(), path.with_name("metrics.json")
            if path.name == "config.json" and metrics.exists() and not re.search("/(ablation|seeds)", name):
                self._runs[name] = {**read_json(path), "metrics": read_json(metrics)}

    def _read(self, file):
        path = self._folder / file
        if not path.exists():
            return []
        return read_csv(path) if path.suffix == ".csv" else read_json(path).values()

    def headlines(self):
        yield "model", "figure", "here", "published"
        for row in self._read("published.csv"):
            if row["run"] in self._runs:
                yield row["model"], row["name"], cell(self._runs[row["run"]], row["metric"]), row["published"]

    def commands(self, *names):
        """The commands of these runs, and the first headline of their step as what to expect."""
        yield "command", "time", "on", "expect"
        for run in (self._runs[name] for name in names if name in self._runs):
            headline = next(row for row in self._read("published.csv") if row["run"] == run["step"])
            yield *made(run), f"{headline['name']}: {cell(run, headline['metric'])}"

    def runs(self):
        yield "run", "command", "time", "on", "seed"
        for name, run in self._runs.items():
            yield f"[{name}]({name})", *made(run), str(run["seed"])

    def results(self, step, *keys):
        yield "run", *keys
        for name in sorted(self._runs, key=lambda name: not name.startswith(step)):  # other data sets last
            if self._runs[name]["step"].startswith(step):
                yield f"[{name}]({name})", *(cell(self._runs[name], key) for key in keys)

    def families(self, *keys):
        """All families on one scale, thresholded samples, with the prior of the VAE and with those for --prior."""
        yield "samples of", *keys
        for row in self._read("families.csv"):
            run, suffix = self._runs.get(row["run"], {"metrics": ()}), row["suffix"] or ""
            if keys[0] + suffix in run["metrics"]:
                yield row["samples of"], *(cell(run, key + suffix) for key in keys)

    def ablation(self, name, *keys):
        """The runs in NAME.csv: means over the seeds, deviations where there are several, ranked by the first metric."""
        yield "variant", "change", "seeds", *keys
        for row in sorted(self._read(f"{name}.csv"), key=lambda row: row[f"{keys[0]}_mean"] or math.inf):
            _, changes = SCRIPTS[name[:5]].VARIANTS.get(row["variant"], ("", {}))
            change = ", ".join(f"{name}={value}" for name, value in changes.items())
            means = (shown(row[f"{key}_mean"], row[f"{key}_std"]) for key in keys)
            yield f"`{row['variant']}`", change, shown(row["seeds"]), *means

    def entries(self, file, *keys):
        """The rows of a CSV file, or the entries of a JSON file."""
        yield keys
        for row in self._read(file):
            yield [shown(row[key]) for key in keys]

    def gallery(self, *names):
        """The figures of these runs, with their lines in the docstring of the step script."""
        yield "figure", "what it shows"
        for name in (name for name in names if name in self._runs):
            page = SCRIPTS[self._runs[name]["step"][:5]].__doc__
            for figure, text in re.findall(r"^ {4}(\S+\.(?:png|gif)) {2,}(.+)$", page, re.MULTILINE):
                if (self._folder / name / figure).exists():
                    yield f'<img src="{name}/{figure}" width="360">', f"`{name}/{figure}`: {text}"


def comparisons(root):
    """Return the content of comparisons.json: mean differences over the test images, with their standard errors."""
    entries = {}
    for name, (run, key, other, other_key) in COMPARISONS.items():
        found = paired_difference(root / "results" / run, key, root / "results" / other, other_key)
        if found:
            formula = f"{run} {key} minus {other} {other_key}, mean over images with equal pixels"
            entries[name] = metric(found[0], "nats per image", formula, standard_error=found[1])
    return json.dumps(entries, indent=2) + "\n"


def outdated(root):
    """Return the pages that differ from the results, as a dict of what they should hold."""
    tables = Tables(root)

    def make(match):
        kind, *arguments = match[2].split()
        return f"{match[1]}{table(*getattr(tables, kind)(*arguments))}\n"

    pattern = re.compile(r"(<!-- table: ([a-z][\w\s/.-]*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    texts = {page: pattern.sub(make, (root / page).read_text(encoding="utf-8")) for page in PAGES}
    texts["results/comparisons.json"] = comparisons(root)
    return {page: text for page, text in texts.items() if (root / page).read_text(encoding="utf-8") != text}


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    parser = ArgumentParser(prog="make_tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that differ")

    def work():
        check, pages = parser.parse_args(argv or []).check, outdated(ROOT)
        if check and pages:
            raise UserError(f"{', '.join(pages)}: out of date, python results/make_tables.py mends it")
        for page, text in pages.items():
            write_atomically(ROOT / page, text.encode())
            say(f"wrote {ROOT / page}")

    return exit_code(work, "make_tables.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
