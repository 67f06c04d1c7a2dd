"""CUDA graphs: a function of fixed tensors, recorded once and replayed without the host."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class Recorded:
    """A function recorded as one CUDA graph: the same kernels on the same memory at each replay.

    The function takes nothing, reads and writes tensors that stay where they are, and may return any
    structure of tensors: each replay fills the same ones anew. It runs twice before it is recorded
    (libraries set themselves up); what that changed is put back.

    Args:
      function: without host synchronization and without shapes that depend on data.
      device: the GPU.
      generators: random generators it draws from; each replay draws on.
      owner: an object with ``state_dict`` and ``load_state_dict`` that the function changes; its tensor
        attributes, and those of the environments that it wraps, are those of the recording after each replay.
      tensors: what else it changes.

    Raises:
      RuntimeError: the function needs the host.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        owner: Any = None,
        tensors: Sequence[torch.Tensor] = (),
    ) -> None:
        stream = torch.cuda.Stream(device)
        with trying_out(generators, owner, tensors):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                function()
                function()
            torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)

        self._graph = torch.cuda.CUDAGraph()
        _recordings.add(self)
        for generator in generators:
            self._graph.register_generator_state(generator)
        # A pool by thread: MuJoCo Warp's loops suspend the recording, and torch would take the memory
        # of what follows from the common pool, and give it away afterwards.
        self._pool = torch.cuda.MemPool()
        handle = torch.cuda.graph_pool_handle()
        recording = torch.cuda.graph(self._graph, handle, stream, capture_error_mode="thread_local")
        try:
            with recording, _warp_recording(stream), torch.cuda.use_mem_pool(self._pool, device):
                self.result = function()
        except Exception as error:
            # torch does not tell its allocator that a recording has failed, and ends the process when memory
            # of it is freed.
            torch._C._cuda_endAllocateToPool(_index(device), handle)
            _broken.append((self._graph, self._pool, error))
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"cannot record this as a CUDA graph ({reason}). Something in it, perhaps a reward or "
                "observation term of your own, asks the host for a value (.item(), .cpu(), an if on a "
                "tensor), indexes with a list or a mask, or makes a tensor from numbers: docs/gpu.md says "
                "what to write instead; --env.no-graph --ppo.no-graph runs it as it is"
            ) from error
        self._attributes = []
        while owner is not None:
            found = {name: v for name, v in vars(owner).items() if isinstance(v, torch.Tensor)}
            self._attributes.append((owner, found))
            owner = vars(owner).get("env")

    def replay(self) -> Any:
        """Run it once more; the same result tensors, filled anew."""
        self._graph.replay()
        for owner, found in self._attributes:
            vars(owner).update(found)
        return self.result


_broken: list[Any] = []
_recordings: weakref.WeakSet[Recorded] = weakref.WeakSet()


def drop_recordings() -> None:
    """Give back all recordings there are; none can be replayed any more."""
    for recorded in list(_recordings):
        recorded._graph.reset()


@functools.cache
def warp_stream(stream: torch.cuda.Stream) -> Any:
    """Warp's view of a torch stream: the same object each time, by which Warp knows its recordings."""
    import warp as wp

    return wp.stream_from_torch(stream)


@contextlib.contextmanager
def _warp_recording(stream: torch.cuda.Stream) -> Iterator[None]:
    """Tell Warp, where it is in use, that torch records this stream."""
    if "warp" not in sys.modules:
        yield
        return
    import warp as wp

    same = warp_stream(stream)
    with wp.ScopedStream(same, sync_enter=False), wp.ScopedCapture(stream=same, external=True):
        yield


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


_trying_out = 0


@contextlib.contextmanager
def trying_out(
    generators: Sequence[torch.Generator], owner: Any, tensors: Sequence[torch.Tensor]
) -> Iterator[None]:
    """What is run inside leaves no trace in the generators, the owner and the tensors."""
    global _trying_out
    state = owner.state_dict() if owner is not None else None
    copies = [tensor.clone() for tensor in tensors]
    random = [generator.get_state() for generator in generators]
    _trying_out += 1
    try:
        yield
    finally:
        _trying_out -= 1
    if owner is not None:
        owner.load_state_dict(state)
    with torch.no_grad():
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
    for generator, before in zip(generators, random, strict=True):
        generator.set_state(before)


def is_recording() -> bool:
    """Whether the current stream is being recorded, or what will be is tried out."""
    return _trying_out > 0 or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
