"""Several runs of a step, over variants and seeds, and a table of their metrics.

A step's ABLATION may have
    length      flags for the length of each run, unless the command line or a variant sets it
    flags       further flags of each run
    left_out    variants that --ablation leaves out, unless --variant asks for one
    num_seeds   how often the default and each variant are trained, unless --seeds says it
"""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
from multiprocessing.pool import ThreadPool

from tqdm import tqdm

from utils import files, machine
from utils.checkpoint import is_finished
from utils.files import UserError
from utils.options import ArgumentParser

NO_SETTINGS = dict(length=(), flags=(), left_out=(), num_seeds=(3, 2))


class Planned:
    """One of the runs: the name of its variant, of which None is the default, its seed and its folder."""

    def __init__(self, step, name, seed, folder):
        self.script, self.name, self.seed, self.folder = step.__file__, name, seed, folder
        self.changes = step.VARIANTS[name][1] if name else {}

    def is_begun(self):
        """Tell whether the folder has a run with these options. A variant may have been edited meanwhile."""
        config = files.read_if_there(self.folder / "config.json")
        wanted = json.loads(json.dumps(self.changes))  # tuples as lists
        return bool(config) and wanted.items() <= config.get("hyperparameters", {}).items()

    def is_complete(self):
        """Tell whether the run is finished, and has left what tables and figures need."""
        needed = all((self.folder / name).exists() for name in ("losses.csv", "model.pt"))
        return needed and is_finished(self.folder) and self.is_begun()

    def command(self, flags, length, restart):
        """Return what to call the run, and its command line."""
        words = [sys.executable, self.script, *flags, "--seed", str(self.seed), "--out-dir", str(self.folder)]
        words += [] if "num_epochs" in self.changes else length
        words += ["--variant", self.name] if self.name else []
        if (self.folder / "checkpoint.pt").exists():
            words += ["--resume" if not restart and self.is_begun() else "--restart"]
        return f"{self.name or 'default'}, seed {self.seed}", words


def run_all(step, folder, args, argv, reported):
    """Train one configuration with several seeds, or with --ablation the default and the variants.

    An ablation is there to choose by, so it is evaluated on held-out training images. Each run is a process of its
    own: on the CPU as many at once as there are cores, with one thread each, and one at a time on a GPU. Finished
    runs are kept and interrupted ones go on, unless --restart is given. A run that fails does not stop the others.
    The runs go into ablation/ or seeds/ below the folder, and the table into ablation.csv or seeds.csv beside that.
    `args` and `argv` are the command line, parsed and as a list. `reported` is the folder of the reported run.
    """
    settings = {**NO_SETTINGS, **getattr(step, "ABLATION", {})}
    top = folder / ("ablation" if args.ablation else "seeds")
    names = [None, *step.VARIANTS] if args.ablation else [args.variant]
    asked = [name for name in names if name not in settings["left_out"]]
    if args.variant:
        asked = [name for name in names if name in (None, args.variant)]
    of_default, of_variant = settings["num_seeds"]
    planned = {}  # of each name a list, a run for each seed
    for name in names:
        below = ("variants", name) if name and args.ablation else ()
        seeds = range(args.seed, args.seed + (args.seeds or (of_variant if name else of_default)))
        planned[name] = [Planned(step, name, seed, top.joinpath(f"seed_{seed}", *below)) for seed in seeds]

    with files.lock(top):
        flags, length = common_flags(step, settings, args, argv)
        keep_flags(top, [*length, *flags])
        runs = [each for name in asked for each in planned[name]]
        to_do = [each for each in runs if args.restart or not each.is_complete()]
        machine.say(f"{len(to_do)} of {len(runs)} runs to do{duration(reported, args, len(to_do))}")
        machine.say(f"results go to {top}")
        train_all([each.command(flags, length, args.restart) for each in to_do], args.device)

    # Variants of earlier calls keep their rows.
    shown = [name for name in names if name in asked or all(each.is_complete() for each in planned[name])]
    folders = {name or "default": [each.folder for each in planned[name]] for name in shown}
    write_table(top.with_suffix(".csv"), folders)
    if args.ablation and hasattr(step, "draw_ablation"):
        step.draw_ablation(folder, {name: of_seeds[0] for name, of_seeds in folders.items()})


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
    own_length = args.variant in settings["left_out"] and "num_epochs" in step.VARIANTS[args.variant][1]
    length = [] if args.minutes or "num_epochs" in args or own_length else settings["length"]
    return ["--held-out", *settings["flags"], *given], length


def num_workers(device):
    """Return how many runs to train side by side: one for each core of a CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores if machine.find_device(device).type == "cpu" else 1


def duration(reported, args, count):
    """Return how long so many runs take, by the time of the reported run, as text."""
    took = files.read_if_there(reported / "metrics.json").get("wall_time")
    if not took or args.dry_run or not count:
        return ""
    minutes = took["value"] / 60 * count / min(count, num_workers(args.device))
    return f", at most {minutes:.0f} minutes with the length and speed of the reported run"


def train_all(commands, device):
    """Run (name, command) pairs, side by side on the CPU; raise UserError at the end if some failed.

    A signal to this process, or its end, ends the runs after the batch under way, with their checkpoints saved.
    """
    workers = max(1, min(num_workers(device), len(commands)))
    settings = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # In a session of its own, a signal of the terminal reaches a run through this process alone.
    settings |= dict(start_new_session=True, preexec_fn=end_with_parent if sys.platform == "linux" else None)
    if workers > 1:
        settings["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes, failures = [], []

    def train(command):
        """Return the exit code of a run, and what to print about it."""
        name, words = command
        process = subprocess.Popen(words, **settings)
        processes.append(process)
        errors = process.communicate()[1].decode(errors="replace").splitlines()
        code = process.returncode
        return code, f"{name}: {[f'exit code {code}', *errors][-1] if code else 'done'}"

    with machine.catch_signals(stop), ThreadPool(workers) as pool:
        try:
            ended = pool.imap_unordered(train, commands)
            for code, line in tqdm(ended, "runs", len(commands), disable=None):
                failures += [line] if code else []
                with tqdm.external_write_mode():
                    machine.say(line)
        finally:
            pool.terminate()  # so that no other begins
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    if failures:
        raise UserError(f"{len(failures)} of {len(commands)} runs failed, hence no table; {failures[0]}")


def stop(number, _):
    raise KeyboardInterrupt(number, "the same command goes on")


def end_with_parent():
    """Let Linux send SIGTERM to this process when its parent ends."""
    set_parent_death_signal = 1  # prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def keep_flags(folder, flags):
    """Write the flags of the runs into flags.json. Earlier runs in the folder must have the same flags."""
    path = folder / "flags.json"
    kept = files.read_json(path, "remove it, or name another --out-dir", list) if path.exists() else flags
    if kept != flags:
        theirs = " ".join(kept) or "(none)"
        raise UserError(f"the runs in {folder} have the flags {theirs}: take these or another --out-dir")
    files.write_json(path, flags)


def write_table(path, folders):
    """Write and print the mean and standard deviation of each metric over the seeds, whose `folders` a variant has."""
    results = [[files.read_json(each / "metrics.json") for each in of_seeds] for of_seeds in folders.values()]
    rows = [{"variant": name, "seeds": len(of_seeds)} for name, of_seeds in folders.items()]
    for key in results[0][0]:
        for row, of_seeds in zip(rows, results):
            values = [each[key]["value"] for each in of_seeds if key in each]
            row[f"{key}_mean"] = statistics.fmean(values) if values else None
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    files.write_atomically(path, files.csv_text(rows).encode())
    shown = [["seeds", *(str(row["seeds"]) for row in rows)]]
    for key in results[0][0]:
        pairs = [(row[f"{key}_mean"], row[f"{key}_std"]) for row in rows]
        shown.append(
            [key, *(" ± ".join(f"{each:.4g}" for each in pair if each is not None) for pair in pairs)]
        )
    machine.say(f"{files.aligned([['metric', *folders], *shown])}\nthis table is in {path}")
