"""One training by several processes, as `torchrun` starts them; without it there is one, and nothing changes.

Every process draws the random numbers of the whole batch and computes its share of it, so that the run is that
of one process but for the order in which sums are taken. (Dropout, which no default of step 2 has, is drawn by each
process for its own share.)
"""

import os
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(device):
    """Meet the other processes; returns this one's device, which is a GPU of its own where there are GPUs.

    From here on the first process alone prints.
    """
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    return device


def go_on_alone():
    """Part with the other processes; whether this is the first, which does what is left."""
    first = is_first()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return first


def is_first():
    return not distributed.is_initialized() or distributed.get_rank() == 0


def num_processes():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wrap(network):
    """The network with gradients averaged over the processes."""
    if not distributed.is_initialized():
        return network
    return DistributedDataParallel(network, broadcast_buffers=False)


def share(batch):
    """What this process takes of a batch, every n-th item for n processes; it may be empty."""
    return batch[distributed.get_rank() :: num_processes()] if distributed.is_initialized() else batch


_summed = None


def total(value, device="cpu"):
    """The sum of a number over the processes."""
    if not distributed.is_initialized():
        return value
    # Kept until the next sum. If the thread that sums were the last to hold it, it would need the interpreter's lock to
    # free it, which `destroy_process_group` of torch 2.6 holds while it waits for that thread: neither would ever end.
    global _summed
    _summed = torch.tensor(float(value), dtype=torch.float64, device=device)
    distributed.all_reduce(_summed)
    return _summed.item()


def mean(number):
    """The mean of a scalar tensor over the processes, as a float."""
    if not distributed.is_initialized():
        return number.item()
    return total(number.detach(), number.device) / num_processes()
