"""Options: the flags that a signature makes, and the values that they take and refuse."""

import argparse
import re
import sys
from typing import Annotated, List, Literal, Optional, Tuple, Union

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests.conftest import ROOT, assert_refused
from utils import cli
from utils.options import ArgumentParser, Fraction, read_options

# Annotation, default, words of the command line, the value that they give, and words that are refused.
TYPES = [
    (int, 3, "5", 5, "0 -1 2.5 True none"),
    (float, 0.1, "1e-3", 1e-3, "-0.1 nan inf x none"),
    (str, "a", "b", "b", ""),
    (Annotated[int, (0, 9), "help"], 2, "0", 0, "-1 10"),
    (Annotated[int, range(1, 56, 2), "odd"], 27, "55", 55, "2 57 0"),
    (Annotated[Fraction, "help"], 0.0, "1", 1.0, "-0.1 1.1"),
    (Optional[int], 4, "none", None, "0"),
    (Annotated[Optional[float], "help"], None, "0.5", 0.5, "-1"),
    (Union[None, Annotated[int, (2, 3)]], 2, "3", 3, "4"),
    (float, None, "0.5", 0.5, "-1"),  # a default that was edited to None
    (Literal["a", "b"], "a", "b", "b", "c none"),
    (Optional[Literal["a", "b"]], "a", "none", None, "c"),
    (Literal[2, 4], 2, "4", 4, "3"),
    (Tuple[int, ...], (8, 4), "5 6 7", (5, 6, 7), "0 a none"),
    (tuple, (8, 4), "5", (5,), "0"),
    (List[int], [8], "5 6", [5, 6], "0"),
    (list[int], [8], "5 6", [5, 6], "0"),
    (Optional[tuple[int, ...]], None, "5", (5,), "0"),
    (bool, True, None, False, ""),
    (bool, False, "", True, ""),
]
if sys.version_info >= (3, 10):
    TYPES.append((eval("float | None"), 0.1, "none", None, "-1"))


def options_of(hint, default):
    def train(run, count: int = 3, *, num_layers=default):
        pass

    train.__annotations__["num_layers"] = hint
    return read_options(train)


@pytest.mark.parametrize("hint, default, words, value, bad", TYPES, ids=lambda value: str(value)[:30])
def test_a_type_makes_a_flag(hint, default, words, value, bad):
    specs = options_of(hint, default)
    assert [*specs] == ["num_layers"], "the others are no options"
    parser, option = ArgumentParser(), specs["num_layers"]
    option.add_to(parser.add_argument_group())
    assert "num_layers" not in parser.parse_args([]), "so that a variant can set it"
    variants = {"mine": ("why", {"num_layers": value})}
    flags = ["--no-num-layers"] if words is None else ["--num-layers", *words.split()]
    for variant, given, expected in ((None, [], default), (None, flags, value), ("mine", [], value)):
        args = parser.parse_args(given)
        args.variant, args.ablation, args.dry_run = variant, False, False
        options, _ = cli.choose_options(parser, args, specs, variants)
        assert options == {"num_layers": expected} and type(options["num_layers"]) is type(expected)
    for wrong in bad.split():
        with pytest.raises(SystemExit):
            parser.parse_args(["--num-layers", wrong])


@pytest.mark.parametrize("hint", [dict, torch.Tensor, Union[int, str], tuple[int, str], list[bool], object])
def test_any_other_type_is_a_type_error_that_names_the_argument(hint):
    with pytest.raises(TypeError, match="'num_layers'"):
        options_of(hint, None)


def test_mistakes_in_a_signature_are_named(edit, call_step):
    """With a traceback, since the code is at fault. --help works with every kind of type."""
    line = '    num_epochs: Annotated[int, "passes over the training images"] = 120,\n'
    with pytest.raises(argparse.ArgumentError, match="--seed"):
        edit(step3.__file__, (line, line + "    seed: int = 3,\n")).main(["--help"])
    with pytest.raises(TypeError, match="'mine'"):
        edit(step3.__file__, (line, line + "    mine: dict = None,\n")).main(["--dry-run"])
    module = edit(step3.__file__, (line, line + "    mine: Annotated[list[int], 'my own'] = None,\n"))
    assert "my own (None)" in call_step(module, "--help").stdout


def test_help_has_every_flag(call_step):
    for module in (step1, step2, step3):
        done = call_step(module, "--help")
        named = {*re.findall(r"--[a-z]+(?:-[a-z]+)*", done.stdout)}
        options = read_options(module.train) | read_options(getattr(module, "NETWORK", module.train))
        assert {"--minutes", "--restart", *(each.flag for each in options.values())} <= named
        assert done.returncode == 0 and done.stdout.isascii(), "not every terminal has other letters"
    assert "falling to zero along a cosine (0.003)" in " ".join(done.stdout.split())


BAD_USAGE = {
    step1: "--epochs 0 | --seed -1 | --device tpu | --dropout 1.5 | --g-channels | --g-channels 64 x | --loss x"
    "| --count 5001 | --dataset CIFAR10 | --out-dir= | --minutes 0",
    step2: "--digit 10 | --kernel-size 4 | --muon-rate never | --no-positional=1 | --complete -1 | --digit 7",
    step3: "--bound-samples 0 | --kl-coeff nan | --hidden-dims 64 0 | --learning-rate inf",
}


@pytest.mark.parametrize("module", BAD_USAGE)
def test_bad_usage_is_one_line_and_nothing_is_begun(module, call_step, tmp_path):
    out = ["--dry-run", "--out-dir", tmp_path / "out"]
    for words in BAD_USAGE[module].split("|"):
        done = call_step(module, *out, *words.split())
        assert_refused(done, words.split()[0].partition("=")[0])
        assert not done.stdout
    for flags, expected in (
        (["--minutes", 1, "--epochs", 2], "not allowed with"),
        (["--resume", "--restart"], "not allowed with"),
        (["--ablation", "--sample-only"], "--sample-only"),
        (["--seeds", 2, "--sample-only"], "--sample-only"),
        (["--model", "model.pt"], "--sample-only"),
        (["--sample-only", "--batch-size", 4711], "no model"),  # so that no earlier dry run has one
        (["--sample-only", "--model", tmp_path / "none.pt"], "none.pt"),
        (["--batchsize", 3], "--batch-size"),
        (["--learning-rates=3"], "--learning-rate" if module is not step1 else "-learning-rate"),
    ):
        assert_refused(call_step(module, *out, *flags), expected)
    assert not (tmp_path / "out").exists()
    assert_refused(call_step(module, *out, "--resume"), "no checkpoint")
    assert_refused(call_step(module, *out, "--data-dir", ROOT / "README.md"), "--data-dir")
