"""The command line of a step: its flags, folders and exit codes.

A step is a module. It has
    STEP                 the name of its folder below results/
    VARIANTS             a dict of name: (question, changed options)
    train                its keyword-only arguments are the options
    train_and_evaluate   called with (run, train_set, test_set); a set is (uint8 images, labels)
and perhaps
    sample               for --sample-only, called with (run, path of model.pt, test_set)
    NETWORK              a class whose keyword-only arguments are options, too
    CONDITIONAL_STEP     the folder with --conditional
    add_flags            called with an argparse group
    ABLATION, draw_ablation   see utils/ablation.py
    SEVERAL_PROCESSES    true if torchrun may start it
"""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

from torch.distributed import is_torchelastic_launched

from utils import ablation, files, machine, metrics
from utils.data import DATASETS, load_data
from utils.files import ROOT, UserError
from utils.options import ArgumentParser, folder, nearest, number, read_options
from utils.run import Run

DRY_RUN_EPOCHS = 2


def make_parser(step, specs):
    """Return the parser of a step, and the names of the flags that only this step has."""
    parser = ArgumentParser(prog=Path(step.__file__).name, description=step.__doc__)
    add_run_flags(parser.add_argument_group("run"))
    group, own = parser.add_argument_group("options"), parser.add_argument_group("this step")
    for each in specs.values():
        each.add_to(group)
    getattr(step, "add_flags", lambda group: None)(own)
    return parser, [each.dest for each in own._group_actions if each.dest != "conditional"]


def add_run_flags(group):
    """Add the flags that every step has beside its options."""
    add = group.add_argument
    what = "train for so long; evaluations, figures and metrics take 1 to 6 minutes more"
    add("--minutes", type=number(1e-9, float), metavar="M", help=what)
    add("--seed", type=number(0), default=0, metavar="N", help="seed of all random numbers (0)")
    what = "auto is cuda where there is one, else cpu"
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help=what)
    what = "one of " + ", ".join(DATASETS)
    add("--dataset", choices=DATASETS, default=DATASETS[0], metavar="NAME", help=what)
    add("--data-dir", type=folder, default=ROOT / "data", metavar="DIR", help="folder of the data (data/)")
    add("--out-dir", type=folder, metavar="DIR", help="folder for the results, made if missing")
    add("--dry-run", action="store_true", help="train on a few batches and write every file, to look around")
    begin = group.add_mutually_exclusive_group().add_argument
    begin("--resume", action="store_true", help="go on from the checkpoint of an interrupted or shorter run")
    begin("--restart", action="store_true", help="begin anew over what is in the folder")
    add("--sample-only", action="store_true", help="draw the figures of a trained model, without training")
    add("--model", type=folder, metavar="PATH", help="model.pt to draw from, with --sample-only")
    add("--count", type=number(1, most=5000), metavar="N", help="images in the sample grid, up to 5000")
    add("--variant", metavar="NAME", help="train a named variant")
    add("--list-variants", action="store_true", help="list the variants and why they are there, and stop")
    add("--ablation", action="store_true", help="compare the default with all variants, or with --variant")
    add("--seeds", type=number(1), metavar="N", help="train with N seeds from --seed on; make a table")
    add("--held-out", action="store_true", help="evaluate on the last 10,000 training images, to choose by")


def choose_options(parser, args, specs, variants):
    """Return the options of the run, which are defaults, changed by the variant, changed by the flags.

    A dry run then shortens the training. Also return the options without the flags.
    """
    if args.variant is not None and args.variant not in variants:
        near = nearest(args.variant, variants or ["none"])
        parser.error(f"unknown variant {args.variant!r}, the nearest is {near!r}: try --list-variants")
    # A network of your own may lack what the variants change. Then only the runs of these variants are refused.
    for name in [args.variant] if args.variant else variants if args.ablation else ():
        for key in variants[name][1].keys() - specs:
            near = nearest(key, specs)
            parser.error(f"the variant {name!r} sets {key!r}, which does not exist: is it {near!r}?")
    changes = variants[args.variant][1] if args.variant else {}
    words = [word for name, value in changes.items() for word in specs[name].words(value)]
    changed = vars(parser.parse_args(words))
    preset = {name: each.collect(changed.get(name, each.default)) for name, each in specs.items()}
    options = {name: specs[name].collect(getattr(args, name, value)) for name, value in preset.items()}
    if args.dry_run:
        preset["num_epochs"] = options["num_epochs"] = min(options["num_epochs"], DRY_RUN_EPOCHS)
        args.minutes = None
    return options, preset


def refuse_contradictions(parser, args, step):
    """End with one line if flags do not fit together."""
    several, draws = args.ablation or args.seeds, args.sample_only
    may_share = hasattr(step, "SEVERAL_PROCESSES") and not (several or draws or args.minutes)
    shares = is_torchelastic_launched()
    contradictions = {
        "--model needs --sample-only: training begins from new weights": args.model and not draws,
        "--minutes is not allowed with --epochs": args.minutes and "num_epochs" in args,
        "--complete needs --sample-only": getattr(args, "complete", None) and not draws,
        "--digit needs --conditional": getattr(args, "digit", None) is not None and not args.conditional,
        "there is nothing to draw: leave out --sample-only": draws and not hasattr(step, "sample"),
        "--sample-only draws one run: leave out --ablation and --seeds": several and draws,
        "this takes one process: start it with python, not with torchrun": shares and not may_share,
    }
    for message, applies in contradictions.items():
        if applies:
            parser.error(message)


def differences(parser, args, options, preset, own):
    """List how a run differs from the reported one, with the options `preset`, such as ["dropout=0.4", "seed=3"]."""

    def spell(value):
        if isinstance(value, (tuple, list)):
            return "-".join(map(spell, value))
        text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        return text.removesuffix(".0").replace("/", "_")

    changed = {name: value for name, value in options.items() if value != preset[name]}
    for name in (*own, "seed", "minutes", "dataset", "count", "seeds"):
        if getattr(args, name) != parser.get_default(name):
            changed[name] = getattr(args, name)
    marks = [name for name in ("held_out", "dry_run", "sample_only") if getattr(args, name)]
    return [f"{name.replace('num_epochs', 'epochs')}={spell(each)}" for name, each in changed.items()] + marks


def default_folder(step, variant, parts):
    """Return where a run writes without --out-dir: below runs/, which git ignores, if it differs in some `parts`."""
    folder = ROOT / "results" / step
    if variant:
        folder = folder / "variants" / variant
    return folder / "runs" / ",".join(parts) if parts else folder


def shorter_runs(step, variant, parts, num_epochs, usual):
    """Return the folders of runs that differ from this one in fewer epochs alone, the `usual` number or one found."""
    others = [part for part in parts if not part.startswith("epochs=")]
    names = [each.name for each in (default_folder(step, variant, []) / "runs").glob("epochs=*")]
    found = {usual, *(int(count) for name in names for count in re.findall(r"^epochs=(\d+)", name))}
    counts = sorted((n for n in found if n < num_epochs), reverse=True)
    return [default_folder(step, variant, [*[f"epochs={n}"] * (n != usual), *others]) for n in counts]


def main(step, argv=None):
    """Run the command of a step, a module, with a list of flags; return its exit code."""
    return exit_code(lambda: run_command(step, argv or []), Path(step.__file__).name)


def list_variants(variants):
    for name, (question, changes) in variants.items():
        shown = ", ".join(f"{key}={value}" for key, value in changes.items())
        machine.say(f"{name:20}{question} ({shown})")


def run_command(step, argv):
    """Choose the options and the folder, then train, draw, or start several runs."""
    specs = read_options(step.train) | (read_options(step.NETWORK) if hasattr(step, "NETWORK") else {})
    parser, own = make_parser(step, specs)
    args = parser.parse_args(argv)
    refuse_contradictions(parser, args, step)
    options, preset = choose_options(parser, args, specs, step.VARIANTS)
    if args.list_variants:
        return list_variants(step.VARIANTS)
    words = [each.replace(f"{ROOT}{os.sep}", "") for each in argv if each not in ("--resume", "--restart")]
    args.command = " ".join([parser.prog, *words])  # the same for a run that was interrupted
    name = step.CONDITIONAL_STEP if getattr(args, "conditional", False) else step.STEP
    parts = differences(parser, args, options, preset, own)
    if args.ablation:  # its variants share a folder
        parts = [each for each in parts if each != "held_out"]
        parts = ["ablation", *parts] if parts or args.variant else []
    folder = args.out_dir or default_folder(name, None if args.ablation else args.variant, parts)
    if args.ablation or args.seeds:
        return ablation.run_all(step, folder, args, argv, default_folder(name, args.variant, []))
    with contextlib.closing(Run(name, args, options, folder)) as run:
        if args.sample_only:
            # The seed, the number of images and the step's own flags choose what is drawn, not the network.
            other = ("seed", "count", "sample_only", *own)
            trained = [part for part in parts if part.partition("=")[0] not in other]
            path = args.model or default_folder(name, args.variant, trained) / "model.pt"
        else:
            epochs = options["num_epochs"], preset["num_epochs"]
            run.claim_folder([] if args.out_dir else shorter_runs(name, args.variant, parts, *epochs))
        machine.say(f"results go to {folder}")
        sets = load_data(args.data_dir, args.dataset, run.device, args.held_out)
        if args.sample_only:
            step.sample(run, path, sets[1])
        else:
            train(step, run, *sets)
        if run.unwritten:
            hint = "close what holds them and repeat, a training with --resume"
            raise UserError(f"{', '.join(sorted(run.unwritten))} could not be written: {hint}")


def train(step, run, train_set, test_set):
    """Say what is to come, then train and evaluate."""
    args = run.args
    length = f"{args.minutes:g} min" if args.minutes else f"{run.options['num_epochs']} epochs"
    line = f"training for {length} on {machine.hardware(run.device)}"
    took = files.read_if_there(default_folder(run.step, args.variant, []) / "metrics.json").get("wall_time")
    if took and not args.dry_run:
        line += f"; the reported run took {took['value'] / 60:.0f} min on {took['hardware']}"
    machine.say(line)
    if args.count:
        machine.say(f"--count {args.count} changes the number of images in samples.png, not the training")
    metrics.say_what_is_left_out(args.dataset)
    step.train_and_evaluate(run, run.limit(*train_set), test_set)
    if args.dry_run:
        machine.say("this was a dry run: its numbers mean nothing")


def exit_code(work, name):
    """Call `work()` and return the exit code: 0, 2 if a flag, a file or the machine is at fault, 128 + a signal.

    Other exceptions are mistakes in code and keep their traceback.
    """
    machine.open_streams()
    machine.keep_freed_memory()
    try:
        work()
        return 0
    except SystemExit as end:  # of argparse
        return end.code or 0
    except UserError as error:
        message, code = str(error), 2
    except KeyboardInterrupt as stop:  # of a run or an ablation, with the signal and what to do next
        number, hint = stop.args if len(stop.args) == 2 else (signal.SIGINT, "interrupted")
        message, code = f"stopped by {signal.Signals(number).name}; {hint}", 128 + number
    except (RuntimeError, MemoryError) as error:
        if not files.lacks_memory(error):
            raise
        message, code = "there is too little memory: lower --batch-size or, with --sample-only, --count", 2
    machine.say(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code
