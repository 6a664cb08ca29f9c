"""The command line of a step: its variants, folders and exit codes, and the main that all steps share."""

import difflib
import hashlib
import json
import os
import sys
from pathlib import Path

from utils import ablation, machine, parallel
from utils.data import DATASETS, load_data
from utils.files import ROOT, UserError, lacks_memory
from utils.flags import ArgumentParser, make_parser
from utils.hyperparameters import hyperparameters
from utils.run import Run, Terminated

MAX_FOLDER_NAME = 100  # characters
DRY_RUN_EPOCHS = 2


def choose_options(parser, args, specs, variants):
    """Choose the hyperparameters of the run; --list-variants prints and exits.

    Returns:
        The options (defaults, changed by the variant, changed by the flags), and the same without the flags.
    """
    for name, (_, changes) in variants.items():
        for key, value in changes.items():
            if key not in specs:
                near = difflib.get_close_matches(key, specs, 1, cutoff=0)[0]
                parser.error(f"the variant {name!r} sets {key!r}, which does not exist: is it {near!r}?")
            try:
                specs[key].check(value)
            except ValueError as error:
                parser.error(f"the variant {name!r}: {error}")
    if args.list_variants:
        width = max(map(len, variants), default=0)
        for name, (reason, changes) in variants.items():
            shown = ", ".join(f"{key}={value}" for key, value in changes.items())
            machine.say(f"{name:{width}}  {reason} ({shown})")
        parser.exit()
    if args.variant is not None and args.variant not in variants:
        near = difflib.get_close_matches(args.variant, variants, 1, cutoff=0) or ["none"]
        parser.error(f"unknown variant {args.variant!r}, the nearest is {near[0]!r}: try --list-variants")
    if args.model and not args.sample_only:
        parser.error("--model needs --sample-only: training begins from new weights")
    if args.minutes and "num_epochs" in args:
        parser.error("--minutes is not allowed with --epochs")
    preset = {name: each.default for name, each in specs.items()}
    preset |= variants[args.variant][1] if args.variant else {}
    flags = {name: getattr(args, name) for name in specs if name in args}
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    options = {**preset, **flags}
    if args.dry_run:
        preset["num_epochs"] = options["num_epochs"] = min(options["num_epochs"], DRY_RUN_EPOCHS)
        args.minutes = None
    return options, preset


# ---------------------------------------------------------------------------------------------------------
# Folders


def differences(args, options, preset, own_defaults):
    """List how a run differs from the reported one, such as ["dropout=0.4", "seed=3"].

    Args:
        options, preset: hyperparameters of this run and of the reported one.
        own_defaults: the defaults of the flags that only this step has.
    """

    def spell(value):
        if isinstance(value, tuple):
            return "-".join(map(spell, value))
        if value is None or isinstance(value, bool):
            return str(value).lower()
        return f"{value:g}" if isinstance(value, float) else str(value)

    flags = {**own_defaults, "seed": 0, "minutes": None, "dataset": DATASETS[0], "count": None}
    changed = {name: value for name, value in options.items() if value != preset[name]}
    changed |= {name: getattr(args, name) for name in flags if getattr(args, name) != flags[name]}
    marks = [name for name in ("held_out", "dry_run", "sample_only") if getattr(args, name)]
    if "num_epochs" in changed:
        changed = {"epochs": changed.pop("num_epochs"), **changed}
    return [f"{name}={spell(value)}" for name, value in changed.items()] + marks


def default_folder(step, variant, parts):
    """Return where a run writes without --out-dir.

    Only the reported run, which has no differences (`parts`), writes into the committed folder. Any other run has a
    folder of its own below runs/, which git ignores.
    """
    folder = ROOT / "results" / step
    if variant:
        folder = folder / "variants" / variant
    return folder / "runs" / short_name(parts) if parts else folder


def short_name(parts):
    """Join the parts; cut a long name and end it in a hash of the whole."""
    name = ",".join(parts)
    if len(name) <= MAX_FOLDER_NAME:
        return name
    return name[: MAX_FOLDER_NAME - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------------------------------------
# The main of all steps


def main(
    argv, *, script, description, step, training, train_and_evaluate, variants, network=None, sample=None,
    conditional_step=None, several_processes=False, add_flags=None, draw_ablation=None, **ablation_options,
):  # fmt: skip
    """Run a step's command and return its exit code.

    Args:
        argv: list of flags; None for no flags.
        script, description: `__file__` and `__doc__` of the step script.
        step: name of the step and of its folder below results/; with --conditional it is `conditional_step`.
        training, network: functions whose keyword-only arguments are the hyperparameters.
        train_and_evaluate: called with (run, train_set, test_set); a set is (uint8 images, labels). In a dry run the
            training set has a few batches; `run.limit` cuts the test set where all of it would take long.
        sample: called with (run, path of model.pt, test_set) for --sample-only.
        variants: dict of name: (reason, changed hyperparameters).
        add_flags: called with an argparse group, to add the flags that only this step has.
        draw_ablation: called with (folder, folders of the runs by variant) after --ablation.
        ablation_options: length, flags and left_out of `ablation.run_all`.
    """
    specs = hyperparameters(training) | (hyperparameters(network, "network") if network else {})
    parser = make_parser(script, description, specs)
    own = parser.add_argument_group("this step")
    if conditional_step:
        own.add_argument("--conditional", action="store_true", help="train the class-conditional network")
    common = vars(parser.parse_args([]))
    if conditional_step:
        own.add_argument(
            "--digit", type=int, choices=range(10), metavar="D", help="digit of samples_digit.png (3)"
        )
    if add_flags:
        add_flags(own)
    own_defaults = {name: value for name, value in vars(parser.parse_args([])).items() if name not in common}

    def work():
        args = parser.parse_args(argv or [])
        args.command = _command(script, argv or [])
        options, preset = choose_options(parser, args, specs, variants)
        if conditional_step and args.digit is not None and not args.conditional:
            parser.error("--digit needs --conditional: the other network is not told a digit")
        name = conditional_step if conditional_step and args.conditional else step
        parts = differences(args, options, preset, own_defaults)
        if args.ablation or args.seeds:
            if parallel.launched():
                raise UserError("several runs use all cores: start with python, not with torchrun")
            folder = args.out_dir or _folder_of_several(name, args, parts)
            given = _flags_of_each_run(argv or [])
            folders = ablation.run_all(script, folder, args, variants, given, **ablation_options)
            if args.ablation and draw_ablation:
                draw_ablation(folder, folders)
            return
        folder = args.out_dir or default_folder(name, args.variant, parts)
        run = Run(name, args, options, folder, several_processes)
        try:
            _train_or_sample(run, parser, parts, own_defaults, train_and_evaluate, sample)
        finally:
            run.close()

    return exit_code(work, Path(script).name)


def _train_or_sample(run, parser, parts, own_flags, train_and_evaluate, sample):
    args = run.args
    machine.say(f"results go to {run.folder}")
    train_set, test_set = load_data(args.data_dir, args.dataset, run.device, args.held_out)
    if args.sample_only:
        if not sample:
            parser.error("--sample-only: there is nothing to draw")
        # The seed, the number of images and the step's own flags choose what is drawn, not the network.
        other = ("seed", "count", "sample_only", *own_flags)
        trained = [part for part in parts if part.partition("=")[0] not in other]
        default = default_folder(run.step, args.variant, trained) / "model.pt"
        return sample(run, args.model or default, test_set)
    machine.say(_plan(run))
    try:
        train_and_evaluate(run, run.limit(*train_set), test_set)
    except ValueError as error:
        if run.is_tracking:
            raise
        # A constructor refused a hyperparameter.
        raise UserError(f"{error} (--help lists the flags)") from None


def _plan(run):
    """Return a line about the training to come: its length, its hardware, and how long the reported run took."""
    args = run.args
    length = f"{args.minutes:g} minutes" if args.minutes else f"{run.options['num_epochs']} epochs"
    line = f"training for {length} on {machine.hardware(run.device)}"
    reported = default_folder(run.step, args.variant, []) / "metrics.json"
    if reported.exists() and not args.dry_run:
        took = json.loads(reported.read_text())["wall_time"]
        line += f"; the reported run took {took['value'] / 60:.0f} minutes on {took['hardware']}"
    return line


def _folder_of_several(step, args, parts):
    """Return the folder of --ablation or --seeds. Variants that are asked for one by one share a folder."""
    parts = [part for part in parts if part != "held_out"] if args.ablation else parts
    if args.seeds:
        parts = [*parts, f"seeds={args.seeds}"]
    if args.ablation:
        return default_folder(step, None, ["ablation", *parts] if parts or args.variant else [])
    return default_folder(step, args.variant, parts)


def _command(script, argv):
    """Return the command line as text, the same for a run that was interrupted.

    Paths inside the repository begin at its root.
    """
    words = [each.replace(f"{ROOT}{os.sep}", "") for each in argv if each not in ("--resume", "--restart")]
    return " ".join([Path(script).name, *words])


def _flags_of_each_run(argv):
    """Return the command line without the flags that `ablation.run_all` sets for each run."""
    parser = ArgumentParser(add_help=False)
    for flag in ("--ablation", "--resume", "--restart"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--seeds", "--seed", "--out-dir", "--variant"):
        parser.add_argument(flag)
    return parser.parse_known_args(argv)[1]


def exit_code(work, name):
    """Call `work()` and return the exit code of the process.

    It is 0, 2 after a mistake of the user, 130 after Ctrl-C and 143 after SIGTERM.
    """
    machine.keep_freed_memory()
    try:
        work()
    except UserError as error:
        return _complain(name, str(error), 2)
    except KeyboardInterrupt as stop:
        code = 143 if isinstance(stop, Terminated) else 130
        return _complain(name, "interrupted; --resume goes on from the checkpoint, if one was written", code)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return _complain(name, "there is too little memory: lower --batch-size", 2)
    except SystemExit as end:  # of argparse
        return end.code or 0
    return 0


def _complain(name, message, code):
    machine.say(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code
