"""The files that a training run keeps up: its tables, its checkpoint, and whose folder it is."""

import contextlib
import math
import shutil
import sys

from torch.optim.lr_scheduler import LRScheduler

from utils import files, machine, parallel
from utils.data import DATASETS
from utils.files import UserError

VERSION = 4  # of the layout of checkpoint.pt
KEPT = "the checkpoint before it is kept; lower the learning rate or choose another --seed"


class Table:
    """A CSV file that grows by rows: its columns in memory, its length on disk, and the text not yet written.

    The columns hold what the file holds, so that a resumed run goes on with the same numbers. What lies beyond the
    length is cut: it was written after the checkpoint. A file shorter than that raises UserError.
    """

    def __init__(self, path, length=0, pending=""):
        self.path, self.length, self.pending, self.columns = path, length, pending, {}
        written = path.read_bytes()[:length] if length and path.exists() else b""
        if len(written) < length:
            raise UserError(f"{path} is shorter than it was at the checkpoint: begin anew with --restart")
        for row in files.read_rows((written.decode() + pending).splitlines()):
            self._keep(row)

    def _keep(self, row):
        for name, value in row.items():
            self.columns.setdefault(name, []).append(value)

    def add(self, row):
        """Add a row, a dict; None leaves a cell empty."""
        self.pending += files.csv_text([row], with_header=not self.columns)
        self._keep({name: files.read_cell(files.cell(value)) for name, value in row.items()})

    def write(self):
        """Append the rows to the file."""
        if self.pending:
            self.length = files.append(self.path, self.length, self.pending)
            self.pending = ""


class Means:
    """Running means of the losses of batches, weighted by their numbers of images."""

    def __init__(self, sums=None):
        self.sums = sums or {}

    def add(self, losses, num_images):
        for name, value in losses.items():
            total, images = self.sums.get(name, (0.0, 0))
            if value is not None:
                total, images = total + value * num_images, images + num_images
            self.sums[name] = total, images

    def pop(self):
        """Return the means by name, None for a loss that no batch had, and start new ones."""
        means = {name: total / images if images else None for name, (total, images) in self.sums.items()}
        self.sums = {}
        return means


class Records:
    """The tables of a run, and the means of its losses over an epoch and over a row of batches.csv."""

    def __init__(self, folder):
        self._folder, self._tables = folder, {}
        self.of_epoch, self.of_row = Means(), Means()
        self.unwritten = []  # names of files that could not be written

    @property
    def columns(self):
        return {name: table.columns for name, table in self._tables.items()}

    def log(self, table, row):
        """Add a row, a dict, to a table; raise UserError if a number is not finite."""
        require_finite(row, f"in the row of epoch {row.get('epoch')} of {table}.csv")
        self._tables.setdefault(table, Table(self._folder / f"{table}.csv")).add(row)

    def write(self):
        """Append the new rows to the files."""
        for name, table in self._tables.items():
            if parallel.is_first():
                self.attempt(f"{name}.csv", table.write)

    def attempt(self, name, write):
        """Call `write()`; if it fails, warn once and go on, because only the checkpoint is worth stopping for."""
        try:
            write()
            self.unwritten = [each for each in self.unwritten if each != name]
        except UserError as error:
            if name not in self.unwritten:
                machine.say(f"warning: {error}", file=sys.stderr)
                self.unwritten.append(name)

    def state(self):
        tables = {name: (table.length, table.pending) for name, table in self._tables.items()}
        return {"tables": tables, "of_epoch": self.of_epoch.sums, "of_row": self.of_row.sums}

    def restore(self, state, folder):
        """Go on from a state; `folder` has the files, which are copied if it is another one."""
        for name in state["tables"] if folder != self._folder else ():
            with contextlib.suppress(OSError):  # a missing file is found below
                shutil.copy(folder / f"{name}.csv", self._folder)
        self.of_epoch, self.of_row = Means(state["of_epoch"]), Means(state["of_row"])
        for name, (length, pending) in state["tables"].items():
            self._tables[name] = Table(self._folder / f"{name}.csv", length, pending)


# ---------------------------------------------------------------------------------------------------------
# The folder


def claim(folder, step, args, shorter):
    """Lock the folder of a run; return the lock, and with --resume the checkpoint's content and folder, else None.

    Args:
        shorter: folders of the same run with fewer epochs, whose checkpoint is taken if the folder has none.

    Raises:
        UserError: there is no checkpoint, or a new run would overwrite what it should not.
    """
    files.make_folder(folder)
    lock = files.lock(folder) if parallel.is_first() else None
    if not args.resume:
        if lock and not args.restart:
            require_free(folder, step, args)
        return lock, None, folder
    found = [each for each in (folder, *shorter) if (each / "checkpoint.pt").is_file()]
    if not found:
        raise UserError(f"there is no checkpoint at {folder / 'checkpoint.pt'}: train without --resume")
    content = files.load_tensors(found[0] / "checkpoint.pt", (step,), "checkpoint")
    if content.get("version") != VERSION:
        raise UserError(f"{found[0] / 'checkpoint.pt'} is of another version: begin anew with --restart")
    return lock, content, found[0]


def require_free(folder, step, args):
    """Raise UserError if a new run in the folder would overwrite an unfinished run or results of something else."""
    hint = "name another --out-dir, or add --restart to replace it"
    config, names = folder / "config.json", ("metrics.json", "losses.csv", "model.pt")
    if args.out_dir and (config.exists() or any((folder / name).exists() for name in names)):
        found = files.read_json(config, hint).get("step")
        if found != step:
            raise UserError(f"{folder} holds results of {found}: {hint}")
    own_place = args.dry_run and not args.out_dir  # where nothing is lost
    if (folder / "checkpoint.pt").exists() and not own_place and not is_finished(folder):
        raise UserError(f"{folder} holds an unfinished run: --resume goes on, --restart begins anew over it")


def is_finished(folder):
    """Tell whether a run has written its metrics, and its checkpoint, where there is one, is of a finished run."""
    path = folder / "checkpoint.pt"
    finished = not path.exists() or files.load_tensors(path, None, "checkpoint").get("finished", False)
    return finished and (folder / "metrics.json").exists()


def describe(run):
    """Return the content of config.json: what a run is, and where it is made."""
    args = run.args
    return {
        "step": run.step,
        "variant": args.variant or "default",
        "dry_run": args.dry_run,
        "evaluated_on": "last 10,000 training images" if args.held_out else "test images",
        "dataset": args.dataset,
        "seed": args.seed,
        "minutes": args.minutes,
        "processes": parallel.num_processes(),
        "device": str(run.device),
        "hardware": machine.hardware(run.device),
        "bfloat16_units": machine.has_bfloat16_units(run.device),
        "command": args.command,
        "hyperparameters": run.options,
        "versions": machine.versions(),
    }


# ---------------------------------------------------------------------------------------------------------
# The checkpoint


def restore(modules, content, identity, path):
    """Load the states of a checkpoint into networks, optimisers and schedules, by name.

    Raises UserError unless it belongs to a run of the same `identity`. More epochs are allowed, but not with a
    schedule, whose learning rates depend on their number.
    """
    theirs, hint = content["identity"], "resume with the same flags, or begin anew with --restart"
    different = [key for key in {**theirs, **identity} if theirs.get(key) != identity.get(key)]
    if different == ["num_epochs"] and any(isinstance(each, LRScheduler) for each in modules.values()):
        why = "its learning rates follow that number: train anew with --epochs"
        raise UserError(f"{path} was trained for {theirs['num_epochs']} epochs, and {why}")
    more_epochs = different == ["num_epochs"] and identity["num_epochs"] > theirs["num_epochs"]
    for key in () if more_epochs else different:
        raise UserError(f"{path} was trained with {key} {theirs.get(key)}, not {identity.get(key)}: {hint}")
    for name, each in modules.items():
        files.load_state(each, content["modules"].get(name, {}), path, "begin anew with --restart")


def require_finite(values, where):
    """Raise UserError if a number of the dict `values` is not finite; `where` says in which batch."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} became {value} {where}: {KEPT}")


def states(modules, where):
    """Return the states of networks, optimisers and schedules by name; raise UserError if a number is not finite."""
    found = {name: each.state_dict() for name, each in modules.items()}
    if not files.all_finite(found):
        raise UserError(f"{where} gave numbers that are not finite: {KEPT}")
    return found


def headline(names, metrics, run):
    """Yield a line for each named metric, with its value in the step's reported run where they compare."""
    path = files.ROOT / "results" / run.step / "metrics.json"
    reported = files.read_json(path) if path.exists() and run.args.dataset == DATASETS[0] else {}
    for name in filter(metrics.get, names):
        ours, theirs = metrics[name], reported.get(name, {})
        # Other pixels are on another scale.
        comparable = all(theirs.get(key) == ours.get(key) for key in ("unit", "binarization", "pixels"))
        beside = f"reported {theirs['value']:.4g}; " if comparable else ""
        yield f"{name.replace('_', ' ')}: {ours['value']:.4g} ({beside}{ours['unit']})"
