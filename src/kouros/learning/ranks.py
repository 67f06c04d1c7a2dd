"""Several processes that learn one policy, each with worlds of its own: what torchrun starts.

    torchrun --nproc-per-node 4 -m kouros train

One process has one GPU. Each step down follows the mean of all gradients, so the networks stay the same in
all of them. Alone, everything here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from kouros.graphs import drop_recordings


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that learn together.

    Collective methods must be called by all of them, in the same order.
    """

    rank: int = 0
    """Which one this is; 0 alone writes."""
    size: int = 1
    """How many there are."""
    local_size: int = 1
    """How many of them are on this machine."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its mean over all: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def everywhere(self, values: list[float]) -> list[list[float]]:
        """The numbers that each of them has, by rank."""
        if self.size == 1:
            return [values]
        found = [torch.zeros(len(values), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(values, dtype=torch.float64))
        return [numbers.tolist() for numbers in found]

    def any(self, flag: bool) -> bool:
        """Whether it is true for one of them."""
        return any(number for (number,) in self.everywhere([float(flag)]))

    def gather(self, value: Any) -> list[Any]:
        """What each of them has, plain data and CPU tensors, by rank; empty but in the first."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, found)
        return found or []


ALONE = Ranks()


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank_device(device: str) -> str:
    """The device of this process: with several on a machine, each has the GPU of its number.

    Raises:
      ValueError: all were given the same GPU; there are fewer GPUs than processes.
    """
    if not started_by_torchrun() or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(f"device={device!r}: each process of torchrun has its own GPU; use cuda, or cpu")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise ValueError(f"torchrun --nproc-per-node {here}: each process needs a GPU, and there are {gpus}")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process among those that torchrun started, on a :func:`rank_device`; alone without it."""
    if not started_by_torchrun():
        yield ALONE
        return
    index = torch.device(device)
    if index.type == "cuda":
        torch.cuda.set_device(index)  # before anything is allocated, or all would sit on the first GPU
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=index)
    else:
        dist.init_process_group("gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    drop_recordings()  # those that hold an all-reduce: the next line would wait for them to go
    dist.destroy_process_group()  # not after an error: it would wait for those that are dead
