"""Several runs of a step script, over variants and seeds, side by side, and a table of their figures."""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

from utils import parallel
from utils.runs import (
    ArgumentParser,
    UserError,
    find_device,
    lock,
    make_folder,
    results_folder,
    run_folder,
    write_csv,
    write_json,
)

DEFAULT_SEEDS = 3


def run_all(script, step, args, variants, length, flags=(), left_out=()):
    """Train `--seeds` times the default or `--variant`; with `--ablation` the default and that or every variant.

    An ablation is there to choose by, so it is evaluated on held-out training images.

    Each run goes into ablation/seed_S or seeds/seed_S below the results and is a process of its own: as many at
    once as there are cores on the CPU, with one thread each if they are several, and one at a time on a GPU. With
    `--resume` finished runs are kept as they are and interrupted ones go on; it takes the flags of the first time,
    which flags.json beside them keeps. The table, ablation.csv or seeds.csv, has the mean and standard deviation of
    every figure that the first run has. A run that fails does not keep the others from being run, but there is no
    table then.

    Args:
        variants: all of the step's; `left_out` names those that `--ablation` leaves out without `--variant`.
        length: flags for how long each run of an ablation trains, unless the command line says so or the variant
            sets `num_epochs`. A variant that is left out because it does is compared with the default at full length.
        flags: more of its flags, before those of the command line, which win.

    Returns:
        Folder of the run with the first seed by the variant's name, the default's by "default".
    """
    if parallel.launched():
        raise UserError(
            "several runs use all the cores by themselves: start them with python, not with torchrun"
        )
    folder = results_folder(step, args)
    if args.ablation:
        comparable = [name for name in variants if name not in left_out]
        names = [None, *([args.variant] if args.variant else comparable)]
    else:
        names = [args.variant]
    place_of_all = folder / ("ablation" if args.ablation else "seeds")
    seeds = range(args.seed, args.seed + (args.seeds or DEFAULT_SEEDS))
    runs = [(name, seed) for name in names for seed in seeds]
    on_cpu = find_device(args.device).type == "cpu"
    workers = min(
        len(runs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    workers = workers if on_cpu else 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if workers > 1 else None
    given = _other_flags()
    if args.ablation:
        given = ["--held-out", *flags, *given]
    at_full_length = args.variant in left_out and "num_epochs" in variants[args.variant][1]
    if not args.ablation or args.num_epochs or args.minutes or at_full_length:
        length = ()

    def place(name, seed):
        return run_folder(place_of_all / f"seed_{seed}", name)

    def train(name, seed):
        where = place(name, seed)
        if args.resume and _finished(where):
            return json.loads((where / "metrics.json").read_text())
        own_length = name is not None and "num_epochs" in variants[name][1]
        command = [
            sys.executable,
            str(script),
            *(() if own_length else length),
            *given,
            "--seed",
            str(seed),
            "--out-dir",
            str(place(None, seed)),
        ]
        command += ["--variant", name] if name else []
        command += ["--resume"] if args.resume and (where / "checkpoint.pt").exists() else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (
                done.stderr.strip().splitlines()[-1]
                if done.stderr.strip()
                else f"exit code {done.returncode}"
            )
            raise UserError(f"the run of {name or 'default'} with seed {seed} failed: {reason}")
        return json.loads((where / "metrics.json").read_text())

    make_folder(place_of_all)
    with lock(place_of_all):
        _keep_flags(place_of_all, [*length, *given], args.resume)
        results = _train_all(train, runs, workers)
    path = place_of_all.with_suffix(".csv")
    write_csv(path, _table(names, seeds, results))
    print(f"table in {path}")
    return {name or "default": place(name, args.seed) for name in names}


def _train_all(train, runs, workers):
    """The results of `train(name, seed)` for all of the runs, so many at once, by name and seed.

    Raises:
        UserError: some have failed; the others have been run all the same.
    """
    results, failures = {}, []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(train, *run): run for run in runs}
        try:
            for future in tqdm(as_completed(futures), "runs", total=len(runs), disable=None):
                name, seed = futures[future]
                try:
                    results[name, seed] = future.result()
                    tqdm.write(f"{name or 'default'}, seed {seed}: done")
                except UserError as error:  # a variant that diverges does not keep the others from their runs
                    failures.append(str(error))
                    tqdm.write(str(error))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise UserError(f"{len(failures)} of {len(runs)} runs failed, so there is no table; {failures[0]}")
    return results


def _keep_flags(folder, given, resume):
    """Write the flags of the runs into flags.json; those of runs that are gone on with have to be the same."""
    path = folder / "flags.json"
    if resume and path.exists():
        kept = json.loads(path.read_text())
        if kept != given:
            raise UserError(
                f"the runs in {path.parent} have the flags {' '.join(kept) or '(none)'}: resume with the same, or "
                "start anew without --resume"
            )
        return
    write_json(path, given)


def _finished(folder):
    """Whether a run has left all that a table and its figures take, later than a checkpoint that is still there."""
    metrics, checkpoint = folder / "metrics.json", folder / "checkpoint.pt"
    if not all((folder / name).exists() for name in ("metrics.json", "losses.csv", "model.pt")):
        return False
    return not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > metrics.stat().st_mtime_ns)


def _other_flags():
    """The command line without the flags that are not passed on as they are."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--ablation", "--resume"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--seeds", "--seed", "--out-dir", "--variant"):
        parser.add_argument(flag)
    return parser.parse_known_args()[1]


def _table(names, seeds, results):
    """Columns: the variant, the number of seeds, then mean and standard deviation of each metric of the first run."""
    table = {"variant": [name or "default" for name in names], "seeds": [len(seeds)] * len(names)}
    for key in results[names[0], seeds[0]]:
        found = [[results[name, seed].get(key, {}).get("value") for seed in seeds] for name in names]
        values = [[value for value in each if value is not None] for each in found]
        table[f"{key}_mean"] = [statistics.fmean(each) if each else None for each in values]
        table[f"{key}_std"] = [statistics.stdev(each) if len(each) > 1 else None for each in values]
    return table
