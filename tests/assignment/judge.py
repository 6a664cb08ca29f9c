"""The verdict of a check, the checks that it rests on, and the call of a check.

A check is a test function of test_step1.py to test_step3.py, named by its part: `test_2b_mask_a_hides_the_centre`
belongs to 2 (b). It takes a submission (`submissions.Code`), and passes unless it calls `fail`.
"""

import traceback
from dataclasses import dataclass, field

import torch

PARTS = ("1b", "2b", "2c", "2d", "3b", "3c")
OK, FAILED, NOT_FOUND, NOT_JUDGED = "ok", "failed", "not found", "not judged"
_notes = []  # of the check that runs


class Verdict(Exception):
    """The text of what a check has found, and its status."""


@dataclass
class Result:
    status: str
    text: str = ""  # why it is not ok
    notes: list = field(default_factory=list)  # worth saying, but no mistakes


def fail(text, status=FAILED):
    """End the check, with the mistake in words."""
    raise Verdict(text, status)


def note(text):
    """Say something that fails nothing."""
    _notes.append(text)


def rests_on(*names):
    """Mark a check that is not judged unless the checks `names` pass."""

    def mark(check):
        check.needs = names
        return check

    return mark


def part_of(name):
    return name.split("_")[1]


def is_interface(name):
    """Tell whether a check asks for the handout's names and shapes, and not for the assignment's words."""
    return "_interface_" in name


def title(name):
    """Return the part of a check in the assignment's words, such as "2 (b)"."""
    number, letter = part_of(name)
    return f"{number} ({letter})" + (", interface" if is_interface(name) else "")


def first_line(error):
    return (str(error).strip().splitlines() or ["no message"])[0]


def run_check(name, check, code):
    """Return the result of one check of a submission."""
    torch.manual_seed(0)
    _notes.clear()
    text, status = "", OK
    try:
        check(code)
    except Verdict as verdict:
        text, status = verdict.args
        status = FAILED if is_interface(name) and status == NOT_JUDGED else status
    except (Exception, SystemExit) as error:
        lines = traceback.extract_tb(error.__traceback__)
        lines = [line for line in lines if line.filename.startswith(str(code.folder))]
        where = f" in {code.relative(lines[-1].filename)}, line {lines[-1].lineno}" if lines else ""
        text, status = f"{type(error).__name__}{where}: {first_line(error)}", FAILED
    if status in (NOT_FOUND, NOT_JUDGED):
        text = f"{status}: {text}"
    notes = [f"{title(name)}: {each}" for each in dict.fromkeys(_notes)]
    return Result(status, f"{title(name)}: {text}" if text else "", notes + code.remarks)


class Judge:
    """Keeps the results of one submission; `run` gives the `Result` of a check by its name."""

    def __init__(self, checks, run):
        self.checks, self.run, self.results = checks, run, {}

    def result(self, name):
        """Return the result of a check, after the checks that it rests on."""
        for need in getattr(self.checks[name], "needs", ()):
            ground = self.result(need)
            if ground.status in (FAILED, NOT_JUDGED):
                cause = ground.text.split("it rests on ")[-1]
                text = f"{title(name)}: not judged, because it rests on {cause}"
                self.results.setdefault(name, Result(NOT_JUDGED, text))
        if name not in self.results:
            self.results[name] = self.run(name)
        return self.results[name]
