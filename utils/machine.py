"""The machine: device, precision, memory, the hardware's name, and printing that never ends a run."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from utils.files import UserError

SILENCE = 6  # seconds without a line; an item of `progress` takes less
_last_line = time.perf_counter()  # when the last one was printed
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # that ask for an end; Windows lacks some


def find_device(name):
    """Return the torch.device of `--device`; 'auto' is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise UserError(f"torch finds no {name} device on this machine: --device auto takes what there is")
    torch.backends.cudnn.allow_tf32 = False  # single precision is meant as such
    return torch.device(name)


def has_bfloat16_units(device):
    """Tell whether the hardware multiplies in bfloat16: GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch cannot tell. ATEN_CPU_CAPABILITY may say that the units are not to be used.
    found = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    limited = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return not limited and (found.get("amx_bf16", False) or found.get("avx512_bf16", False))


def autocast(device, precision):
    """Return the context of 'bfloat16', 'float32', or 'auto': bfloat16 where the hardware has it."""
    enabled = precision == "bfloat16" or (precision == "auto" and has_bfloat16_units(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def random_states(device):
    """Return the states of the global random generators of the CPU and the device, by name."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_states(states, device):
    """Set the global random generators. A device that the states lack goes on with other draws."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type].cpu())


@contextlib.contextmanager
def seeded(device, seed=0):
    """Draw from this seed inside; afterwards the global random generators go on as if nothing had been drawn."""
    states = random_states(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_states(states, device)


def keep_freed_memory():
    """Make glibc keep freed memory. Clearing large blocks anew makes a step of step 2 take up to twice as long."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


def hardware(device):
    """Return the GPU's name, or the CPU's name with its widest units and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):  # another system or processor
        cpu = platform.processor() or platform.machine()
    if device.type != "cpu":
        return f"{device.type} on {cpu}"
    units = "bfloat16 units" if has_bfloat16_units(device) else torch.backends.cpu.get_cpu_capability()
    count = torch.get_num_threads()
    return f"{cpu} with {units}, {count} thread{'s' * (count > 1)}"


class Clock:
    """Seconds that pass in its `with` blocks, and those `before`."""

    def __init__(self):
        self.before, self.started = 0.0, None  # None while it stands

    @property
    def seconds(self):
        return self.before + (0 if self.started is None else time.perf_counter() - self.started)

    def __enter__(self):
        self.started = time.perf_counter()

    def __exit__(self, *_):
        self.before, self.started = self.seconds, None


def catch_signals(handler):
    """Let `handler` answer the signals that ask for an end, until the context that is returned is closed.

    A signal that is ignored stays so: nohup ignores SIGHUP. Python leaves signals to the main thread.
    """
    earlier = contextlib.ExitStack()
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN:
                earlier.callback(signal.signal, number, signal.signal(number, handler))
    return earlier


def open_streams():
    """Open standard streams that are closed, as a service's are; print letters that an encoding lacks as escapes."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # open takes the lowest free number, so no other file gets this one
            setattr(sys, name, open(os.devnull, "r+"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def progress(items, what):
    """Yield the items of a list; say which share of them is done where nothing was printed for SILENCE seconds."""
    for done, item in enumerate(items):
        if done and time.perf_counter() > _last_line + SILENCE:
            say(f"  {what}: {done / len(items):.0%}")
        yield item


def say(*words, file=None):
    """Print a line. A closed pipe or a full disk ends no run."""
    global _last_line
    stream, _last_line = file or sys.stdout, time.perf_counter()
    try:
        with contextlib.suppress(ValueError):  # the stream is closed
            print(*words, file=stream, flush=True)
    except OSError:  # from now on nothing is printed there, not even when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
