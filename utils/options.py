"""Options of a run: the keyword-only arguments of a training function become flags of the command line.

The annotation of an argument has its type, sometimes its range, and its line of --help:

    dropout: Annotated[float, (0, 1), "probability of dropping a unit"] = 0.1

A range is a pair of numbers or a Python range, such as `range(1, 56, 2)` for odd numbers. Without a range, whole
numbers are at least 1 and others at least 0, or at least the default if that is less.
"""

import argparse
import contextlib
import difflib
import inspect
import math
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

Fraction = Annotated[float, (0, 1)]
LARGEST = 2**63 - 1  # of whole numbers, which tensors hold in 64 bits
RANGES = {int: (1, LARGEST), float: (0, math.inf)}  # of numbers whose annotation has none


class Option:
    """A keyword-only argument and its flag. Its values are of `type`, or a tuple or list (`several`) of it.

    Raises TypeError, which names the argument, for an annotation (`hint`) or a default of which there is no flag.
    """

    def __init__(self, name, default, hint):
        self.name, self.default, self.optional = name, default, default is None
        notes = []
        while get_origin(hint) is Annotated or type(None) in get_args(hint):
            if get_origin(hint) is Annotated:
                notes, hint = [*notes, *hint.__metadata__], hint.__origin__
            else:
                self.optional, hint = True, Union[tuple({*get_args(hint)} - {type(None)})]
        origin = get_origin(hint) or hint
        self.several = origin if origin in (tuple, list) else None
        self.choices = get_args(hint) if origin is Literal else ()
        kinds = {type(each) for each in self.choices} or {hint}
        if self.several:
            kinds = {*get_args(hint)} - {...} or {type(each) for each in default or ()}
        self.type = kinds.pop() if len(kinds) == 1 else None
        has_flag = self.type in (int, float, str) or (self.type is bool and not self.several)
        if not has_flag or default is inspect.Parameter.empty:
            words = f"the type {hint} and the default {default}, of which utils/options.py makes no flag"
            raise TypeError(f"the argument {name!r} has {words}")
        self.limits = RANGES.get(self.type)
        if self.limits and isinstance(default, (int, float)):
            self.limits = min(self.limits[0], default), self.limits[1]
        self.help = " ".join(each for each in notes if isinstance(each, str))
        for each in notes:
            if isinstance(each, range):
                self.choices = each
            elif isinstance(each, tuple):
                self.limits = each

    @property
    def flag(self):
        return "--epochs" if self.name == "num_epochs" else "--" + self.name.replace("_", "-")

    def parse(self, text):
        """Convert one word of the command line, where None is spelled `none`; argparse calls this."""
        if self.optional and text.lower() == "none":
            return None
        with contextlib.suppress(ValueError):
            value = self.type(text)
            if self._allows(value):
                return value
        raise argparse.ArgumentTypeError(f"takes {self._wanted()}, not {text!r}")

    def _wanted(self):
        if self.choices:
            return f"one of {self.choices}"
        kind, (least, most) = "a whole number" if self.type is int else "a number", self.limits
        return f"{kind} of at least {least:g}" if most >= LARGEST else f"{kind} from {least:g} to {most:g}"

    def _allows(self, value):
        if self.choices:
            return value in self.choices
        return not self.limits or (self.limits[0] <= value <= self.limits[1] and math.isfinite(value))

    def collect(self, found):
        """Return what argparse found, or a default, in the form of the annotation: a list becomes a tuple."""
        if not isinstance(found, list):
            return found
        return None if found == [None] else self.several(found)

    def words(self, value):
        """Spell a value as words of the command line."""
        if self.type is bool:
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        return [self.flag, *map(str, value if isinstance(value, (tuple, list)) else [value])]

    def add_to(self, group):
        """Add the flag to an argparse group. A flag that is not given sets nothing, so that a variant can set it."""
        shown = " ".join(map(str, self.default)) if self.several and self.default else self.default
        help = f"{self.help} ({shown})".replace("%", "%%")
        add = partial(group.add_argument, dest=self.name, default=argparse.SUPPRESS)
        if self.type is bool:  # argparse's own BooleanOptionalAction breaks --help in some versions of Python
            add(self.flag, action="store_true", help=help)
            add(f"--no-{self.flag[2:]}", action="store_false", help="the opposite")
        else:
            names = "|".join(self.choices) if self.type is str else ""
            metavar = names or self.type.__name__.upper()
            add(self.flag, type=self.parse, metavar=metavar, nargs="+" if self.several else None, help=help)


def read_options(function):
    """Return the keyword-only arguments of a function or class as a dict of `Option` by name."""
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    return {
        name: Option(name, argument.default, hints.get(name, type(argument.default)))
        for name, argument in inspect.signature(function).parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
    }


def build(network, **architecture):
    """Return a network of a class, with those of the arguments that it takes: a network of your own may have fewer."""
    parameters = inspect.signature(network).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return network(**{name: value for name, value in architecture.items() if takes_any or name in parameters})


def nearest(word, words):
    """Return the one of the words that is most like `word`, for messages."""
    return difflib.get_close_matches(word, words, 1, cutoff=0)[0]


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers bad usage with one line instead of the whole usage."""

    def __init__(self, **options):
        # A flag is one line of --help.
        wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=130)
        super().__init__(usage="%(prog)s [flags]", formatter_class=wide, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"there is no flag {unknown[0]}, the nearest is {near}")
        return namespace

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


def number(least, kind=int, most=LARGEST):
    """Return an argparse type for numbers in a range."""
    return Option("number", least, Annotated[kind, (least, most)]).parse


def folder(text):
    """argparse type for a folder or file: `~` is the home folder, and an empty name is refused."""
    path = os.path.expanduser(text)
    if not path or path.startswith("~"):  # there is no such home folder
        raise argparse.ArgumentTypeError(f"takes the name of a folder or file, not {text!r}")
    return Path(path)
