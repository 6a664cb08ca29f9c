"""Several runs of a step, over variants and seeds, and a table of their metrics."""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

from utils import files, machine
from utils.checkpoint import is_finished
from utils.files import UserError


def run_all(script, folder, args, variants, given, length=(), flags=(), left_out=(), num_seeds=(3, 2)):
    """Train one configuration with several seeds, or with --ablation the default and the variants.

    An ablation is there to choose by, so it is evaluated on held-out training images. Each run is a process of its
    own: on the CPU as many at once as there are cores, with one thread each, and one at a time on a GPU. Finished
    runs are kept and interrupted ones go on, unless --restart is given. The flags of the runs are kept in flags.json,
    and later calls need the same flags. A run that fails does not stop the others.

    Args:
        folder: the runs go into ablation/ or seeds/ below it, the table into ablation.csv or seeds.csv beside that.
        variants: all variants of the step; --ablation leaves out those named in `left_out`, unless --variant asks.
        given: flags of the command line for every run.
        length: flags for the length of each run of an ablation, unless the command line or a variant sets one. A
            variant of `left_out` with its own number of epochs is compared with the default at full length.
        flags: further flags of each run of an ablation.
        num_seeds: how often the default and each variant are trained, unless --seeds says it.

    Returns:
        The folder of the run with the first seed by variant name, the default's by "default".
    """
    place_of_all = folder / ("ablation" if args.ablation else "seeds")
    names = _names(args, variants, left_out)
    given = [*(["--held-out", *flags] if args.ablation else []), *given]
    length = _length(args, variants, left_out, length)

    def seeds(name):
        of_default, of_variant = num_seeds
        return range(args.seed, args.seed + (args.seeds or (of_variant if name else of_default)))

    def place(name, seed):
        seed_folder = place_of_all / f"seed_{seed}"
        return seed_folder / "variants" / name if name and args.ablation else seed_folder

    changes = {name: variants[name][1] if name else {} for name in [None, *variants]}

    def is_complete(name, seed):
        return _is_complete(place(name, seed)) and _has(place(name, seed), changes[name])

    def command(name, seed):
        where = place(name, seed)
        length_flags = () if "num_epochs" in changes[name] else length
        words = [sys.executable, str(script), *length_flags, *given, "--seed", str(seed)]
        words += ["--out-dir", str(where)] + (["--variant", name] if name else [])
        return words + _begin(where, changes[name], args.restart)

    files.make_folder(place_of_all)
    with files.lock(place_of_all):
        _keep_flags(place_of_all, [*length, *given])
        runs = [(name, seed) for name in names for seed in seeds(name)]
        to_do = [run for run in runs if args.restart or not is_complete(*run)]
        machine.say(f"{len(to_do)} of {len(runs)} runs to do; results go to {place_of_all}")
        _train_all([(*run, command(*run)) for run in to_do], machine.find_device(args.device))
    possible = [None, *variants] if args.ablation else names
    earlier = [each for each in possible if all(is_complete(each, seed) for seed in seeds(each))]
    names = [each for each in possible if each in names or each in earlier]  # these keep their rows
    path = place_of_all.with_suffix(".csv")
    files.write_csv(path, table({name: [place(name, seed) for seed in seeds(name)] for name in names}))
    machine.say(f"table in {path}")
    return {name or "default": place(name, args.seed) for name in names}


def _names(args, variants, left_out):
    """Return the variants to train, None for the default."""
    if not args.ablation:
        return [args.variant]
    return [None, *([args.variant] if args.variant else [name for name in variants if name not in left_out])]


def _length(args, variants, left_out, length):
    """Return the flags for the length of the runs, none where something else sets it."""
    at_full_length = args.variant in left_out and "num_epochs" in variants[args.variant][1]
    return length if args.ablation and not (args.minutes or "num_epochs" in args or at_full_length) else ()


def _train_all(commands, device):
    """Run (variant, seed, command) triples, side by side on the CPU.

    Raises:
        UserError: some runs failed. The others have been run all the same.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(len(commands), cores)) if device.type == "cpu" else 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if workers > 1 else None

    def train(command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1] if done.returncode else None

    failures = []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(train, command): (name, seed) for name, seed, command in commands}
        try:
            for future in tqdm(as_completed(futures), "runs", total=len(commands), disable=None):
                name, seed = futures[future]
                failure = future.result()
                if failure:
                    failures.append(f"the run of {name or 'default'} with seed {seed} failed: {failure}")
                with tqdm.external_write_mode():
                    machine.say(failures[-1] if failure else f"{name or 'default'}, seed {seed}: done")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise UserError(f"{len(failures)} of {len(commands)} runs failed, hence no table; {failures[0]}")


def _keep_flags(folder, given):
    """Write the flags of the runs into flags.json. Earlier runs in the folder must have the same flags."""
    path = folder / "flags.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept != given:
            theirs = " ".join(kept) or "(none)"
            raise UserError(
                f"the runs in {folder} have the flags {theirs}: take the same flags or another --out-dir"
            )
        return
    files.write_json(path, given)


def _is_complete(folder):
    """Tell whether a run is finished and has left what tables and figures need."""
    return is_finished(folder) and all((folder / name).exists() for name in ("losses.csv", "model.pt"))


def _begin(folder, changes, restart):
    """Return the flag with which a run goes on or begins anew; a new one needs none."""
    if not (folder / "checkpoint.pt").exists():
        return []
    return ["--resume"] if _has(folder, changes) and not restart else ["--restart"]


def _has(folder, changes):
    """Tell whether the run in a folder has these hyperparameters. A variant may have been edited meanwhile."""
    if not (folder / "config.json").exists():
        return False
    theirs = json.loads((folder / "config.json").read_text())["hyperparameters"]
    return all(theirs.get(name) == json.loads(json.dumps(value)) for name, value in changes.items())


def table(folders):
    """Make the table of runs; `folders` has the folders of the seeds by the name of the variant, None for the default.

    Returns:
        Columns: the variant, the number of seeds, then mean and standard deviation over the seeds of each metric
        that the first run has.
    """
    results = {
        name: [json.loads((folder / "metrics.json").read_text()) for folder in of_seeds]
        for name, of_seeds in folders.items()
    }
    columns = {"variant": [name or "default" for name in results], "seeds": [*map(len, results.values())]}
    for key in next(iter(results.values()))[0]:
        found = [[each.get(key, {}).get("value") for each in of_seeds] for of_seeds in results.values()]
        values = [[value for value in each if value is not None] for each in found]
        columns[f"{key}_mean"] = [statistics.fmean(each) if each else None for each in values]
        columns[f"{key}_std"] = [statistics.stdev(each) if len(each) > 1 else None for each in values]
    return columns
