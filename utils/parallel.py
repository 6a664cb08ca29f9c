"""One training shared by the processes of `torchrun`, in the manner of nanoGPT. A single process is left as it is.

Each process trains on its part of every batch, with noise of its own, and `wrap` averages the gradients. Parts that
differ by an image count the same.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from utils.files import UserError

WAITING = timedelta(hours=12)  # for the first process, which evaluates and draws alone


def join(device):
    """Meet the other processes of torchrun; return this process's device. From here on the first one alone prints."""
    if not distributed.is_torchelastic_launched():
        return device
    if device.type == "cuda":  # each process has a GPU of its own
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise UserError(f"there are GPUs for {count} processes: start no more, or take --device cpu")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAITING)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def rank():
    """Return the number of this process. The first, or only, one has 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_processes():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def first_process(function):
    """Decorate a function that the first process calls alone, while the others wait."""

    def called(*arguments):
        if rank() == 0:
            function(*arguments)
        if distributed.is_initialized():
            distributed.barrier()

    return called


def wrap(network):
    """Return the network with gradients averaged over the processes, which begin with the weights of the first."""
    if not distributed.is_initialized():
        return network
    # The strides of a 1 x 1 kernel have no meaning, but torch compares them. Its older versions have no other argument.
    warnings.filterwarnings("ignore", "Grad strides do not match|`broadcast_buffers` is deprecated")
    return DistributedDataParallel(network, broadcast_buffers=False)


def mean(values):
    """Average a tensor over the processes."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values / num_processes()


def largest(number, device):
    """Return the largest of the processes' numbers."""
    if distributed.is_initialized():
        numbers = torch.tensor(number, device=device)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
        number = numbers.item()
    return number


def leave():
    """End the work together; return whether this is the first process, which does the rest alone."""
    first = rank() == 0
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return first
