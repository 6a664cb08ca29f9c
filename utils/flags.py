"""The flags of a step: those of its hyperparameters, and those that every run has."""

import argparse
from pathlib import Path
from typing import Annotated

from utils.data import DATASETS
from utils.files import ROOT
from utils.hyperparameters import Range, from_annotation


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers bad usage with one line instead of the whole usage."""

    def __init__(self, **options):
        def wide(prog):  # a flag is one line
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=130)

        super().__init__(usage="%(prog)s [flags]", formatter_class=wide, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        namespace, others = super().parse_known_args(args, namespace)
        if [] in vars(namespace).values():  # some versions of argparse make this of --flag=--
            self.error("-- is no value of a flag")
        return namespace, others

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


def whole_number(least):
    """Return an argparse type for integers of at least `least`."""
    return from_annotation("number", least, Annotated[int, Range(least)]).parse


def positive(text):
    """argparse type for a finite number above 0."""
    value = from_annotation("number", 1.0, float).parse(text)
    if not value:
        raise argparse.ArgumentTypeError("takes a number above 0")
    return value


def folder(text):
    """argparse type for a folder or file: `~` is the home folder, and an empty name is refused."""
    if not text:
        raise argparse.ArgumentTypeError("takes the name of a folder or file")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"finds no home folder for {text}") from None


def make_parser(script, description, options):
    """Make the parser of a step. A hyperparameter that is not given is no attribute, so that a variant can set it."""
    parser = ArgumentParser(prog=Path(script).name, description=description)
    groups = {}
    for each in options.values():
        if each.group not in groups:
            groups[each.group] = parser.add_argument_group(each.group)
        shown = " ".join(map(str, each.default)) if each.several else each.default
        settings = dict(dest=each.name, default=argparse.SUPPRESS, help=f"{each.help} ({shown})")
        if each.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            metavar = "|".join(each.choices) if each.choices else each.type.__name__.upper()
            settings |= dict(type=each.parse, metavar=metavar, nargs="+" if each.several else None)
        groups[each.group].add_argument(each.flag, **settings)
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_run_flags(group):
    """Add the flags that every step has beside its hyperparameters."""
    add = group.add_argument
    add("--minutes", type=positive, metavar="M", help="train for so long instead of a number of epochs")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="seed of all random numbers (0)")
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help="auto is cuda where there is one, else cpu")
    names = ", ".join(DATASETS)
    add("--dataset", choices=DATASETS, default=DATASETS[0], metavar="NAME", help=f"one of {names}")
    add("--data-dir", type=folder, default=ROOT / "data", metavar="DIR", help="folder of the data (data/)")
    add("--out-dir", type=folder, metavar="DIR", help="folder for the results, made if missing")
    add("--dry-run", action="store_true", help="train on a few batches and write every file, to look around")
    begin = group.add_mutually_exclusive_group().add_argument
    begin("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    begin("--restart", action="store_true", help="begin anew over the checkpoint of an unfinished run")
    add("--sample-only", action="store_true", help="draw the figures of a trained model, without training")
    add("--model", type=folder, metavar="PATH", help="model.pt to draw from, with --sample-only")
    add("--count", type=whole_number(1), metavar="N", help="number of images in the sample grid")
    add("--variant", metavar="NAME", help="train a named variant")
    add("--list-variants", action="store_true", help="list the variants and why they are there, and stop")
    add(
        "--ablation",
        action="store_true",
        help="compare the default with the variants, or with --variant; a table",
    )
    add("--seeds", type=whole_number(1), metavar="N", help="train with N seeds from --seed on; make a table")
    add("--held-out", action="store_true", help="evaluate on the last 10,000 training images, to choose by")
