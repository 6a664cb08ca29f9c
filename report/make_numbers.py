r"""Writes numbers.tex: every number of the report, out of the files in results/. latexmk calls it.

    python3 make_numbers.py

The report names its numbers and never spells them out. A name is the folder of a run, a dot, and what of it:

    \val{step2_pixelcnn.test_nll}{2}               a metric, with two decimals
    \val{step1_gan.frechet_distance.floor}{1}      another field of its entry
    \val{step3_vae.learning_rate}{}                a hyperparameter or another entry of config.json, as it is
    \val{step2_pixelcnn.losses.1.test_nll}{1}      losses.csv: a column's mean over the rows of epoch 1 (or `last`);
                                                   losses_std is the standard deviation
    \val{classifier.floors.none.parzen}{1}         another JSON file of the folder
    \val{step1_gan.ablation.default.parzen_mean}{1}  another table of the folder: row, column
    \err{step2_pixelcnn.test_nll}{2}               a metric $\pm$ its standard error, where the run has one; 100* may
                                                   stand before the name, for per cent
    \val{step1_gan.spread.parzen.plain}{2}         standard deviation over the seeds, relative to the mean, pooled over
                                                   the rows of ablation.csv with several seeds, here without `plain`
    \mean{step1_gan.ablation.default.parzen}{1}    mean $\pm$ standard deviation over the seeds
    \calc{[step1_gan.wall_time] / 60}{0}           arithmetic with such names; FUNCTIONS are known as well
    \run{step1_gan}                                seed, epochs, time and hardware
    \ablation{step1_gan}{reason, parzen:1:max, wall_time/60:0}
                                                   a row for each variant: its reason, or its change, and mean and
                                                   standard deviation of metrics with so many decimals. Bold are
                                                   the best, and those that would not differ from it with its own
                                                   standard error. So noise makes nothing bold.
    \source{models/VAE.py}{kl_divergence}          a function or class of the project, as a listing

Only the standard library is needed. What a name does not lead to stops the build and is named, with its place.
"""

import ast
import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent
COMMANDS = {"val": 2, "err": 2, "mean": 2, "calc": 2, "run": 1, "ablation": 2, "source": 2}


def dense(*widths):
    """Weights and biases of fully connected layers between consecutive widths."""
    return sum((before + 1) * after for before, after in zip(widths, widths[1:]))


def masked(mask_type, in_channels, out_channels, kernel_size):
    """Weights and biases of a masked convolution that the mask lets through."""
    seen = (kernel_size**2 - 1) // 2 + (mask_type == "B")
    return (seen * in_channels + 1) * out_channels


FUNCTIONS = dict(log=math.log, exp=math.exp, abs=abs, round=round, dense=dense, masked=masked)


class Missing(Exception):
    """A name that leads nowhere."""


# ---------------------------------------------------------------------------------------------------------
# Looking names up


def look_up(name, root=ROOT):
    """The value, or with a field's name that field, at `run.what.more`."""
    run, *keys = name.split(".")
    folder = root / "results" / run
    if not folder.is_dir():
        raise Missing(f"there is no run {folder}")
    if not keys:
        raise Missing(f"{name!r} names a run and nothing of it")
    if keys[0] in ("losses", "losses_std"):
        statistic = statistics.fmean if keys[0] == "losses" else statistics.stdev
        return _of_epoch(folder / "losses.csv", statistic, *keys[1:])
    if keys[0] == "spread":
        return _spread(folder / "ablation.csv", *keys[1:])
    if (folder / f"{keys[0]}.csv").exists() or keys[0] in ("ablation", "seeds"):
        path = folder / f"{keys[0]}.csv"
        rows = {row["variant"]: row for row in read_table(path)}
        *variant, column = keys[1:]  # a variant's name may have a dot in it
        return _number(_find(rows, [".".join(variant), column], path))
    if (folder / f"{keys[0]}.json").exists():
        path = folder / f"{keys[0]}.json"
        return _find(_read_json(path), keys[1:], path)
    metrics, config = _read_json(folder / "metrics.json"), _read_json(folder / "config.json")
    if keys[0] in metrics:
        return _find(metrics, keys if len(keys) > 1 else [*keys, "value"], folder / "metrics.json")
    if keys[0] in config:
        return _find(config, keys, folder / "config.json")
    if keys[0] in config["hyperparameters"]:
        return _find(config["hyperparameters"], keys, folder / "config.json")
    raise Missing(f"{keys[0]!r} is neither in metrics.json nor in config.json of {folder}")


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise Missing(f"there is no {path}") from None


def read_table(path):
    """The rows of a CSV file, as dicts of texts."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise Missing(f"there is no {path}") from None


def _find(content, keys, path):
    for key in keys:
        try:
            content = content[int(key)] if isinstance(content, list) else content[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise Missing(f"there is no {key!r} of {'.'.join(keys)} in {path}") from None
    return content


def _of_epoch(path, statistic, epoch="", column=""):
    rows = read_table(path)
    if rows and column not in rows[0]:
        raise Missing(f"{path} has no column {column!r}")
    epoch = rows[-1]["epoch"] if epoch == "last" else epoch
    values = [float(row[column]) for row in rows if row["epoch"] == epoch and row[column]]
    if not values:
        raise Missing(f"{path} has no {column} in epoch {epoch!r}")
    return statistic(values)


def _spread(path, metric="", *left_out):
    try:
        rows = [row for row in read_table(path) if row[f"{metric}_std"] and row["variant"] not in left_out]
        ratios = [float(row[f"{metric}_std"]) / float(row[f"{metric}_mean"]) for row in rows]
        freedom = [int(row["seeds"]) - 1 for row in rows]
        return math.sqrt(sum(n * ratio**2 for n, ratio in zip(freedom, ratios)) / sum(freedom))
    except (KeyError, ZeroDivisionError):
        raise Missing(f"{path} has no spread of {metric!r} over seeds") from None


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return text or None


# ---------------------------------------------------------------------------------------------------------
# What each command becomes


def val(name, decimals, root=ROOT):
    return written(look_up(name, root), decimals)


def err(name, decimals, root=ROOT):
    name, scale = (name[4:], 100) if name.startswith("100*") else (name, 1)
    text = written(scale * look_up(name, root), decimals)
    try:
        error = look_up(f"{name}.standard_error", root)
    except Missing:  # an older run
        return text
    return rf"{text} \ensuremath{{\pm}} {written(scale * error, decimals)}"


def mean(name, decimals, root=ROOT):
    average, spread = (look_up(f"{name}_{part}", root) for part in ("mean", "std"))
    values = [average] if spread is None else [average, spread]  # a single seed has no spread
    return r" \ensuremath{\pm} ".join(written(value, decimals) for value in values)


def calc(expression, decimals, root=ROOT):
    def value(match):
        found = look_up(match[1], root)
        if not isinstance(found, (int, float, list)):
            raise Missing(f"{match[1]} is {found!r}, no number")
        return repr(found)

    text = re.sub(r"\[([\w./-]+)\]", value, expression)
    try:
        return written(eval(text, {"__builtins__": {}}, FUNCTIONS), decimals)
    except (SyntaxError, NameError, TypeError, ArithmeticError, ValueError) as error:
        raise Missing(f"{text!r} cannot be computed: {error}") from None


def run(name, root=ROOT):
    def of(key):
        return look_up(f"{name}.{key}", root)

    length = f"{of('num_epochs')} epochs in " if not _read_json(_config(name, root)).get("minutes") else ""
    minutes = of("wall_time") / 60
    time = f"{minutes:.0f} minutes" if minutes >= 10 else f"{minutes:.1f} minutes"
    return f"seed {of('seed')}, {length}{time} on {_escape(of('hardware'))}"


def _config(name, root):
    return root / "results" / name / "config.json"


def written(value, decimals=""):
    """A value as TeX: numbers with so many decimals, and otherwise as they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return _escape(value)
    if isinstance(value, list):
        return ", ".join(written(each, decimals) for each in value)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Missing(f"{value!r} is no number")
    if decimals:
        digits = f"{value:,.{int(decimals)}f}".replace(",", "{,}")
    elif value == int(value) and abs(value) < 1e6:
        digits = f"{int(value):,}".replace(",", "{,}")
    elif abs(value) >= 1e-2:
        digits = f"{value:.6g}"
    else:
        mantissa, exponent = f"{value:e}".split("e")
        return rf"\ensuremath{{{float(mantissa):g} \cdot 10^{{{int(exponent)}}}}}"
    return rf"\ensuremath{{-}}{digits[1:]}" if digits.startswith("-") else digits


def _escape(text):
    text = re.sub(r"\b1 threads", "1 thread", text.replace("(R)", "").replace(" Processor", ""))
    return re.sub(r"([#$%&_{}])", r"\\\1", text)


COLUMN = re.compile(r"(\w+)(?:([*/])([\d.]+))?:(\d+)(?::(min|max))?")


def ablation(name, columns, root=ROOT):
    path = root / "results" / name / "ablation.csv"
    table = {row["variant"]: row for row in read_table(path)}
    explained = variants(root / f"hw2_{name[:5]}_main.py")
    cells = []
    for column in re.split(r",\s*", columns.strip()):
        if column in ("reason", "change"):
            cells.append([explained[each][column == "change"] if each in explained else "" for each in table])
            continue
        match = COLUMN.fullmatch(column)
        if not match:
            raise Missing(f"{column!r} is no column as in metric:decimals:min")
        cells.append(_statistics(table, path, *match.groups()))
    for each in table:
        if each not in explained:
            raise Missing(f"{path} has a variant {each!r} that the step's script does not have")
    return "\n".join(
        " & ".join((rf"\texttt{{{_escape(each)}}}", *row)) + r" \\" for each, row in zip(table, zip(*cells))
    )


def _statistics(table, path, metric, operator, factor, decimals, best):
    scale = float(factor or 1) ** (-1 if operator == "/" else 1)
    try:
        means = [scale * float(row[f"{metric}_mean"]) for row in table.values()]
        spreads = [scale * float(row[f"{metric}_std"] or "nan") for row in table.values()]
    except (KeyError, ValueError):
        raise Missing(f"{path} has no {metric!r} for every variant") from None
    texts = []
    first = means.index({"min": min, "max": max}.get(best, max)(means))
    error = spreads[first] / float([*table.values()][first]["seeds"]) ** 0.5
    for mean, spread in zip(means, spreads):
        text = f"{mean:.{decimals}f}" + ("" if math.isnan(spread) else rf" \pm {spread:.{decimals}f}")
        close = mean == means[first] or abs(mean - means[first]) <= 2 * 2**0.5 * error
        texts.append(rf"$\mathbf{{{text}}}$" if best and close else f"${text}$")
    return texts


def variants(script):
    """The reason and the changed defaults of each of a step's VARIANTS, read without running the script."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
            pairs = list(zip(node.value.keys, node.value.values))
            break
    else:
        raise Missing(f"{script} has no VARIANTS")
    explained = {"default": ("the reported settings", "")}
    for key, value in pairs:
        reason, changes = value.elts
        change = ", ".join(f"{each.arg}={ast.unparse(each.value)}" for each in changes.keywords)
        explained[ast.literal_eval(key)] = _escape(ast.literal_eval(reason)), rf"\texttt{{{_escape(change)}}}"
    return explained


def source(path, name, root=ROOT):
    """The text of a function or class, without its docstrings."""
    try:
        text = (root / path).read_text()
    except FileNotFoundError:
        raise Missing(f"there is no {root / path}") from None
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            return _without_docstrings(text.splitlines(), node)
    raise Missing(f"{path} has no {name}")


def _without_docstrings(lines, node):
    left_out = set()
    for each in ast.walk(node):
        if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(each):
            left_out |= set(range(each.body[0].lineno, each.body[0].end_lineno + 1))
            if not lines[each.body[0].end_lineno].strip():  # the empty line after it
                left_out.add(each.body[0].end_lineno + 1)
    return "\n".join(lines[n - 1] for n in range(node.lineno, node.end_lineno + 1) if n not in left_out)


# ---------------------------------------------------------------------------------------------------------
# The report's sources


def read_sources(path):
    """(file name, line number, line) of a TeX file and those that it inputs, without comments.

    What stands between \\ifSWITCH and \\fi is left out where the file itself says \\newif\\ifSWITCH but not
    \\SWITCHtrue.
    """
    text = re.sub(r"(?<!\\)%.*", "", path.read_text())
    off = [name for name in re.findall(r"\\newif\\if(\w+)", text) if rf"\{name}true" not in text]
    return list(_lines(path, text, off))


def _lines(path, text, off):
    for name in off:
        text = re.sub(
            rf"(?<!\\newif)\\if{name}\b.*?\\fi\b", lambda match: "\n" * match[0].count("\n"), text, flags=re.S
        )
    for number, line in enumerate(text.splitlines(), 1):
        yield path.name, number, line
        for name in re.findall(r"\\input\{([^}]*)\}", line):
            other = (path.parent / name).with_suffix(".tex")
            if other.name != "numbers.tex":
                yield from _lines(other, re.sub(r"(?<!\\)%.*", "", other.read_text()), off)


CALL = re.compile(r"\\(val|err|mean|calc|run|ablation|source)\{([^{}]*)\}(?:\{([^{}]*)\})?")


def definitions(path, root=ROOT):
    """The lines of numbers.tex, and listings by file name, for the report at this path; raises Missing."""
    lines, listings = {}, {}
    for file, number, line in read_sources(path):
        for command, first, second in CALL.findall(line):
            arguments = (first, second)[: COMMANDS[command]]
            try:
                text = globals()[command](*arguments, root=root)
            except Missing as error:
                raise Missing(f"{file}:{number}: \\{command}{{{first}}}: {error}") from None
            if command == "source":
                listings[f"listing_{second}.py"] = text + "\n"
            else:
                lines[command, first, second] = rf"\numberdef{{{command}:{':'.join(arguments)}}}{{{text}}}"
    return list(lines.values()), listings


def main():
    try:
        lines, listings = definitions(REPORT / "report.tex")
    except Missing as error:
        sys.exit(f"make_numbers.py: {error}")
    for name, text in listings.items():
        (REPORT / name).write_text(text)
    (REPORT / "numbers.tex").write_text("% Written by make_numbers.py.\n" + "\n".join(lines) + "\n")
    print(f"make_numbers.py: {len(lines)} numbers")


if __name__ == "__main__":
    main()
