r"""Write every number of the report or of the skeleton, out of the files of runs; latexmk calls it.

`make_numbers.py --results step1=FOLDER step3=FOLDER --author NAME` chooses the runs of the skeleton and keeps them in
runs.json. There they are named step1, step2, ...; see NAMES. The report always takes the reported runs.

The report names its numbers and never spells them out. A name is the folder of a run, a dot, and what of it:

    \val{step2_pixelcnn.test_nll}{2}               a metric, with two decimals; step1_gan.recall.floor: another field
    \val{step3_vae.learning_rate}{}                a hyperparameter or another entry of config.json, as it is
    \val{step2_pixelcnn.losses.1.test_nll}{1}      losses.csv: a column's mean over the rows of epoch 1 (or `last`);
                                                   losses_std is the standard deviation
    \val{step1_gan.ablation.plain.parzen_mean}{1}  another CSV file: epoch or variant, column; or JSON file: keys
    \val{step1_gan.spread.parzen.plain}{2}         standard deviation over the seeds, relative to the mean, pooled over
                                                   the rows of ablation.csv with several seeds, here without `plain`
    \err{step2_pixelcnn.test_nll}{2}               a metric $\pm$ its standard error; in per cent with 100* before it
    \err{comparisons.label_gain}{2}                a mean difference of two runs, paired by image, from comparisons.json
    \mean{step1_gan.ablation.default.parzen}{1}    mean $\pm$ standard deviation over the seeds
    \calc{[step1_gan.wall_time] / 60}{0}           + - * / ** and FUNCTIONS of numbers and of such names
    \run{step1_gan}                                seed, epochs, time and hardware
    \ablation{step1_gan}{reason, parzen:1:max}     a row for each variant: its reason, or its change, and mean and
                                                   standard deviation of metrics with so many decimals. Bold are the
                                                   best and what equals it within the error of its mean.
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
from operator import add, mul, sub, truediv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "report"
# The runs that the skeleton can have, and their folders, chosen with --results.
NAMES = ("step1", "step2", "step2_conditional", "step3", "step1_ablation", "step3_ablation")
choice = {}


def folder_of(run):
    """Return the folder of a reported run or of one in NAMES. An ablation may lie in the folder of its step."""
    if run in NAMES:
        return ROOT / (choice.get(run) or choice[run.replace("_ablation", "")])
    return ROOT / "results" / run


def read_table(path):
    """Read the rows of a CSV file, as dicts of texts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def look_up(name):
    """Return the value at `run.what.more`."""
    run, what, *more = name.split(".")
    if run == "comparisons":  # results/comparisons.json, whose entries each belong to two runs
        return json.loads((ROOT / "results" / "comparisons.json").read_text())[what][
            more[0] if more else "value"
        ]
    folder = folder_of(run)
    if what == "spread":
        return spread(read_table(folder / "ablation.csv"), *more)
    table, statistic = (what[:-4], statistics.stdev) if what.endswith("_std") else (what, statistics.fmean)
    if (folder / f"{table}.csv").exists():
        rows, *place, column = read_table(folder / f"{table}.csv"), *more
        key = "variant" if "variant" in rows[0] else "epoch"
        place = rows[-1][key] if place == ["last"] else ".".join(place)  # names of variants have dots in them
        return statistic(float(row[column]) for row in rows if row[key] == place and row[column])
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    if what in files:
        found = files[what]
    else:
        found = {**files["config"]["hyperparameters"], **files["config"], **files["metrics"]}[what]
        more = more or ["value"] * (what in files["metrics"])
    for key in more:
        found = found[int(key) if isinstance(found, list) else key]
    return found


def spread(rows, metric, *left_out):
    """Return the pooled standard deviation over the seeds, relative to the mean."""
    rows = [row for row in rows if row[f"{metric}_std"] and row["variant"] not in left_out]
    ratios = [float(row[f"{metric}_std"]) / float(row[f"{metric}_mean"]) for row in rows]
    freedom = [int(row["seeds"]) - 1 for row in rows]
    return math.sqrt(sum(n * ratio**2 for n, ratio in zip(freedom, ratios)) / sum(freedom))


def dense(*widths):
    """Count weights and biases of fully connected layers. The consecutive widths are numbers and lists."""
    flat = [width for each in widths for width in (each if isinstance(each, list) else [each])]
    return sum((before + 1) * after for before, after in zip(flat, flat[1:]))


OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: pow}
FUNCTIONS = dict(exp=math.exp, log=math.log, round=round, dense=dense, reverse=lambda widths: widths[::-1])


def compute(node):
    """Compute a node of Python's syntax tree out of numbers, lists, OPERATORS and FUNCTIONS."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](compute(node.left), compute(node.right))
    if isinstance(node, ast.Call):
        return FUNCTIONS[node.func.id](*map(compute, node.args))
    return ast.literal_eval(node)


def escape(text):
    """Write plain text in TeX."""
    text = re.sub(r"\b1 threads", "1 thread", text.replace("(R)", "").replace(" Processor", ""))
    text = re.sub(r"([#$%&_{}])", r"\\\1", text.replace("\\", "/"))
    return re.sub(r"[~^]", r"\\\g<0>{}", text)


def written(value, decimals=""):
    """Write a value in TeX: a number with so many decimals, or all else as it is."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list):
        return ", ".join(written(each, decimals) for each in value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    if not decimals and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return rf"\ensuremath{{{float(mantissa):g} \cdot 10^{{{int(exponent)}}}}}"
    digits = f"{value:,.{decimals}f}" if decimals else f"{value:,.6g}"
    return digits.replace(",", "{,}").replace("-", r"\ensuremath{-}")


def val(name, decimals):
    return written(look_up(name), decimals)


def err(name, decimals):
    scale, name = (100, name[4:]) if name.startswith("100*") else (1, name)
    values = look_up(name), look_up(f"{name}.standard_error")
    return r" \ensuremath{\pm} ".join(written(scale * value, decimals) for value in values)


def mean(name, decimals):
    values = look_up(f"{name}_mean"), look_up(f"{name}_std")
    return r" \ensuremath{\pm} ".join(written(value, decimals) for value in values)


def calc(expression, decimals):
    text = re.sub(r"\[([\w./-]+)\]", lambda match: f"({look_up(match[1])!r})", expression)
    return written(float(compute(ast.parse(text, mode="eval").body)), decimals)


def run(name):
    minutes = look_up(f"{name}.wall_time") / 60
    minutes = f"{minutes:.{0 if minutes >= 10 else 1}f} minutes on {escape(look_up(f'{name}.hardware'))}"
    return f"seed {look_up(f'{name}.seed')}, {look_up(f'{name}.num_epochs')} epochs in {minutes}"


def ablation(name, columns):
    rows = read_table(folder_of(name) / "ablation.csv")
    explained = variants(ROOT / f"hw2_{name[:5]}_main.py")
    cells = [[rf"\texttt{{{escape(row['variant'])}}}" for row in rows]]
    for column in columns.split(", "):
        if column in ("reason", "change"):
            cells.append([explained[row["variant"]][column == "change"] for row in rows])
        else:
            cells.append(over_seeds(rows, *column.split(":")))
    return "\n".join(" & ".join(line) + r" \\" for line in zip(*cells))


def over_seeds(rows, metric, decimals, best=None):
    """Write mean and standard deviation of a metric for each row, bold if equal to the `best` (min or max)."""
    parts = [[row[f"{metric}_mean"], row[f"{metric}_std"]] for row in rows]  # a single seed has no deviation
    texts = [r" \pm ".join(f"{float(part):.{decimals}f}" for part in each if part) for each in parts]
    if best:
        means = [float(mean) for mean, _ in parts]
        first = means.index({"min": min, "max": max}[best](means))
        error = float(parts[first][1] or 0) / float(rows[first]["seeds"]) ** 0.5
        close = [abs(mean - means[first]) <= 2 * 2**0.5 * error for mean in means]
        texts = [rf"\mathbf{{{text}}}" if bold else text for text, bold in zip(texts, close)]
    return [f"${text}$" for text in texts]


def variants(script):
    """Read the reason and the changed defaults of a step's VARIANTS, without running the script."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
            items = zip(node.value.keys, node.value.values)
    explained = {"default": ("the reported settings", "")}
    for key, value in items:
        reason, changes = value.elts
        change = ", ".join(f"{each.arg}={ast.unparse(each.value)}" for each in changes.keywords)
        explained[ast.literal_eval(key)] = escape(ast.literal_eval(reason)), rf"\texttt{{{escape(change)}}}"
    return explained


def source(path, name):
    """Return the text of a function or class, without its docstrings and the empty lines after them."""
    text = (ROOT / path).read_text()
    (node,) = (each for each in ast.parse(text).body if getattr(each, "name", None) == name)
    listing = ast.get_source_segment(text, node) + "\n"
    for each in ast.walk(node):
        if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(each):
            docstring = re.escape(ast.get_source_segment(text, each.body[0]))
            listing = re.sub(rf"^ *{docstring}\n\n?", "", listing, flags=re.MULTILINE)
    return listing


def ownfig(run, name):
    paths = [folder_of(run) / f"{name}{suffix}" for suffix in (".pdf", ".png")]
    path = os.path.relpath(next(path for path in paths if path.exists()), REPORT)
    return rf"\figurefile{{\detokenize{{{Path(path).as_posix()}}}}}"


def chosen(name):
    note = " (a dry run, whose numbers mean nothing)" if name in NAMES and look_up(f"{name}.dry_run") else ""
    return escape(choice[name]).replace("/", r"/\allowbreak{}") + note


CALL = re.compile(r"\\(val|err|mean|calc|run|ablation|source|ownfig|chosen)((?:\{[^{}]*\}){1,2})")
MISSING = dict(ablation=r"-- \\", ownfig=r"\fbox{no such figure yet}")  # in the skeleton; all else is --


def read_sources(path):
    """Yield file name, number and text of each line of a TeX file and those that it inputs, without comments."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = re.sub(r"(?<!\\)%.*", "", line)
        yield path.name, number, line
        for name in re.findall(r"\\input\{([^}]*)\}", line):
            if not name.startswith("numbers"):
                yield from read_sources(path.with_name(f"{name}.tex"))


def make_files(path, complete=True):
    """Return the text of the numbers and of the listings, by file name, for the report at this path."""
    numbers, listings = {}, {}
    for file, number, line in read_sources(path):
        for command, braces in CALL.findall(line):
            arguments = braces[1:-1].split("}{")
            try:
                text = globals()[command](*arguments)
            except Exception as error:
                place = f"{file}:{number}: \\{command}{braces}"
                if complete:
                    raise LookupError(f"{place}: {error!r}") from error
                print(f"{place} is missing")
                text = MISSING.get(command, "--")
            if command == "source":
                listings[f"listing_{arguments[1]}.lst"] = text
            else:
                key = ":".join([command, *arguments])
                numbers[key] = rf"\numberdef{{{key}}}{{{text}}}" + "\n"
    return {f"numbers{'' if complete else '_skeleton'}.tex": "".join(numbers.values()), **listings}


def named_folder(text):
    """argparse type: return the name and the folder of NAME=FOLDER, relative to the project."""
    name, _, folder = text.partition("=")
    path = Path(folder).expanduser().resolve() / ("ablation.csv" if "ablation" in name else "config.json")
    if name not in NAMES or not path.exists():
        what = f"{path} is not there" if name in NAMES else f"NAME is one of {', '.join(NAMES)}"
        raise argparse.ArgumentTypeError(f"{text!r}: {what}")
    return name, Path(os.path.relpath(path.parent, ROOT)).as_posix()


def main(argv=None):
    """Write the numbers of the report, or choose the skeleton's runs and write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, what = parser.add_argument, f"NAME=FOLDER of runs for the skeleton; a NAME is {', '.join(NAMES)}"
    add("--results", nargs="+", action="extend", default=[], type=named_folder, help=what)
    add("--author", help="author of the skeleton")
    add("--skeleton", action="store_true", help="write the skeleton's numbers, of the runs chosen before")
    args = parser.parse_args(argv)
    document, kept = REPORT / "report.tex", REPORT / "runs.json"
    if args.skeleton or args.results or args.author:
        document = REPORT / "skeleton.tex"
        choice.update(json.loads(kept.read_text()) if kept.exists() else {})
        choice.update(args.results, **({"author": args.author} if args.author else {}))
        kept.write_text(json.dumps(choice, indent=2) + "\n")
    for name, text in make_files(document, complete=document.stem == "report").items():
        (REPORT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
