"""Several runs of a step, over variants and seeds, and a table of their metrics.

A step's ABLATION may have
    length      flags for the length of each run, unless the command line or a variant sets it
    flags       further flags of each run
    left_out    variants that --ablation leaves out, unless --variant asks for one
    num_seeds   how often the default and each variant are trained, unless --seeds says it
"""

import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

from utils import files, machine
from utils.checkpoint import is_finished
from utils.files import UserError
from utils.options import ArgumentParser

NO_SETTINGS = dict(length=(), flags=(), left_out=(), num_seeds=(3, 2))


def run_all(step, folder, args, argv):
    """Train one configuration with several seeds, or with --ablation the default and the variants.

    An ablation is there to choose by, so it is evaluated on held-out training images. Each run is a process of its
    own: on the CPU as many at once as there are cores, with one thread each, and one at a time on a GPU. Finished
    runs are kept and interrupted ones go on, unless --restart is given. A run that fails does not stop the others.

    Args:
        step: module of the step.
        folder: the runs go into ablation/ or seeds/ below it, the table into ablation.csv or seeds.csv beside that.
        args, argv: the command line, parsed and as a list.
    """
    settings = {**NO_SETTINGS, **getattr(step, "ABLATION", {})}
    top = folder / ("ablation" if args.ablation else "seeds")
    names = [args.variant]
    if args.ablation:
        compared = [name for name in step.VARIANTS if name not in settings["left_out"]]
        names = [None, *([args.variant] if args.variant else compared)]
    of_default, of_variant = settings["num_seeds"]

    def places(name):
        """Return the folders of a variant's runs, by seed."""
        below = ("variants", name) if name and args.ablation else ()
        count = args.seeds or (of_variant if name else of_default)
        return {seed: top.joinpath(f"seed_{seed}", *below) for seed in range(args.seed, args.seed + count)}

    files.make_folder(top)
    with files.lock(top):
        flags, length = common_flags(step, settings, args, argv)
        keep_flags(top, [*length, *flags])
        runs = [(name, seed, place) for name in names for seed, place in places(name).items()]
        to_do = [each for each in runs if args.restart or not is_complete(each[2], changes(step, each[0]))]
        machine.say(f"{len(to_do)} of {len(runs)} runs to do{duration(step, args, len(to_do))}")
        machine.say(f"results go to {top}")
        train_all([command(step, args, length, flags, *each) for each in to_do], args.device)

    def has_rows(name):  # those of earlier calls keep their rows
        complete = all(is_complete(place, changes(step, name)) for place in places(name).values())
        return name in names or (args.ablation and complete)

    shown = {name or "default": places(name) for name in [None, *step.VARIANTS] if has_rows(name)}
    write_table(top.with_suffix(".csv"), {name: [*of_seeds.values()] for name, of_seeds in shown.items()})
    if args.ablation and hasattr(step, "draw_ablation"):
        step.draw_ablation(folder, {name: of_seeds[args.seed] for name, of_seeds in shown.items()})


def changes(step, name):
    """Return the options that a variant changes; None is the default, which changes none."""
    return step.VARIANTS[name][1] if name else {}


def common_flags(step, settings, args, argv):
    """Return the flags of every run, and those of its length, which a variant may replace."""
    parser = ArgumentParser(add_help=False)  # of the flags that each run has of its own
    for flag in ("--ablation", "--resume", "--restart"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--seeds", "--seed", "--out-dir", "--variant"):
        parser.add_argument(flag)
    given = parser.parse_known_args(argv)[1]
    if not args.ablation:
        return given, []
    # A variant that is left out and has its own number of epochs is compared with the default at full length.
    own_length = args.variant in settings["left_out"] and "num_epochs" in changes(step, args.variant)
    length = [] if args.minutes or "num_epochs" in args or own_length else settings["length"]
    return ["--held-out", *settings["flags"], *given], length


def command(step, args, length, flags, name, seed, place):
    """Return what to call a run, and its command line."""
    words = [sys.executable, step.__file__, *flags, "--seed", str(seed), "--out-dir", str(place)]
    words += [] if "num_epochs" in changes(step, name) else length
    words += ["--variant", name] if name else []
    if (place / "checkpoint.pt").exists():
        words += ["--resume"] if has(place, changes(step, name)) and not args.restart else ["--restart"]
    return f"{name or 'default'}, seed {seed}", words


def duration(step, args, count):
    """Return how long so many runs take, by the time of the reported run, as text."""
    path = files.ROOT / "results" / step.STEP / "metrics.json"
    if not path.exists() or args.dry_run:
        return ""
    minutes = files.read_json(path)["wall_time"]["value"] / 60 * count / num_workers(count, args.device)
    return f", at most {minutes:.0f} minutes with the length and speed of the reported run"


def num_workers(count, device):
    """Return how many of so many runs to train side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(count, cores)) if machine.find_device(device).type == "cpu" else 1


def train_all(commands, device):
    """Run (name, command) pairs, side by side on the CPU; raise UserError at the end if some failed.

    A signal to this process, or its end, ends the runs after the batch under way, with their checkpoints saved.
    """
    workers = num_workers(len(commands), device)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if workers > 1 else None
    waiting, running, failures = [*commands], {}, []
    handlers = machine.catch_signals(machine.raise_stopped)
    try:
        with tqdm(total=len(commands), desc="runs", disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    name, words = waiting.pop(0)
                    errors = tempfile.TemporaryFile()
                    running[start(words, environment, errors)] = name, errors
                time.sleep(0.1)
                for process in [each for each in running if each.poll() is not None]:
                    failures += report(process, *running.pop(process))
                    bar.update()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        machine.restore_signals(handlers)
    if failures:
        raise UserError(f"{len(failures)} of {len(commands)} runs failed, hence no table; {failures[0]}")


def start(words, environment, errors):
    """Start a run in a session of its own: a signal of the terminal reaches it through this process alone."""
    end = end_with_parent if sys.platform == "linux" else None
    more = dict(env=environment, stderr=errors, preexec_fn=end)
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True, **more)


def end_with_parent():
    """Let the system send SIGTERM to this process when its parent ends."""
    set_parent_death_signal = 1  # prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def report(process, name, errors):
    """Print how a run has ended; return a list of its failure, empty if there is none."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
    result = f"{name}: {lines[-1] if process.returncode else 'done'}"
    with tqdm.external_write_mode():
        machine.say(result)
    return [result] if process.returncode else []


def keep_flags(folder, flags):
    """Write the flags of the runs into flags.json. Earlier runs in the folder must have the same flags."""
    path = folder / "flags.json"
    kept = json.loads(path.read_text()) if path.exists() else flags
    if kept != flags:
        theirs = " ".join(kept) or "(none)"
        raise UserError(f"the runs in {folder} have the flags {theirs}: take these or another --out-dir")
    files.write_json(path, flags)


def is_complete(folder, options):
    """Tell whether a run with these options is finished, and has left what tables and figures need."""
    needed = all((folder / name).exists() for name in ("losses.csv", "model.pt"))
    return needed and is_finished(folder) and has(folder, options)


def has(folder, options):
    """Tell whether the run in a folder has these options. A variant may have been edited meanwhile."""
    if not (folder / "config.json").exists():
        return False
    theirs = files.read_json(folder / "config.json")["hyperparameters"]
    return all(theirs.get(name) == json.loads(json.dumps(value)) for name, value in options.items())


def write_table(path, folders):
    """Write and print the table of runs; `folders` has the folders of the seeds by the name of the variant.

    Its columns are the variant, the number of seeds, then mean and standard deviation over the seeds of each metric
    that the first run has.
    """
    results = [[files.read_json(each / "metrics.json") for each in of_seeds] for of_seeds in folders.values()]
    rows = [{"variant": name, "seeds": len(of_seeds)} for name, of_seeds in folders.items()]
    for key in results[0][0]:
        for row, of_seeds in zip(rows, results):
            values = [each[key]["value"] for each in of_seeds if key in each]
            row[f"{key}_mean"] = statistics.fmean(values) if values else None
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    text = files.csv_text(rows)
    files.write_atomically(path, text.encode())
    machine.say(f"{text}\nthis table is in {path}")
