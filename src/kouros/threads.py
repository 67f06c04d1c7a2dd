"""How many threads torch's own operations use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Run with ``n`` torch threads.

    Operations on a few hundred rows gain nothing from more than one, and OpenMP's workers go on
    spinning after them: on the cores that the physics needs next.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
