"""Hyperparameters: the flags that the signatures make, and the values that they take and refuse."""

import json
import random
from typing import Annotated, Literal, Optional

import pytest
import torch

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests import children
from tests.children import FLAGS, STEPS
from tests.conftest import ROOT, assert_refused
from utils.flags import make_parser
from utils.hyperparameters import NETWORK, Fraction, Range, defaults, hyperparameters


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        (step1, "--dropout 0.4 --g-channels 32 64", dict(dropout=0.4, g_channels=[32, 64], dim_z=16)),
        (
            step2,
            "--learning-rate 1e-3 --channels 16 --muon-rate none --no-positional --block gated",
            dict(learning_rate=1e-3, channels=16, muon_rate=None, positional=False, block="gated"),
        ),
        (step3, "--hidden-dims 128 64 32 --kl-coeff 0.5", dict(hidden_dims=[128, 64, 32], kl_coeff=0.5)),
    ],
)
def test_flags_of_hyperparameters_reach_the_run(module, flags, expected, call_step, bare_steps, tmp_path):
    done = call_step(module, "--dry-run", "--batch-size", 8, *flags.split(), "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"results go to {tmp_path}\n")
    used = json.loads((tmp_path / "config.json").read_text())["hyperparameters"]
    assert {key: used[key] for key in expected} == expected
    module.load_model(tmp_path / "model.pt")  # it was built with them


def test_a_signature_makes_the_flags():
    def train(
        run,
        count: int = 3,
        *,
        num_epochs: int = 5,
        num_layers: Annotated[int, "number of layers", NETWORK] = 2,
        rate: float = 0.1,
        dropout: Annotated[Fraction, "probability"] = 0.0,
        size: Annotated[Optional[int], Range(4)] = None,
        widths: Annotated[tuple[int, ...], "units"] = (8, 4),
        kind: Literal["a", "b"] = "a",
        wide: bool = True,
    ):
        return run, count, num_epochs, num_layers, rate, dropout, size, widths, kind, wide

    specs = hyperparameters(train)
    assert "count" not in specs
    assert (specs["num_epochs"].flag, specs["num_layers"].flag) == ("--epochs", "--num-layers")
    assert specs["num_layers"].group == "network" and specs["rate"].group == "training"
    expected = dict(
        num_epochs=5, num_layers=2, rate=0.1, dropout=0.0, size=None, widths=(8, 4), kind="a", wide=True
    )
    assert defaults(train) == expected
    parser = make_parser("toy.py", "", specs)
    args = parser.parse_args(
        "--num-layers 1 --rate 1e-3 --size none --widths 5 6 7 --kind b --no-wide".split()
    )
    assert (args.num_layers, args.rate, args.size, args.widths) == (1, 1e-3, None, [5, 6, 7])
    assert (args.kind, args.wide, getattr(args, "dropout", None)) == ("b", False, None)
    good = dict(num_epochs=1, num_layers=1, rate=1, dropout=1.0, size=None, widths=[3], kind="b", wide=False)
    bad = dict(num_epochs=0, num_layers=0, rate=-0.1, dropout=1.5, size=3, widths=(), kind="c", wide=1)
    for name, spec in specs.items():
        spec.check(good[name])
        for wrong in (bad[name], "nonsense", [None], float("nan")):
            with pytest.raises(ValueError, match=name):
                spec.check(wrong)


def test_help_has_every_flag_and_groups_them(call_step):
    common = (
        "--epochs --batch-size --seed --device --dataset --data-dir --out-dir --model --count --dry-run --resume "
        "--restart --sample-only --variant --list-variants --ablation --seeds --held-out --minutes"
    ).split()
    for module, own in (
        (step1, "--d-freq --g-learning-rate --d-learning-rate --g-channels --d-channels --dropout --dim-z"),
        (step2, "--conditional --digit --binarize --precision --learning-rate --channels --no-positional"),
        (step3, "--kl-coeff --latent-dim --bound-samples --hidden-dims --learning-rate"),
    ):
        printed = call_step(module, "--help").stdout
        assert all(f"{flag}" in printed for flag in [*common, *own.split()])
        training, network, run = (printed.index(f"\n{group}:") for group in ("training", "network", "run"))
        assert printed.index("  --batch-size") > training and printed.index("  --seed") > run
        assert network > training and printed.isascii(), "not every terminal has other letters"
    assert "(256 256 256)" in printed and "falling to zero along a cosine (0.003)" in " ".join(
        printed.split()
    )


BAD_USAGE = {
    step1: """
        --epochs 0 | --batch-size -3 | --batch-size many | --d-freq 0 | --seed -1 | --seeds 0 | --device tpu
        --no-such-flag | --dropout 1.5 | --g-channels 0 | --g-channels 64 x | --g-channels | --g-learning-rate -1
        --d-learning-rate nan | --loss least-squares | --ema-decay 2 | --dim-z 0 | --count 0 | --dataset CIFAR10
        --out-dir= | --data-dir= | --minutes 0 | --minutes soon | --epo 3
    """,
    step2: """
        --digit 3 | --digit 10 | --digit -1 | --digit three | --binarize maybe | --activation swish | --block dense
        --channels 0 | --kernel-size 4 | --first-kernel-size 2 | --dropout 1 | --muon-rate never | --num-blocks -1
        --no-positional=1 | --precision double | --warm-up 0
    """,
    step3: """
        --bound-samples 0 | --kl-coeff -1 | --kl-coeff nan | --latent-dim 0 | --hidden-dims 0 | --hidden-dims
        --hidden-dims 64 0 | --distorted 1.1 | --kl-warm-up -0.1 | --learning-rate inf
    """,
}


@pytest.mark.parametrize("module", [step1, step2, step3])
def test_bad_usage_is_one_line_and_exit_code_2(module, call_step, tmp_path):
    for flags in BAD_USAGE[module].replace("\n", "|").split("|"):
        if flags.strip():
            done = call_step(module, "--dry-run", "--out-dir", tmp_path / "out", *flags.split())
            flag = flags.split()[0].partition("=")[0]
            assert_refused(done)
            assert flag in done.stderr or flag[2:].replace("-", "_") in done.stderr, done.stderr
    for flags, expected in (
        (["--minutes", 1, "--epochs", 2], "not allowed with"),
        (["--resume", "--restart"], "not allowed with"),
        (["--resume"], "no checkpoint"),
        (["--sample-only", "--batch-size", 4711], "no model"),  # so that no earlier dry run has one
        (["--sample-only", "--model", tmp_path / "none.pt"], "none.pt"),
        (["--variant", "nonsense"], "--list-variants"),
        (["--data-dir", ROOT / "README.md"], "--data-dir"),
    ):
        assert_refused(call_step(module, "--dry-run", *flags, "--out-dir", tmp_path / "out"), expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_absent_device(call_step, tmp_path):
    assert_refused(call_step(step1, "--device", "cuda", "--out-dir", tmp_path / "out"), "cuda")
    assert not (tmp_path / "out").exists()


ANYTHING = ["", "-1", "nan", "inf", "1e999", "0x10", "ten", "1.5", "--", "é", "9" * 30]


def numbers(least, *more):
    """Return valid and invalid values of a flag that takes a whole number."""
    return [str(least), str(least + 3), *more], [str(least - 1), *ANYTHING]


VALUES = {
    "--epochs": numbers(1, "1000"),
    "--batch-size": numbers(1, "64", str(2**63 - 1)),
    "--seed": numbers(0, str(2**63 - 1)),
    "--minutes": (["0.001", "5", "1e300"], ["0", "0.0", "-1", "nan", "inf", "ten", ""]),
    "--device": (["auto", "cpu"], ["tpu", "", "CPU"]),
    "--held-out": ([None], ["yes"]),
    "--count": numbers(1, "20"),
}
RATES = ["0", "0.5", "1", "1e-30"], ["-1", "nan", "inf", "much", ""]
OWN_VALUES = {
    "gan": {
        "--d-freq": numbers(1, "2", "1000"),
        "--dropout": (["0", "0.5", "0.99"], ["1.01", "-1", ""]),
        "--g-learning-rate": RATES,
    },
    "pixelcnn": {
        "--binarize": (["threshold", "stochastic"], ["maybe", "", "none"]),
        "--muon-rate": ([*RATES[0], "none", "None"], RATES[1]),
        "--no-positional": ([None], ["yes"]),
    },
    "vae": {
        "--kl-coeff": RATES,
        "--latent-dim": numbers(2, "20"),
        "--bound-samples": numbers(1, "500"),
    },
}
OWN_VALUES["conditional"] = {
    **OWN_VALUES["pixelcnn"],
    "--digit": (list("0379"), ["10", "-1", "three", ""]),
}
# Of these at most one.
MODES = ["--ablation", "--resume", "--restart", "--sample-only", "--list-variants"]


def draw_flags(name, chance):
    """Draw a valid combination: pairs of a flag and its value, None for a flag without one."""
    values = {**VALUES, **OWN_VALUES[name], "--variant": ([*STEPS[name].VARIANTS], None)}
    pairs = [(flag, chance.choice(valid)) for flag, (valid, _) in values.items() if chance.random() < 0.4]
    chance.shuffle(pairs)
    if {"--epochs", "--minutes"} <= {flag for flag, _ in pairs}:
        excluded = chance.choice(["--epochs", "--minutes"])
        pairs = [pair for pair in pairs if pair[0] != excluded]
    return pairs


def spell(pairs, chance):
    """Spell the pairs as the command line has them: in one argument or in two."""
    arguments = []
    for flag, value in pairs:
        arguments += [flag] if value is None else chance.choice([[flag, value], [f"{flag}={value}"]])
    return arguments


@pytest.mark.parametrize("name", STEPS)
def test_valid_flags_are_accepted_and_invalid_ones_refused(name, folder_of, call_step, tmp_path):
    """100 random combinations of each; one invalid value anywhere in a valid one is refused in one line."""
    chance, module = random.Random(name), STEPS[name]
    invalid = {flag: wrong for flag, (_, wrong) in {**VALUES, **OWN_VALUES[name]}.items()}
    invalid |= {"--variant": ["nonsense", ""], "--seeds": numbers(1)[1], "--nonsense": [None, "1"]}
    for _ in range(100):
        pairs = draw_flags(name, chance)
        more = chance.choice(
            [[], [("--dry-run", None)], [("--seeds", "2")], [(chance.choice(MODES[:4]), None)]]
        )
        folder_of(module, *FLAGS[name], *spell([*pairs, *more], chance))
        flag = chance.choice([*invalid])
        kept = [pair for pair in pairs if pair[0] != flag]
        value = chance.choice(invalid[flag])
        wrong = flag if value is None else f"{flag}={value}"
        at = chance.randint(0, len(kept))
        arguments = [*spell(kept[:at], chance), wrong, *spell(kept[at:], chance)]
        assert_refused(call_step(module, *FLAGS[name], *arguments, "--out-dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_random_flags_dry_run(name, start, tmp_path):
    """Five random combinations of each: a run, the same resumed, and its samples, all with exit code 0."""
    chance = random.Random(f"{name} for real")
    for index in range(5):
        arguments = spell(draw_flags(name, chance), chance)
        for mode in ([], ["--resume"], ["--sample-only", "--model", tmp_path / str(index) / "model.pt"]):
            flags = [*arguments, "--out-dir", tmp_path / str(index), *mode]
            done = start(children.train, name, flags, children.draw_nothing).end()
            assert done.returncode == 0, (flags, done.stderr)
            assert not done.stderr or "comparison" in done.stdout, (flags, done.stderr)
