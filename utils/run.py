"""A training run: its epochs and batches, what it records, its checkpoint and its folder.

What is written when:
    at the start                       config.json, checkpoint.pt
    after a signal in a batch          checkpoint.pt
    after the last batch of an epoch   checkpoint.pt
    after the evaluation of an epoch   the CSV files
    at the end                         model.pt, figures, metrics.json, the CSV files, the finished checkpoint.pt

checkpoint.pt has the rows of the CSV files, too. --resume repeats what came after it: an evaluation that was interrupted
and, after kill -9 or a second signal, the batches of the epoch. It refuses other options, another seed or data set, and
fewer epochs; with a schedule also more (utils/checkpoint.py).
"""

import contextlib
import math
import sys

import torch
from tqdm import tqdm

from utils import checkpoint, files, machine, parallel
from utils.checkpoint import KEPT, means_of, require_finite
from utils.data import shuffled_batches
from utils.files import UserError
from utils.options import read_options

DRY_RUN_BATCHES = 3
BATCH_ROWS = 2000  # of batches.csv, about
# Attributes of a run that a checkpoint holds as they are.
STATE = "_epoch _batch _num_batches _evaluated _of_epoch _of_row iteration images_seen snapshots".split()


class Run:
    """A training run of one step.

    Attributes:
        step, args: name of the step, and its command line (utils/cli.py).
        options: dict of all options.
        identity: dict of the options and flags that --resume compares.
        folder: Path of everything that the run writes.
        device: torch.device of the training.
        is_new: whether no batch had been trained on when the training began.
        iteration: number of the batch under way, from 1, counted over all epochs.
        images_seen: training images so far, counted over all epochs.
        snapshots: dict of uint8 images by epoch, kept in the checkpoint.
        unwritten: set of the names of files that could not be written.
    """

    def __init__(self, step, args, options, folder):
        self.step, self.args, self.options, self.folder = step, args, options, folder
        flags = ("seed", "minutes", "dry_run", "held_out", "dataset")
        self.identity = {**options, **{name: getattr(args, name) for name in flags}}
        self.device = parallel.join(machine.find_device(args.device))
        self.iteration = self.images_seen = 0
        self.snapshots, self.unwritten = {}, set()
        # Position: whole epochs, batches of the epoch under way, and whether they have been evaluated.
        self._epoch, self._batch, self._num_batches, self._evaluated = 0, 0, 1, True
        self._of_epoch, self._of_row = [], []  # losses of batches, of this epoch and of a row of batches.csv
        self._tables = {}  # the lines of each CSV file
        self._num_epochs = options["num_epochs"]
        self._of_all = "" if args.minutes else f"/{self._num_epochs}"
        self._clock, self._batch_clock = machine.Clock(), machine.Clock()  # the second stands in evaluations
        self._open = contextlib.ExitStack()  # the lock on the folder, and the handling of signals
        self.close = self._open.close
        self._found = self._signal = None  # the checkpoint to resume with its path, and the signal to stop
        torch.manual_seed(args.seed + 1_000_003 * parallel.rank())  # processes draw noise of their own

    def arguments(self, function):
        """Return the run's values of the options that are arguments of the function."""
        return {name: self.options[name] for name in read_options(function)}

    def limit(self, *tensors):
        """Return the tensors, or in a dry run only the first batches of them."""
        count = DRY_RUN_BATCHES * self.options["batch_size"]
        return tuple(each[:count] if self.args.dry_run else each for each in tensors)

    def claim_folder(self, shorter):
        """Lock the folder, and with --resume read its checkpoint, or that of one of the `shorter` runs."""
        if parallel.rank() == 0:
            self._open.enter_context(files.lock(self.folder))
            if not (self.args.resume or self.args.restart):
                checkpoint.require_free(self)
        if self.args.resume:
            self._found = checkpoint.load(self, shorter)

    def resume_or_start(self, **modules):
        """Name all networks, optimisers and schedules, so that checkpoints hold them; with --resume restore them."""
        self._modules = modules
        if self._found:
            self._restore(*self._found)
        self.is_new = self.images_seen == 0
        self._open.enter_context(machine.catch_signals(self._on_signal))
        self._open.enter_context(self._clock)
        self._config = checkpoint.describe(self)  # while all processes are there
        if parallel.rank() == 0:
            files.write_json(self.folder / "config.json", self._config)
        if not self.args.resume:
            self._save()

    def save_model(self, network, **arguments):
        """Write model.pt: the weights, the arguments that rebuild the network, and the options of its training."""
        files.save_model(self.folder / "model.pt", self.step, network, arguments, self.options)
        machine.say("wrote model.pt")

    def draw(self, name, function, *arguments, **options):
        """Draw the figure `name` with `function(path, ...)`, and print its name first, so that no wait is silent."""
        machine.say(f"drawing {name}")
        self._attempt(name, function, *arguments, **options)

    def finish(self, headline=(), **metrics):
        """Write metrics.json, and print the metrics that `headline` names beside those of the step's reported run."""
        seconds, what = self._clock.seconds, "training and the evaluation after each epoch"
        metrics["wall_time"] = files.metric(seconds, "seconds", what, hardware=machine.hardware(self.device))
        speed, what = self.images_seen / seconds, "images seen / wall time"
        metrics["speed"] = files.metric(speed, "training images per second", what)
        lines = [*checkpoint.headline(headline, metrics, self)]  # before the reported metrics may be replaced
        files.write_json(self.folder / "config.json", self._config)  # if the folder was removed
        files.write_json(self.folder / "metrics.json", metrics)
        self._write_tables()
        self._save(finished=True)
        machine.say("\n".join([*lines, f"results in {self.folder}"]))

    @property
    def _done(self):
        return self._epoch + self._batch / self._num_batches

    @property
    def epochs_done(self):
        """The number of epochs so far; with a fraction, such as 2.2, where --minutes cut the last one short."""
        return (round(self._done, 2) or 0.01) if self._done % 1 else int(self._done)

    def is_last(self):
        """Tell whether the training has no further batch."""
        return self._done > 0 and self.fraction_done(self._done / self._num_epochs) == 1

    def fraction_done(self, fraction_of_steps=0.0):
        """Return how much of the training is done, from 0 to 1: of its steps, or of its time with --minutes."""
        minutes = self.args.minutes
        return min(1, self._batch_clock.seconds / (60 * minutes) if minutes else fraction_of_steps)

    def epochs(self, num_epochs):
        """Yield the numbers of the epochs that are still to do, from 1, or with --minutes until the time is over."""
        self._num_epochs = num_epochs
        while not (self._evaluated and self.is_last()):
            if self._evaluated and self._batch == self._num_batches:
                self._epoch, self._batch = self._epoch + 1, 0
            yield self._epoch + 1
            self._evaluated = True
            if not self.is_last():
                self._batch = self._num_batches  # also if the loop over the batches was left by `break`
            self._write_tables()
            self._stop_if_asked()

    def batches(self, *tensors, batch_size):
        """Yield the shuffled batches of an epoch that are still to do, with a progress bar, then save a checkpoint."""
        chosen = shuffled_batches(len(tensors[0]), batch_size, self.args.seed, self._epoch)
        rank, count, self._num_batches = parallel.rank(), parallel.num_processes(), len(chosen)
        if len(chosen[-1]) < count:
            raise UserError(f"a batch has {len(chosen[-1])} images: lower the number of processes")
        title = f"epoch {self._epoch + 1}{self._of_all}"
        self._bar = tqdm(chosen, title, unit="batch", disable=rank > 0 or None, leave=False)
        shown = machine.progress(chosen, title) if self._bar.disable else self._bar  # lines in a file
        with self._batch_clock, self._bar:
            for index, images in enumerate(shown):
                if index < self._batch or self.is_last():
                    continue
                self.iteration, self._batch_images = self._epoch * len(chosen) + index + 1, len(images)
                yield tuple(each[images[rank::count]] for each in tensors)
                self.images_seen += len(images)
                self._batch, self._evaluated = index + 1, False
                self._stop_if_asked()
            if self._of_row:
                self._log_batches()
            self._save()
            self._stop_if_asked()

    def record(self, **losses):
        """Take the mean losses of the batch under way, scalar tensors, into the means of the epoch and batches.csv.

        None stands for a loss that this batch does not have. One that is not finite ends the run.
        """
        self._of_row.append((self._take(losses), self._batch_images))
        if self.iteration % math.ceil(self._num_epochs * self._num_batches / BATCH_ROWS) == 0:
            self._log_batches()

    def record_row(self, **losses):
        """Do what `record` does, but make a row of losses.csv from this batch."""
        self.log(iteration=self.iteration, epoch=self._epoch + 1, **self._take(losses))

    def _take(self, losses):
        given = {name: value.detach() for name, value in losses.items() if value is not None}
        # The values leave the device once.
        numbers = parallel.mean(torch.stack([*given.values()])).tolist() if given else []
        values = {**losses, **dict(zip(given, numbers))}
        require_finite(values, f"in epoch {self._epoch + 1}, batch {self._batch + 1}")
        self._of_epoch.append((values, self._batch_images))
        self._bar.set_postfix({name: f"{values[name]:.3f}" for name in given}, refresh=False)
        return values

    def _log_batches(self):
        self.log("batches", iteration=self.iteration, epoch=self._epoch + 1, **means_of(self._of_row))
        self._of_row = []

    def pop_means(self):
        """Return the means of the recorded losses over the images of the epoch, and start new ones."""
        batches, self._of_epoch = self._of_epoch, []
        return {name: mean for name, mean in means_of(batches).items() if mean is not None}

    @property
    def tables(self):
        """The columns of each table by its name, as NAME.csv has them, so that a resumed run has the same."""
        return {name: files.read_columns("".join(lines)) for name, lines in self._tables.items()}

    def log(self, table="losses", **row):
        """Add a row to a table. All its rows have the same columns; None leaves a cell empty."""
        require_finite(row, f"in the row of epoch {row.get('epoch')} of {table}.csv")
        header, line = files.csv_text([row]).splitlines(keepends=True)
        self._tables.setdefault(table, [header]).append(line)

    def _write_tables(self):
        for name, lines in self._tables.items() if parallel.rank() == 0 else ():
            self._attempt(f"{name}.csv", files.write_atomically, "".join(lines).encode())

    def _attempt(self, name, write, *arguments, **options):
        """Call `write(path, ...)`; if it fails, warn once and go on: only the checkpoint is worth stopping for."""
        try:
            write(self.folder / name, *arguments, **options)
            self.unwritten.discard(name)
        except UserError as error:
            if name not in self.unwritten:
                machine.say(f"warning: {error}", file=sys.stderr)
            self.unwritten.add(name)

    def snapshot(self, images):
        """Keep images in [0, 1] after this epoch: after each of the first epochs and after some 16 later ones."""
        epoch, some = self.epochs_done, math.ceil(self._num_epochs / 16)
        if epoch <= 6 or epoch % some == 0 or self.is_last():
            self.snapshots[epoch] = (images * 255).round().to(torch.uint8).cpu()

    def print_epoch(self, values, *words):
        """Print one line about the epoch that has ended: the dict of values, then words."""
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        seconds, done = self._clock.seconds, self.fraction_done(self.epochs_done / self._num_epochs)
        time_left = f", {seconds * (1 / done - 1) / 60:.0f} min to go" if 0 < done < 1 else ""
        title = f"epoch {self.epochs_done}{self._of_all} ({seconds:.0f} s{time_left})"
        machine.say("  ".join([title, *shown, *words]))

    def _save(self, finished=False):
        modules = {name: each.state_dict() for name, each in self._modules.items()}
        if not files.all_finite(modules):
            raise UserError(f"an update in epoch {self._epoch + 1} gave numbers that are not finite: {KEPT}")
        content = dict(
            step=self.step,
            version=checkpoint.VERSION,
            finished=finished,
            identity=self.identity,
            modules=modules,
            state={name: getattr(self, name) for name in STATE},
            tables={name: "".join(lines) for name, lines in self._tables.items()},
            seconds=(self._clock.seconds, self._batch_clock.seconds),
            random=machine.random_states(self.device),
        )
        if parallel.rank() == 0:
            files.save_tensors(self.folder / "checkpoint.pt", content)

    def _restore(self, content, path):
        for name, module in self._modules.items():
            files.load_state(module, content["modules"].get(name, {}), path, "begin anew with --restart")
        vars(self).update(content["state"])
        self._tables = {name: [text] for name, text in content["tables"].items()}
        self._clock.before, self._batch_clock.before = content["seconds"]
        if parallel.rank() == 0:
            machine.set_random_states(content["random"], self.device)
        else:  # noise of its own, which no earlier part of the training has had
            torch.manual_seed(self.args.seed + 1_000_003 * parallel.rank() + self.images_seen)
        machine.say(f"resuming after {self.epochs_done} epochs")

    def _on_signal(self, number, _):
        in_batches = self._batch_clock.started is not None
        if self._signal or not (in_batches or parallel.num_processes() > 1):
            raise KeyboardInterrupt(number, "--resume goes on before this epoch or evaluation")
        self._signal = number
        machine.say("\nstopping after this batch or evaluation; a second signal stops now", file=sys.stderr)

    def _stop_if_asked(self):
        """Save and stop after a signal to any of the processes, all at the same place: others would wait in vain."""
        number = int(parallel.largest(self._signal or 0, self.device))
        if number:
            self._save()
            raise KeyboardInterrupt(number, "the checkpoint is saved, and --resume goes on")
