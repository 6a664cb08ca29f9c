"""A training run: its epochs and batches, what it records, its checkpoint and its folder."""

import math
import os
import signal
import sys
import threading
import time

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

from utils import checkpoint, files, machine, parallel
from utils.data import DATASETS
from utils.files import UserError
from utils.hyperparameters import hyperparameters

DRY_RUN_BATCHES = 3


class Terminated(KeyboardInterrupt):
    """The system asked the training to end, with SIGTERM; its checkpoint is saved."""


class Run:
    """A training run of one step.

    Args:
        step: name of the step.
        args: the command line, with seed, device, minutes, resume and the other flags of `utils.cli`.
        options: dict of all hyperparameters.
        folder: Path of everything that the run writes.
        several_processes: whether the step can be trained by the processes of torchrun.

    Attributes:
        device: torch.device of the training.
        iteration: number of the batch under way, from 1, counted over all epochs; 0 before the first one.
        is_tracking: whether `track` has been called, so that files may have been written.
        tables: dict of tables by name, each a dict of columns; NAME is written to NAME.csv.
        snapshots: dict of uint8 images by epoch, kept in the checkpoint.
    """

    def __init__(self, step, args, options, folder, several_processes=False):
        self.step, self.args, self.options, self.folder = step, args, options, folder
        self.device = machine.find_device(args.device)
        if parallel.launched():
            if not several_processes or args.minutes:
                raise UserError("this trains in one process alone: start it with python, not with torchrun")
            self.device = parallel.join(self.device)
        self.iteration = self.images_seen = 0
        self.is_tracking = False
        self.tables, self.snapshots = {"losses": {}}, {}
        # Finished epochs, finished batches of the epoch under way, and images of the batch under way.
        self._epoch = self._batch = self._batch_images = 0
        self._sums, self._tracked, self._drawn = {}, {}, []
        self._bar = self._lock = self._signal = None
        self._seconds, self._started = 0.0, time.perf_counter()
        torch.manual_seed(args.seed)

    @property
    def is_new(self):
        """Whether no batch has been trained on yet."""
        return self._epoch == self._batch == 0

    def arguments(self, function):
        """Return the run's values of the hyperparameters that are arguments of the function."""
        return {name: self.options[name] for name in hyperparameters(function)}

    def limit(self, *tensors):
        """Return the tensors, or in a dry run only the first batches of them."""
        count = DRY_RUN_BATCHES * self.options["batch_size"]
        return tuple(each[:count] if self.args.dry_run else each for each in tensors)

    def track(self, **tracked):
        """Name everything that training changes, so that checkpoints hold it; with --resume restore it now.

        Args:
            tracked: objects with state_dict and load_state_dict: networks, optimisers, schedules.
        """
        self._tracked = tracked
        path = self.folder / "checkpoint.pt"
        if self.args.resume and not os.path.isfile(path):
            raise UserError(f"there is no checkpoint at {path}: train without --resume")
        self.is_tracking = True
        files.make_folder(self.folder)
        if parallel.is_first():
            self._lock = files.lock(self.folder)
        may_replace = self.args.restart or self.args.dry_run or checkpoint.is_finished(self.folder)
        if self.args.resume:
            self._restore(path)
            machine.say(f"resuming in epoch {self._epoch + 1}")
        elif path.exists() and not may_replace:
            raise UserError(
                f"{self.folder} holds an unfinished run: --resume goes on with it, --restart begins anew over it"
            )
        self._started = time.perf_counter()
        if parallel.is_first():
            files.write_json(self.folder / "config.json", checkpoint.description(self))
        if not self.args.resume:
            self._save()

    def epochs(self, num_epochs):
        """Yield the numbers of the epochs that are still to do, from 1; save a checkpoint after each.

        With --minutes, yield epochs until the time is over. `batches` then cuts the last one short.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        previous = {each: signal.signal(each, self._on_signal) for each in caught}
        try:
            while self.fraction_done(self._epoch / num_epochs) < 1:
                yield self._epoch + 1
                self._epoch, self._batch = self._epoch + 1, 0
                self._save()
                self._stop_if_asked()
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)

    def batches(self, *tensors, batch_size):
        """Yield the shuffled batches of an epoch, with a progress bar.

        The order depends on the seed and the epoch alone, so that a resumed epoch can skip the batches it has done.
        After Ctrl-C, finish the batch, save a checkpoint and stop.
        """
        # The factor keeps two pairs of seed and epoch from sharing an order.
        order = torch.Generator().manual_seed((self.args.seed * 100_003 + self._epoch) % 2**63)
        dataset = TensorDataset(*tensors)
        # A batch is one indexing operation.
        sampler = BatchSampler(RandomSampler(dataset, generator=order), batch_size, drop_last=False)
        loader = DataLoader(dataset, sampler=sampler, batch_size=None, generator=order)
        silent = None if parallel.is_first() else True
        with tqdm(
            loader, self._title(self._epoch + 1), unit="batch", disable=silent, leave=False
        ) as self._bar:
            for index, batch in enumerate(self._bar):
                if index < self._batch:
                    continue
                self.iteration = self._epoch * len(loader) + index + 1
                self._batch_images = len(batch[0])
                yield batch
                self._batch = index + 1
                self._stop_if_asked(save=True)
                if self.args.minutes and self.fraction_done() >= 1:
                    break

    def fraction_done(self, fraction_of_steps=0.0):
        """Return how much of the training is done, from 0 to 1: of its steps, or of its time with --minutes."""
        minutes = self.args.minutes
        return min(1, self._elapsed() / (60 * minutes) if minutes else fraction_of_steps)

    def is_last(self, epoch):
        """Tell whether the training ends with this epoch."""
        return self.fraction_done(epoch / self.options["num_epochs"]) == 1

    def record(self, keep=False, **losses):
        """Take the mean losses of the batch under way into the means of the epoch.

        The values leave the device once. With several processes they are averaged over these.

        Args:
            keep: also make a row of losses.csv from this batch.
            losses: scalar tensors; None stands for a loss that this batch does not have.

        Raises:
            UserError: a loss is not finite. The checkpoint stays the last good one.
        """
        known = {name: value for name, value in losses.items() if value is not None}
        values = torch.stack([*known.values()]).tolist()
        if parallel.num_processes() > 1:
            values = [value / parallel.num_processes() for value in parallel.total(values, self.device)]
        known = dict(zip(known, values))
        checkpoint.require_finite(known, f"in epoch {self._epoch + 1}, batch {self._batch + 1}")
        self.images_seen += self._batch_images
        for name, value in known.items():
            total, seen = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value * self._batch_images, seen + self._batch_images)
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in known.items()}, refresh=False)
        if keep:
            row = {name: known.get(name) for name in losses}
            self.log(iteration=self.iteration, epoch=self._epoch + 1, **row)

    def means(self):
        """Return the means of the recorded losses over the images of the epoch, and start new ones.

        A short last batch counts for its size.
        """
        means = {name: total / seen for name, (total, seen) in self._sums.items()}
        self._sums = {}
        return means

    def log(self, table="losses", **row):
        """Add a row to a table. All its rows have the same columns; None leaves a cell empty."""
        known = {name: value for name, value in row.items() if value is not None}
        checkpoint.require_finite(known, f"in the evaluation after epoch {row.get('epoch', self._epoch)}")
        for name, value in row.items():
            self.tables.setdefault(table, {}).setdefault(name, []).append(value)

    def snapshot(self, epoch, images):
        """Keep images in [0, 1] after this epoch: after each of the first epochs and after some 16 later ones."""
        if epoch <= 6 or epoch % math.ceil(self.options["num_epochs"] / 16) == 0 or self.is_last(epoch):
            self.snapshots[epoch] = (images * 255).to(torch.uint8).cpu()

    def print_epoch(self, epoch, values, *words):
        """Print one line about an epoch: the dict of values, then words."""
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        seconds, done = self._elapsed(), self.fraction_done(epoch / self.options["num_epochs"])
        time_left = f", {seconds * (1 / done - 1) / 60:.0f} min to go" if 0 < done < 1 else ""
        machine.say("  ".join([f"{self._title(epoch)} ({seconds:.0f} s{time_left})", *shown, *words]))

    def save_model(self, network, **arguments):
        """Write model.pt: the weights of the network and the arguments that rebuild it."""
        files.save_model(self.folder / "model.pt", self.step, network, arguments)
        machine.say("wrote model.pt")

    def draw(self, name, function, *arguments, **options):
        """Draw the figure `name` with `function(path, ...)`, and print its name first, so that no wait is silent."""
        files.make_folder(self.folder)
        machine.say(f"drawing {name}")
        self._drawn.append(name)
        function(self.folder / name, *arguments, **options)

    def finish(self, headline=(), **metrics):
        """Write the tables, and metrics.json with the time and speed of the training beside the metrics.

        Args:
            headline: names of metrics to print, beside those of the step's reported run.
        """
        hardware = machine.hardware(self.device)
        self._write_tables()
        what = "training and the evaluation after each epoch"
        metrics["wall_time"] = files.metric(self._seconds, "seconds", what, hardware=hardware)
        speed = self.images_seen / self._seconds
        metrics["speed"] = files.metric(speed, "training images per second", "images seen / wall time")
        reported = files.ROOT / "results" / self.step if self.args.dataset == DATASETS[0] else None
        lines = [*checkpoint.headline(headline, metrics, reported)]  # this run may replace the reported one
        files.write_json(self.folder / "metrics.json", metrics)
        for line in lines:
            machine.say(line)
        machine.say(f"results in {self.folder}: {', '.join([*self._drawn, 'metrics.json'])}")

    def close(self):
        """End the lock on the folder."""
        if self._lock:
            self._lock.close()

    def _identity(self):
        """Return what a checkpoint must share with the run that resumes it."""
        flags = ("seed", "minutes", "dry_run", "held_out", "dataset")
        return {**self.options, **{name: getattr(self.args, name) for name in flags}}

    def _save(self):
        tracked = {name: each.state_dict() for name, each in self._tracked.items()}
        if not files.all_finite(tracked):
            where = f"the last update of epoch {self._epoch + (self._batch > 0)}"
            raise UserError(f"{where} gave numbers that are not finite: {checkpoint.KEPT}")
        self._seconds, self._started = self._elapsed(), time.perf_counter()
        if not parallel.is_first():
            return
        content = {
            "step": self.step,
            "version": checkpoint.VERSION,
            "identity": self._identity(),
            "position": (self._epoch, self._batch, self.images_seen, self._seconds),
            "sums": self._sums,
            "tables": self.tables,
            "snapshots": self.snapshots,
            "random": machine.random_states(self.device),
            "tracked": tracked,
        }
        files.save_tensors(self.folder / "checkpoint.pt", content)
        self._write_tables()

    def _write_tables(self):
        for name, table in self.tables.items():
            files.write_csv(self.folder / f"{name}.csv", table)

    def _restore(self, path):
        content = files.load_tensors(path, (self.step,), "checkpoint")
        if content.get("version") != checkpoint.VERSION:
            raise UserError(f"{path} is of another version of this script: begin anew with --restart")
        has_schedule = any(isinstance(each, LRScheduler) for each in self._tracked.values())
        try:
            checkpoint.require_same(content["identity"], self._identity(), path, has_schedule)
            if not files.all_finite(content["tracked"]):
                raise UserError(f"{path} holds numbers that are not finite: begin anew with --restart")
            for name, each in self._tracked.items():
                each.load_state_dict(content["tracked"][name])
            self._epoch, self._batch, self.images_seen, self._seconds = content["position"]
            self._sums, self.tables = content["sums"], content["tables"]
            self.snapshots = content["snapshots"]
            machine.set_random_states(content["random"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            raise UserError(f"{path} does not fit this version: begin anew with --restart") from None

    def _elapsed(self):
        """Return the seconds of training so far, over all resumptions."""
        return self._seconds + time.perf_counter() - self._started

    def _title(self, epoch):
        return f"epoch {epoch}" if self.args.minutes else f"epoch {epoch}/{self.options['num_epochs']}"

    def _on_signal(self, number, _):
        self._signal = number
        # torchrun passes on the Ctrl-C that its processes have had from the terminal already.
        again = signal.SIG_IGN if parallel.launched() else signal.default_int_handler
        signal.signal(signal.SIGINT, again)
        machine.say("\nstopping after this batch; Ctrl-C again stops at once", file=sys.stderr)

    def _stop_if_asked(self, save=False):
        """Stop after a signal to any of the processes, all of them after the same batch."""
        if any(parallel.total([float(self._signal or 0)], self.device)):
            if save:
                self._save()
            raise Terminated if self._signal == signal.SIGTERM else KeyboardInterrupt
