"""Hyperparameters as the keyword-only arguments of a training function.

The annotation of an argument says its type and its help,

    dropout: Annotated[float, "probability of dropping a unit"] = 0.1

and `utils.cli` makes the flag `--dropout`, its line of `--help` and its check from that.
"""

import argparse
import inspect
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Smallest and largest value of a hyperparameter, for its annotation."""

    least: float
    most: float = math.inf


class Group(str):
    """Heading of `--help` under which a hyperparameter stands, for its annotation."""


Fraction = Annotated[float, Range(0.0, 1.0)]
NETWORK = Group("network")
DEFAULT_RANGES = {int: Range(1), float: Range(0.0)}  # of numbers whose annotation has no Range


@dataclass(frozen=True)
class Hyperparameter:
    """One keyword-only argument: its values are of `type`, or tuples of it (`several`), or None (`optional`)."""

    name: str
    default: Any
    type: type
    range: Range
    choices: tuple
    several: bool
    optional: bool
    help: str
    group: str

    @property
    def flag(self):
        return "--epochs" if self.name == "num_epochs" else "--" + self.name.replace("_", "-")

    def parse(self, text):
        """Convert one word of the command line, where None is spelled `none`; argparse calls this."""
        if self.optional and text.lower() == "none":
            return None
        try:
            value = self.type(text)
            self._check_one(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"takes {self._wanted()}, not {text!r}") from None
        return value

    def check(self, value):
        """Raise ValueError if the value is not one that the flag would take."""
        if value is None and self.optional:
            return
        if self.several and not (isinstance(value, (list, tuple)) and value):
            raise ValueError(f"{self.name} takes one value or more, not {value!r}")
        for each in value if self.several else [value]:
            self._check_one(each)

    def _check_one(self, value):
        fits = isinstance(value, (int, float) if self.type is float else self.type)
        fits = fits and (self.type is bool or not isinstance(value, bool))
        if fits and self.choices:
            fits = value in self.choices
        elif fits and self.range:
            fits = self.range.least <= value <= self.range.most and math.isfinite(value)
            fits = fits and (self.type is float or value < 2**63)
        if not fits:
            raise ValueError(f"{self.name} takes {self._wanted()}, not {value!r}")

    def _wanted(self):
        if self.choices or not self.range:
            return " or ".join(self.choices) or f"a {self.type.__name__}"
        kind = "a whole number" if self.type is int else "a number"
        if self.range.most == math.inf:
            return f"{kind} of at least {self.range.least:g}"
        return f"{kind} from {self.range.least:g} to {self.range.most:g}"


def from_annotation(name, default, hint, group="run"):
    """Make the `Hyperparameter` of one argument from its name, default and annotation."""
    notes = getattr(hint, "__metadata__", ())
    kind = hint.__origin__ if notes else hint
    optional = get_origin(kind) is Union
    if optional:
        kind = next(each for each in get_args(kind) if each is not type(None))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    several = tuple in (kind, get_origin(kind))
    if choices or several:
        kind = type(choices[0]) if choices else (get_args(kind) or [type(default[0])])[0]

    def note(of, otherwise):
        return next((each for each in notes if type(each) is of), otherwise)

    value_range = note(Range, DEFAULT_RANGES.get(kind))
    texts = note(str, ""), note(Group, group)
    return Hyperparameter(name, default, kind, value_range, choices, several, optional, *texts)


def hyperparameters(function, group="training"):
    """Read the keyword-only arguments of a function or class: a dict of `Hyperparameter` by name."""
    annotated = function.__init__ if inspect.isclass(function) else function
    hints = get_type_hints(annotated, include_extras=True)
    return {
        name: from_annotation(name, argument.default, hints.get(name, type(argument.default)), group)
        for name, argument in inspect.signature(function).parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
    }


def defaults(function):
    """Return the default of every hyperparameter of the function, by name."""
    return {name: each.default for name, each in hyperparameters(function).items()}
