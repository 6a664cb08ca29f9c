r"""Write every number of the report or of the skeleton, out of the files of runs; latexmk calls it.

`make_numbers.py --results step1=FOLDER step3=FOLDER --author NAME` chooses the runs of the skeleton and keeps them in
runs.json. There they are named as in STEPS, their ablations step1_ablation, ... The report takes the reported runs.

The report names its numbers and never spells them out. A name is the folder of a run, a dot, and what of it:

    \val{step2_pixelcnn.test_nll}{2}               a metric, with two decimals; step1_gan.recall.floor: another field
    \val{step3_vae.learning_rate}{}                a hyperparameter or another entry of config.json, as it is
    \val{step2_pixelcnn.losses.1.test_nll}{1}      losses.csv: a column's mean over the rows of epoch 1 (or `last`);
                                                   losses_std is the standard deviation
    \val{step1_gan.ablation.plain.parzen_mean}{1}  another CSV file: epoch or variant, column
    \err{comparisons.label_gain}{2}                a metric, here of comparisons.json, $\pm$ its standard error
    \mean{step1_gan.ablation.default.parzen}{1}    mean $\pm$ standard deviation over the seeds
    \calc{[step1_gan.wall_time] / 60}{0}           + - * / ** and FUNCTIONS of numbers and of such names
    \ablation{step1}{parzen:1, test_kl:0}          for each variant the \mean of metrics, with so many decimals
    \source{models/VAE.py}{kl_divergence}          a function or class of the project, as a listing
    \ownfig{step1}{loss}                           a figure of the run, if TeX has a \figurefile{path}
    \chosen{step1}                                 the run's folder; \chosen{author} is the author

Only the standard library is needed. If a name leads nowhere, it is printed with its place. Then the build of the
report stops, and the skeleton has -- there.
"""

import argparse
import ast
import csv
import json
import math
import os
import re
import statistics
from functools import partial
from operator import add, mul, sub, truediv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "report"
# The runs of the skeleton, whose folders --results chooses, and their steps.
STEPS = {"step1": "step1_gan", "step2": "step2_pixelcnn", "step2_conditional": "step2_conditional_pixelcnn"}
STEPS["step3"] = "step3_vae"
choice = {}


def folder_of(run):
    """Return the folder of a reported run or of a chosen one. An ablation may lie in the folder of its step."""
    return ROOT / (choice.get(run) or choice.get(run.replace("_ablation", ""), f"results/{run}"))


def read_table(path):
    """Read the rows of a CSV file, as dicts of texts."""
    return list(csv.DictReader(path.read_text().splitlines()))


def look_up(name):
    """Return the value at `run.what.more`."""
    run, what, *more = name.split(".")
    folder = folder_of(run)
    table, statistic = (what[:-4], statistics.stdev) if what.endswith("_std") else (what, statistics.fmean)
    if (folder / f"{table}.csv").exists():
        rows, *place, column = read_table(folder / f"{table}.csv"), *more
        key = "variant" if "variant" in rows[0] else "epoch"
        place = rows[-1][key] if place == ["last"] else ".".join(place)  # names of variants have dots in them
        return statistic(float(row[column]) for row in rows if row[key] == place and row[column])
    entries = {}
    for path in (folder / "config.json", folder / "metrics.json", Path(f"{folder}.json")):
        entries |= json.loads(path.read_text()) if path.exists() else {}
    found = {**entries.get("hyperparameters", {}), **entries}[what]
    for key in more:
        found = found[int(key) if isinstance(found, list) else key]
    return found["value"] if isinstance(found, dict) else found


OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: pow}
FUNCTIONS = dict(exp=math.exp, log=math.log, round=round)


def compute(node):
    """Compute a node of Python's syntax tree out of numbers, OPERATORS and FUNCTIONS."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](compute(node.left), compute(node.right))
    if isinstance(node, ast.Call):
        return FUNCTIONS[node.func.id](*map(compute, node.args))
    return ast.literal_eval(node)


def escape(text):
    """Write plain text in TeX, and hardware in short."""
    text = text.replace("(R)", "").replace(" Processor", "").replace("\\", "/")
    return re.sub(r"[~^]", r"\\\g<0>{}", re.sub(r"[#$%&_{}]", r"\\\g<0>", text))


def written(value, decimals=""):
    """Write a value in TeX: a number with so many decimals, or all else as it is."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list):
        return ", ".join(written(each, decimals) for each in value)
    if not decimals and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return rf"\ensuremath{{{float(mantissa):g} \cdot 10^{{{int(exponent)}}}}}"
    digits = f"{value:,.{decimals}f}" if decimals else f"{value:,.6g}"
    return digits.replace(",", "{,}").replace("-", r"\ensuremath{-}")


def val(name, decimals, ends=("",)):
    return r" \ensuremath{\pm} ".join(written(look_up(name + end), decimals) for end in ends)


err, mean = partial(val, ends=("", ".standard_error")), partial(val, ends=("_mean", "_std"))


def calc(expression, decimals):
    text = re.sub(r"\[([\w./-]+)\]", lambda match: f"({look_up(match[1])!r})", expression)
    return written(float(compute(ast.parse(text, mode="eval").body)), decimals)


def ablation(name, columns):
    lines = []
    for row in read_table(folder_of(name) / "ablation.csv"):
        cells = [rf"\texttt{{{escape(row['variant'])}}}"]
        for metric, decimals in (column.split(":") for column in columns.split(", ")):
            parts = [row[f"{metric}_mean"], row[f"{metric}_std"]]  # a single seed has no deviation
            cells.append(r" \ensuremath{\pm} ".join(written(float(part), decimals) for part in parts if part))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join(lines)


def source(path, name):
    """Return the text of a function or class, without its docstrings and the empty lines after them."""
    text = re.search(rf"(?ms)^(def|class) {name}\b.*?\n(?=\n\n|\Z)", (ROOT / path).read_text())[0]
    return re.sub(r'(?ms)^ *r?""".*?"""\n\n?', "", text)


def ownfig(run, name):
    paths = [folder_of(run) / f"{name}{suffix}" for suffix in (".pdf", ".png")]
    path = os.path.relpath(next(path for path in paths if path.exists()), REPORT)
    return rf"\figurefile{{\detokenize{{{Path(path).as_posix()}}}}}"


def chosen(name):
    note = " (a dry run, whose numbers mean nothing)" if name in STEPS and look_up(f"{name}.dry_run") else ""
    return escape(choice[name]).replace("/", r"/\allowbreak{}") + note


CALL = re.compile(r"\\(val|err|mean|calc|ablation|source|ownfig|chosen)((?:\{[^{}]*\}){1,2})")
MISSING = dict(ablation=r"-- \\", ownfig=r"\fbox{no such figure yet}")  # in the skeleton; all else is --


def read_sources(path):
    """Yield the place and the text of each line of a TeX file and those that it inputs, without comments."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = re.sub(r"(?<!\\)%.*", "", line)
        yield f"{path.name}:{number}", line
        for name in re.findall(r"\\input\{(?!numbers)([^}]*)\}", line):
            yield from read_sources(path.with_name(f"{name}.tex"))


def make_files(path):
    """Return the text of the numbers and of the listings, by file name, for report.tex or skeleton.tex at this path."""
    numbers, listings = {}, {}
    for place, line in read_sources(path):
        for command, braces in CALL.findall(line):
            arguments = braces[1:-1].split("}{")
            try:
                text = globals()[command](*arguments)
            except Exception as error:
                if path.stem == "report":
                    raise LookupError(f"{place}: \\{command}{braces}: {error!r}") from error
                print(f"{place}: \\{command}{braces} is missing")
                text = MISSING.get(command, "--")
            if command == "source":
                listings[f"listing_{arguments[1]}.lst"] = text
            else:
                key = ":".join([command, *arguments])
                numbers[key] = rf"\numberdef{{{key}}}{{{text}}}" + "\n"
    name = "numbers.tex" if path.stem == "report" else "numbers_skeleton.tex"
    return {name: "".join(numbers.values()), **listings}


def is_run(name, folder):
    """Tell whether a folder has a run of the step that STEPS gives a name, or an ablation."""
    step, config = STEPS.get(name.replace("_ablation", "")), folder / "config.json"
    if name.endswith("_ablation"):
        return step and (folder / "ablation.csv").exists()
    return config.exists() and json.loads(config.read_text())["step"] == step


def main(argv=None):
    """Write the numbers of the report, or choose the skeleton's runs and write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, what = parser.add_argument, f"NAME is {', '.join(STEPS)}, step1_ablation or step3_ablation"
    add("--results", nargs="+", action="extend", default=[], help=f"NAME=FOLDER for the skeleton; {what}")
    add("--author", help="author of the skeleton")
    add("--skeleton", action="store_true", help="write the skeleton's numbers, of the runs chosen before")
    args = parser.parse_args(argv)
    document, kept = REPORT / "report.tex", REPORT / "runs.json"
    if args.skeleton or args.results or args.author:
        document = REPORT / "skeleton.tex"
        choice.update(json.loads(kept.read_text()) if kept.exists() else {})
        choice.update({"author": args.author} if args.author else {})
        for text in args.results:
            name, _, folder = text.partition("=")
            path = os.path.relpath(Path(folder).expanduser(), ROOT)
            if not is_run(name, ROOT / path):
                parser.exit(
                    2, f"make_numbers.py: {text!r}: {what}, FOLDER has a run of that step or ablation.csv\n"
                )
            choice[name] = Path(path).as_posix()
        kept.write_text(json.dumps(choice, indent=2) + "\n")
    for name, text in make_files(document).items():
        (REPORT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
