"""One training shared by several processes, as `torchrun` starts them. A single process is left as it is.

All processes draw the same random batch and each computes a slice of it. Results match a single-process run up to
floating-point rounding. (Dropout is an exception: each process draws it for its own slice.)
"""

import os
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from utils.files import UserError


def launched():
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(device):
    """Meet the other processes; return the device of this one, a GPU of its own where there are GPUs.

    From here on only the first process prints.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        raise UserError(
            f"TORCHELASTIC_RUN_ID is set but not {', '.join(missing)}: start with torchrun or unset it"
        )
    if device.type == "cuda":
        rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= count:
            raise UserError(
                f"this machine has GPUs for {count} processes: start no more, or take --device cpu"
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    return device


def leave():
    """End the work together; return whether this is the first process, which does the rest alone."""
    first = is_first()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return first


def is_first():
    """Tell whether this process has rank 0, or is the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def num_processes():
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wrap(network):
    """Return the network with gradients averaged over the processes."""
    if not distributed.is_initialized():
        return network
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(*batches):
    """Return the slice of each batch that this process computes, every n-th item of n processes.

    A slice may be empty.
    """
    first = distributed.get_rank() if distributed.is_initialized() else 0
    return tuple(batch[first :: num_processes()] for batch in batches)


_summed = None


def total(values, device="cpu"):
    """Sum a list of numbers over the processes, element by element."""
    if not distributed.is_initialized():
        return values
    # Kept until the next sum. If the thread that sums were the last to hold it, it would need the interpreter's lock
    # to free it, which `destroy_process_group` of torch 2.6 holds while it waits for that thread: a deadlock.
    global _summed
    _summed = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(_summed)
    return _summed.tolist()
