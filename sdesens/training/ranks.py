"""Several processes that train together, started by torchrun; one process is the case of one rank.

Gradients are averaged by torch's DistributedDataParallel, over gloo on CPUs and nccl on GPUs. Which numbers are summed together is
settled in its first two passes, when it learns the order in which gradients arrive. So two passes are made and thrown away,
after a start as after a restart: from then on a run and its resumption do the same sums.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its default arguments would else keep: see `join`
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdesens.errors import ArgumentError


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes
    ----------
    rank, size : int
    device : torch.device
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a float32 tensor over the ranks, on each of them; a mean of means is the same one to the bit."""
        if self.size == 1:
            return x
        total = x.double()  # holds a sum of float32 numbers of like size without rounding, whatever its order
        dist.all_reduce(total)
        return (total / self.size).to(x)

    def agree(self, value: int) -> int:
        """The first rank's number, on each rank."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(box, 0)
        return int(box)

    def wrap(self, net: nn.Module, dry_pass: Callable[[nn.Module], Tensor]) -> nn.Module:
        """The network, averaging its gradients over the ranks; see the head of this file for `dry_pass`, a loss of it."""
        if self.size == 1:
            return net
        wrapped = DistributedDataParallel(net, device_ids=[self.device] if self.device.type == "cuda" else None)
        for _ in range(2):
            dry_pass(wrapped).backward()
            net.zero_grad(set_to_none=True)
        return wrapped


def unsynchronised(net: nn.Module, wanted: bool):
    """A context in which gradients stay on their rank, for all pieces of a step but the last."""
    return net.no_sync() if wanted and isinstance(net, DistributedDataParallel) else nullcontext()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """A device by name; "auto" is a GPU if there is one.

    Example
    -------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device).item()  # one that holds values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"`device` {name!r} cannot be used here ({str(error).splitlines()[0]}): try cpu."
        ) from error
    return device


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """This process's place among those that torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1 or dist.is_initialized():
        alone = size == 1
        yield Ranks(0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
        # None leaves before the first has saved. Then the group goes, and its threads end with it: one that still had
        # a tensor to let go of while Python shuts down would abort the process.
        dist.barrier(device_ids=[chosen.index] if chosen.type == "cuda" else None)
    finally:
        dist.destroy_process_group()
