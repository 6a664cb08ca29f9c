"""Options of a run: the keyword-only arguments of a training function become flags of the command line.

The annotation of an argument has its type, sometimes its range, and its line of --help:

    dropout: Annotated[float, (0, 1), "probability of dropping a unit"] = 0.1

A range is a pair of numbers or a Python range, such as `range(1, 56, 2)` for odd numbers. Without a range, whole
numbers are at least 1 and others at least 0, or at least the default if that is less.
"""

import argparse
import difflib
import inspect
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Fraction = Annotated[float, (0, 1)]
LARGEST = 2**63 - 1  # of whole numbers, which tensors hold in 64 bits
RANGES = {int: (1, LARGEST), float: (0, math.inf)}  # of numbers whose annotation has none


@dataclass(frozen=True)
class Option:
    """One keyword-only argument. Its values are of `type`, or a tuple or list (`several`) of it."""

    name: str
    default: Any
    type: type
    several: Any
    optional: bool
    choices: tuple
    range: Any
    help: str

    @property
    def flag(self):
        return "--epochs" if self.name == "num_epochs" else "--" + self.name.replace("_", "-")

    @property
    def wanted(self):
        """What a value has to be, in words."""
        if self.choices:
            return " or ".join(map(str, self.choices))
        if isinstance(self.range, range):
            return f"a whole number of {self.range}"
        kind = {int: "a whole number", float: "a number"}.get(self.type, f"a {self.type.__name__}")
        if not self.range:
            return kind
        least, most = self.range
        return f"{kind} of at least {least:g}" if most >= LARGEST else f"{kind} from {least:g} to {most:g}"

    def parse(self, text):
        """Convert one word of the command line, where None is spelled `none`; argparse calls this."""
        if self.optional and text.lower() == "none":
            return None
        try:
            value = self.type(text)
        except ValueError:
            value = None
        if not self._fits(value):
            raise argparse.ArgumentTypeError(f"takes {self.wanted}, not {text!r}")
        return value

    def collect(self, value):
        """Return what argparse found, or a value of VARIANTS, in the form of the annotation: a tuple or a list.

        Raises ValueError if the flag would not take it. The default is always right.
        """
        value = None if value == [None] else value
        if value == self.default or (self.optional and value is None):
            return value
        many = isinstance(value, (list, tuple))
        values = value if many else [value]
        if many != bool(self.several) or not values or not all(map(self._fits, values)):
            raise ValueError(f"{self.name} takes {self.wanted}, not {value!r}")
        return self.several(value) if many else value

    def _fits(self, value):
        if type(value) is not self.type and not (self.type is float and type(value) is int):
            return False
        if self.choices or isinstance(self.range, range):
            return value in (self.choices or self.range)
        return not self.range or (self.range[0] <= value <= self.range[1] and math.isfinite(value))

    def add_to(self, group):
        """Add the flag to an argparse group. A flag that is not given sets nothing, so that a variant can set it."""
        shown = " ".join(map(str, self.default)) if self.several and self.default else self.default
        settings = dict(dest=self.name, default=argparse.SUPPRESS)
        help = f"{self.help} ({shown})".replace("%", "%%")
        if self.type is bool:  # argparse's own BooleanOptionalAction breaks --help in some versions of Python
            group.add_argument(self.flag, action="store_true", help=help, **settings)
            group.add_argument(f"--no-{self.flag[2:]}", action="store_false", help="the opposite", **settings)
            return
        metavar = "|".join(map(str, self.choices)) or self.type.__name__.upper()
        settings |= dict(type=self.parse, metavar=metavar, nargs="+" if self.several else None)
        group.add_argument(self.flag, help=help, **settings)


def make_option(name, default, hint):
    """Make the `Option` of an argument; raise TypeError, which names it, for a type that no flag has."""
    notes, optional = [], default is None
    while get_origin(hint) is Annotated or type(None) in get_args(hint):
        if get_origin(hint) is Annotated:
            notes, hint = [*notes, *hint.__metadata__], hint.__origin__
        else:
            optional, hint = True, Union[tuple({*get_args(hint)} - {type(None)})]
    several = next((each for each in (hint, get_origin(hint)) if each in (tuple, list)), None)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kinds = {type(each) for each in choices} or {hint}
    if several:
        kinds = {*get_args(hint)} - {...} or {type(each) for each in default or ()}
    (kind,) = kinds if len(kinds) == 1 else (None,)
    has_flag = kind in (int, float, str) or (kind is bool and not several)
    if not has_flag or default is inspect.Parameter.empty:
        words = f"the type {hint} and the default {default}, of which utils/options.py makes no flag"
        raise TypeError(f"the argument {name!r} has {words}")
    usual = RANGES.get(kind)
    if usual and isinstance(default, (int, float)):
        usual = min(usual[0], default), usual[1]
    limits = next((each for each in notes if isinstance(each, (tuple, range))), usual)
    texts = [each for each in notes if isinstance(each, str)]
    return Option(name, default, kind, several, optional, choices, limits, " ".join(texts))


def read_options(function):
    """Return the keyword-only arguments of a function or class as a dict of `Option` by name."""
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    return {
        name: make_option(name, argument.default, hints.get(name, type(argument.default)))
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
    return make_option("number", least, Annotated[kind, (least, most)]).parse


def folder(text):
    """argparse type for a folder or file: `~` is the home folder, and an empty name is refused."""
    path = os.path.expanduser(text)
    if not path or path.startswith("~"):  # there is no such home folder
        raise argparse.ArgumentTypeError(f"takes the name of a folder or file, not {text!r}")
    return Path(path)
