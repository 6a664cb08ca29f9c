"""The command line, the folder of a run, its progress, its checkpoint and its end."""

import argparse
import contextlib
import csv
import ctypes
import errno
import io
import json
import math
import os
import pickle
import platform
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import matplotlib
import numpy
import torch
import torchvision
from tqdm import tqdm

from utils import parallel

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None
try:
    import msvcrt
except ImportError:  # every other system
    msvcrt = None

ROOT = Path(__file__).resolve().parent.parent
DRY_RUN_BATCHES = 3
DRY_RUN_EPOCHS = 2


class UserError(Exception):
    """What the user can mend: said in one line, exit code 2."""


# ---------------------------------------------------------------------------------------------------------
# Command line


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers bad usage with one line instead of the whole usage."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, others = super().parse_known_args(args, namespace)
        if [] in vars(namespace).values():  # what some versions of argparse make of --flag=--
            self.error("-- is no value of a flag")
        return namespace, others

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


def whole_number(least):
    """argparse type: an integer of at least `least`."""

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"takes a whole number of at least {least}, not {text!r}")
        return value

    return convert


def non_negative(text):
    """argparse type: a finite float of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"takes a number of at least 0, not {text!r}")
    return value


def positive(text):
    """argparse type: a finite float above 0."""
    value = non_negative(text)
    if not value:
        raise argparse.ArgumentTypeError("takes a number above 0")
    return value


def make_parser(description, defaults):
    """The flags that every step script has; flags left out are None, so that variants can set them."""
    parser = ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        dest="num_epochs",
        type=whole_number(1),
        help=f"passes over the data ({defaults['num_epochs']})",
    )
    length.add_argument(
        "--minutes", type=positive, metavar="M", help="train for so long instead of a number of epochs"
    )
    add("--batch-size", type=whole_number(1), help=f"images of a training batch ({defaults['batch_size']})")
    add("--seed", type=whole_number(0), default=0, help="of every random number (0)")
    add(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto is cuda where there is one",
    )
    add("--data-dir", type=Path, default=ROOT / "data", help="folder with MNIST/raw (data/)")
    add(
        "--out-dir", type=Path, help="folder for the results, made if missing (the step's folder in results/)"
    )
    add(
        "--dry-run", action="store_true", help="a few batches into dry_run/ below the results, to look around"
    )
    add("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    add(
        "--sample-only",
        action="store_true",
        help="draw the samples of the trained model.pt, without training",
    )
    add("--variant", metavar="NAME", help="train a named variant into variants/NAME below the results")
    add("--list-variants", action="store_true", help="say which variants there are and why, and stop")
    add(
        "--ablation",
        action="store_true",
        help="train the default and every variant, or the one of --variant, and make a table",
    )
    add(
        "--seeds",
        type=whole_number(1),
        metavar="N",
        help="train with N seeds from --seed on, and make a table (3 with --ablation)",
    )
    add(
        "--held-out",
        action="store_true",
        help="evaluate on the last 10,000 training images, and train on the others, to choose by; --ablation does",
    )
    return parser


def choose_options(parser, args, defaults, variants):
    """Defaults, changed by the variant, changed by the flags; `--list-variants` prints and exits."""
    if args.list_variants:
        width = max(map(len, variants), default=0)
        for name, (reason, changes) in variants.items():
            print(
                f"{name:{width}}  {reason} ({', '.join(f'{key}={value}' for key, value in changes.items())})"
            )
        parser.exit()
    if args.variant is not None and args.variant not in variants:
        parser.error(f"unknown variant {args.variant!r}: --list-variants names them")
    changes = variants[args.variant][1] if args.variant else {}
    flags = {key: getattr(args, key) for key in defaults if getattr(args, key, None) is not None}
    options = {**defaults, **changes, **flags}
    if args.dry_run:
        options["num_epochs"] = min(options["num_epochs"], DRY_RUN_EPOCHS)
        args.minutes = None
    return options


def run_main(main):
    """Call a step's `main()` and turn its end into an exit code: 0, 2 for the user's mistakes, 130 after Ctrl-C."""
    keep_freed_memory()
    try:
        main()
    except UserError as error:
        sys.exit(_complain(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted; --resume goes on from the checkpoint, if one was written", 130))


def _complain(message, code):
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    return code


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors for the next ones.

    By default it hands large blocks back to the system, which then clears every page of the next one anew: a
    training step of step 2 takes up to twice as long on two cores.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)


def find_device(name):
    """torch.device of `--device`; 'auto' takes CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise UserError(
            f"this machine has no {name} device that torch can use: --device auto takes what there is"
        )
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------
# Files


def make_folder(folder):
    """Make the folder, and those that it is in, where they are missing.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be made ({error.strerror}): name another --out-dir"
        ) from None


def write_atomically(path, content):
    """Write bytes so that the file is, at any moment, the old one or the new one, whole.

    Of several processes the first alone writes.
    """
    if not parallel.is_first():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another --out-dir") from None
    finally:
        with contextlib.suppress(OSError):  # it is in its place, or the disk is read-only
            temporary.unlink()


def write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path, table):
    """`table` is a dict of columns; None leaves a cell empty, numbers have six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values()):
        writer.writerow(
            "" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in row
        )
    write_atomically(path, text.getvalue().encode())


def read_csv(path):
    """The rows of a file of `write_csv`, as dicts; numbers are floats, empty cells None."""

    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def lock(folder):
    """Hold the folder for this process, until it ends in whatever way; the open file is the lock.

    Raises:
        UserError: another run holds it, or it cannot be written into.
    """
    try:
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written into ({error.strerror}): name another --out-dir"
        ) from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise UserError(
                f"another run writes into {folder}: wait for it, or name another --out-dir"
            ) from None
        # A file system without locks, as some that are mounted over a network.
    return file


def save_tensors(path, content):
    """torch.save of tensors and plain values, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_tensors(path, steps, kind, device="cpu"):
    """What `save_tensors` wrote for one of these steps; tensors and plain values only, so no code can run.

    Raises:
        UserError: the file is missing, damaged, no such file, or another step's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load itself checks no sums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"there is no {kind} at {path}: train first, without --resume or --sample-only"
        ) from None
    except OSError as error:
        raise UserError(f"the {kind} {path} cannot be read: {error.strerror or error}") from None
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        zlib.error,
    ):
        raise UserError(f"{path} is damaged or not a {kind}: delete it and train anew") from None
    found = content.get("step") if isinstance(content, dict) else None
    if found not in steps:
        wanted = " or ".join(steps)
        raise UserError(
            f"{path} is not a {kind} of {wanted} but of {found or 'something else'}: name another --out-dir"
        )
    return content


def save_model(path, step, network, options):
    """model.pt: the network's weights and the arguments that rebuild it."""
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    save_tensors(path, {"step": step, "network": options, "weights": weights})


def load_network(path, steps, build, device="cpu"):
    """The network of a model.pt, in eval mode; `build(**arguments)` makes it. The global random state stays."""
    content = load_tensors(path, steps, "model", device)
    try:
        with torch.random.fork_rng(devices=[]):  # the weights it begins with are drawn, and replaced
            network = build(**content["network"])
        network.load_state_dict(content["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(f"{path} does not hold the weights of the network it describes: train anew") from None
    if not all_finite(network.state_dict()):
        raise UserError(f"{path} holds weights that are not finite: train anew")
    return network.to(device).eval()


def all_finite(value):
    """Whether no number in the tensors of a nested dict or list is infinite or NaN."""
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(all_finite, parts))


def metric(value, unit, formula, **more):
    """An entry of metrics.json: the figure, and beside it what it is."""
    return {"value": value, "unit": unit, "formula": formula, **more}


def results_folder(step, args):
    """`--out-dir`, or the step's folder in results/; what is no run to be reported keeps away from those that are."""
    default = ROOT / "results" / step
    return args.out_dir or (
        default / "dry_run" if args.dry_run else default / "held_out" if args.held_out else default
    )


# ---------------------------------------------------------------------------------------------------------
# Run


def run_folder(folder, variant):
    """Where in a step's results folder the run of a variant, or of the default for None, is."""
    return folder / "variants" / variant if variant else folder


class Run:
    """A training run and its folder: where it stands, its history, its files.

    Args:
        several_processes: whether the step can be trained by the processes of torchrun.

    Attributes:
        folder: where everything is written.
        options: the hyperparameters.
        device: torch.device to train on.
        epoch, batch: finished epochs, and finished batches of the epoch under way.
        images_seen: in all batches so far.
        history: dict of columns, the content of losses.csv.
        snapshots: images worth keeping, by epoch.
    """

    def __init__(self, step, args, options, several_processes=False):
        self.step, self.args, self.options = step, args, options
        self.device = find_device(args.device)
        if parallel.launched():
            if not several_processes or args.minutes:
                raise UserError("this trains in one process alone: start it with python, not with torchrun")
            if self.device.type == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise UserError(
                    f"this machine has GPUs for {torch.cuda.device_count()} processes: start no more, or take "
                    "--device cpu"
                )
            self.device = parallel.join(self.device)
        self.folder = run_folder(results_folder(step, args), args.variant)
        self.epoch = self.batch = self.images_seen = 0
        self.history, self.snapshots, self.seconds = {}, {}, 0.0
        self._sums, self._tracked, self._bar = {}, {}, None
        self._started = time.perf_counter()
        self._interrupted = False
        torch.manual_seed(args.seed)

    def autocast(self):
        """Context in which convolutions run in bfloat16, where the hardware has matrix units for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bfloat16_units(self.device))

    def limit(self, *tensors):
        """Each of the tensors whole, or its first few batches in a dry run."""
        count = DRY_RUN_BATCHES * self.options["batch_size"]
        return tuple(each[: min(len(each), count)] if self.args.dry_run else each for each in tensors)

    def start(self, **tracked):
        """Make the folder; restore what is tracked, where `--resume` asks for it.

        Args:
            tracked: everything that training changes, by name: objects with state_dict and load_state_dict.
        """
        self._tracked, self._started = tracked, time.perf_counter()
        if self.folder.exists() or not self.args.resume:
            make_folder(self.folder)
            if parallel.is_first():
                self._lock = lock(self.folder)
        if self.args.resume:
            self._restore()
        write_json(self.folder / "config.json", self._config())
        if not self.args.resume:
            self._save()

    def epochs(self, num_epochs):
        """Numbers of the epochs still to do, from 1; saves the checkpoint and losses.csv after each.

        With `--minutes` it goes on until they are over, whatever `num_epochs`, and cuts the last short.
        """
        previous = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            while self.share_done(self.epoch / num_epochs) < 1:
                yield self.epoch + 1
                self.epoch, self.batch = self.epoch + 1, 0
                self._save()
                self._stop_if_interrupted()
        finally:
            signal.signal(signal.SIGINT, previous)

    def order(self):
        """Generator that shuffles this epoch, a function of seed and epoch alone."""
        return torch.Generator().manual_seed((self.args.seed * 100_003 + self.epoch) % 2**63)

    def progress(self, loader):
        """The batches of this epoch, with a progress bar; on Ctrl-C saves after one and stops.

        A resumed epoch skips the batches that were done, and `order` sees to it that the others are the same.
        """
        silent = None if parallel.is_first() else True
        with tqdm(
            loader, self._title(self.epoch + 1), unit="batch", disable=silent, leave=False
        ) as self._bar:
            for index, batch in enumerate(self._bar):
                if index < self.batch:
                    continue
                yield batch
                self.batch = index + 1
                self._stop_if_interrupted(save=True)
                if self.args.minutes and self.share_done() >= 1:
                    break

    def share_done(self, share_of_epochs=0.0):
        """How much of the training is done, by its epochs, or by its time with `--minutes`."""
        minutes = self.args.minutes
        return self.elapsed() / (60 * minutes) if minutes else share_of_epochs

    def elapsed(self):
        """Seconds of training so far, over all resumptions."""
        return self.seconds + time.perf_counter() - self._started

    def _title(self, epoch):
        return f"epoch {epoch}" if self.args.minutes else f"epoch {epoch}/{self.options['num_epochs']}"

    def _stop_if_interrupted(self, save=False):
        """Stop after Ctrl-C in any of the processes, all of them after the same batch."""
        if parallel.total(self._interrupted, self.device):
            if save:
                self._save()
            raise KeyboardInterrupt

    def add(self, count, **losses):
        """Take the mean losses of a batch of `count` images into the epoch's means; None is passed over.

        Raises:
            UserError: a loss is not finite; the checkpoint stays the last good one.
        """
        losses = {name: value for name, value in losses.items() if value is not None}
        self._require_finite(losses, f"in epoch {self.epoch + 1}, batch {self.batch + 1}")
        self.images_seen += count
        for name, value in losses.items():
            total, seen = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value * count, seen + count)
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)

    def _require_finite(self, values, where):
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} became {value} {where}: the checkpoint before it is kept; lower the learning rate or "
                    "choose another --seed"
                )

    def means(self):
        """Means over the images of the epoch, not over batches, so that a short last batch counts for its size."""
        means = {name: total / seen for name, (total, seen) in self._sums.items()}
        self._sums = {}
        return means

    def log(self, **row):
        """A row of losses.csv; every row has the same columns, None leaves a cell empty."""
        where = f"in the evaluation after epoch {row.get('epoch', self.epoch)}"
        self._require_finite({name: value for name, value in row.items() if value is not None}, where)
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)

    def say(self, epoch, *remarks, **values):
        """One line about an epoch, its remarks at the end."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        print(f"{self._title(epoch)}  {shown}  {self.elapsed():.0f} s", *remarks, sep="  ", flush=True)

    def finish(self, **metrics):
        """Write losses.csv and metrics.json, the figures with the wall time of the training."""
        write_csv(self.folder / "losses.csv", self.history)
        metrics["wall_time"] = metric(
            self.seconds,
            "seconds",
            "training and the evaluation after each epoch",
            hardware=hardware(self.device),
        )
        metrics["speed"] = metric(
            self.images_seen / self.seconds, "training images per second", "images seen / wall time"
        )
        metrics["peak_memory"] = metric(
            peak_memory(), "MiB", "largest resident memory of the process", hardware=hardware(self.device)
        )
        write_json(self.folder / "metrics.json", metrics)
        print(f"results in {self.folder}")

    def _config(self):
        packages = (torch, torchvision, matplotlib, numpy)
        return {
            "step": self.step,
            "variant": self.args.variant or "default",
            "dry_run": self.args.dry_run,
            "evaluated_on": "last 10,000 training images" if self.args.held_out else "test images",
            "seed": self.args.seed,
            "minutes": self.args.minutes,
            "processes": parallel.num_processes(),
            "device": str(self.device),
            "hardware": hardware(self.device),
            "bfloat16_units": has_bfloat16_units(self.device),
            "hyperparameters": self.options,
            "versions": {
                "python": platform.python_version(),
                **{each.__name__: each.__version__ for each in packages},
            },
        }

    def _identity(self):
        """What a checkpoint must share with the run that resumes it."""
        flags = {key: getattr(self.args, key) for key in ("seed", "minutes", "dry_run", "held_out")}
        return {**self.options, **flags}

    def _save(self):
        tracked = {name: each.state_dict() for name, each in self._tracked.items()}
        if not all_finite(tracked):
            raise UserError(
                f"the last update of epoch {self.epoch + (self.batch > 0)} gave numbers that are not finite: the "
                "checkpoint before it is kept; lower the learning rate or choose another --seed"
            )
        self.seconds, self._started = self.elapsed(), time.perf_counter()
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            random["mps"] = torch.mps.get_rng_state()
        checkpoint = {
            "step": self.step,
            "identity": self._identity(),
            "position": (self.epoch, self.batch, self.images_seen, self.seconds),
            "sums": self._sums,
            "history": self.history,
            "snapshots": self.snapshots,
            "random": random,
            "tracked": tracked,
        }
        save_tensors(self.folder / "checkpoint.pt", checkpoint)
        write_csv(self.folder / "losses.csv", self.history)

    def _restore(self):
        path = self.folder / "checkpoint.pt"
        checkpoint = load_tensors(path, (self.step,), "checkpoint")
        try:
            theirs, ours = checkpoint["identity"], self._identity()
            for key in ours:
                if theirs.get(key) != ours[key]:
                    raise UserError(
                        f"{path} was trained with {key} {theirs.get(key)}, not {ours[key]}: resume with the same "
                        "flags, or start anew without --resume"
                    )
            if not all_finite(checkpoint["tracked"]):
                raise UserError(f"{path} holds numbers that are not finite: start anew without --resume")
            for name, each in self._tracked.items():
                each.load_state_dict(checkpoint["tracked"][name])
            self.epoch, self.batch, self.images_seen, self.seconds = checkpoint["position"]
            self._sums, self.history, self.snapshots = (
                checkpoint[key] for key in ("sums", "history", "snapshots")
            )
            torch.set_rng_state(checkpoint["random"]["cpu"].cpu())
            # A checkpoint of another device has no state for this one: the run goes on with other draws.
            if "cuda" in checkpoint["random"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(checkpoint["random"]["cuda"].cpu(), self.device)
            elif "mps" in checkpoint["random"] and self.device.type == "mps":
                torch.mps.set_rng_state(checkpoint["random"]["mps"].cpu())
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            raise UserError(
                f"{path} does not fit this version of the script: start anew without --resume"
            ) from None

    def _on_interrupt(self, *_):
        self._interrupted = True
        # torchrun passes on the Ctrl-C that its processes have had from the terminal already.
        signal.signal(signal.SIGINT, signal.SIG_IGN if parallel.launched() else signal.default_int_handler)
        print("\nstopping after this batch; Ctrl-C again stops at once", file=sys.stderr)


def has_bfloat16_units(device):
    """Whether the device multiplies matrices in bfloat16 faster than in single precision.

    GPUs since Ampere and CPUs with AMX or AVX512-BF16 do; the latter are known from the torch version on that can tell.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def peak_memory():
    """The largest resident memory that this process has had, in MiB; None where the system does not say."""
    if not resource:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def hardware(device):
    """The GPU's name, or the CPU's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    count = torch.get_num_threads()
    return f"{cpu}, {count} thread{'s' * (count > 1)}" if device.type == "cpu" else f"{device.type} on {cpu}"
