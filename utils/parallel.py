"""One training shared by several processes, as `torchrun` starts them. A single process is left as it is.

All processes draw the same random batch and each computes a slice of it. Results match a single-process run
up to floating-point rounding, except that each process draws dropout for its own slice.
"""

import os
import sys
import warnings

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from utils.files import UserError


def launched():
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(device):
    """Meet the other processes; return this process's device. From here on only the first process prints."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise UserError("TORCHELASTIC_RUN_ID needs RANK, LOCAL_RANK, WORLD_SIZE: unset it or use torchrun")
    if device.type == "cuda":  # each process has a GPU of its own
        rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= count:
            raise UserError(f"there are GPUs for {count} processes: start no more, or take --device cpu")
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
    # The strides of a 1 x 1 kernel have no meaning, but torch compares them.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have another argument for it
        return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(*batches):
    """Return this process's slice of each batch: every n-th item of n processes, perhaps none."""
    first = distributed.get_rank() if distributed.is_initialized() else 0
    return tuple(batch[first :: num_processes()] for batch in batches)


def total(values, device="cpu"):
    """Sum a list of numbers over the processes, element by element."""
    if not distributed.is_initialized():
        return values
    # Kept until the next sum. If the summing thread were the last holder, it would need Python's lock to free
    # it. `destroy_process_group` of torch 2.6 holds that lock while it waits for the thread: a deadlock.
    total.kept = summed = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(summed)
    return summed.tolist()
