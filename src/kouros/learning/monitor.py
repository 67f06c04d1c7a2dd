"""What a run tells of itself beside its learning: hardware, robots, histograms; and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kouros.learning.config import TrainConfig

BINS = 64


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of values between edges."""

    counts: torch.Tensor
    """``(bins,)``."""
    edges: torch.Tensor
    """``(bins + 1,)``, rising."""


def histogram(values: torch.Tensor, bins: int = BINS) -> Histogram | None:
    """The finite ones of ``values``, of any shape, between the smallest and the largest; None without any.

    Counted where the values are: only the counts leave the device.
    """
    finite = values[torch.isfinite(values)]
    if not len(finite):
        return None
    low, high = torch.stack(finite.aminmax()).tolist()
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(finite, bins, low, high).cpu().double()
    return Histogram(counts, torch.linspace(low, high, bins + 1, dtype=torch.float64))


def add_histogram(board: Any, name: str, drawn: Histogram, iteration: int) -> None:
    """Hand one to a TensorBoard ``SummaryWriter``, with the moments of its bins' centres."""
    counts, edges = drawn.counts, drawn.edges
    centres = 0.5 * (edges[1:] + edges[:-1])
    board.add_histogram_raw(
        name,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=int(counts.sum()),
        sum=float(counts @ centres),
        sum_squares=float(counts @ centres.square()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=iteration,
    )


class Hardware:
    """What the run takes of its machine.

    Args:
      device: of the worlds and the networks.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._last = (time.monotonic(), time.process_time())

    def read(self) -> dict[str, float]:
        """For the log: ``hardware/cpu_percent`` of one core since the last call, all threads together;
        ``hardware/memory_gb``, resident; on a GPU ``gpu_memory_gb``, all that is taken of it, and
        ``gpu_percent``, the share of time it computes, where nvidia-ml-py is there to ask."""
        now = (time.monotonic(), time.process_time())
        wall, cpu = (a - b for a, b in zip(now, self._last, strict=True))
        self._last = now
        log = {"hardware/cpu_percent": 100.0 * cpu / max(wall, 1e-9), "hardware/memory_gb": _resident() / 1e9}
        if self._device.type == "cuda":
            # Of the whole GPU: torch does not see what the physics takes.
            free, total = torch.cuda.mem_get_info(self._device)
            log["hardware/gpu_memory_gb"] = (total - free) / 1e9
            with contextlib.suppress(Exception):  # no nvidia-ml-py, or a GPU that does not tell
                log["hardware/gpu_percent"] = float(torch.cuda.utilization(self._device))
        return log


def _resident() -> float:
    """Resident memory of this process, bytes; its largest so far where there is no ``/proc``."""
    with contextlib.suppress(OSError):
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
        return float(pages) * os.sysconf("SC_PAGE_SIZE")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def randomization_log(env: Any) -> dict[str, float]:
    """For the log: mean and deviation over the worlds of each term of the randomization that is on, in the
    units of its configuration; nothing for an environment without any."""
    drawn = getattr(env, "randomization", None)
    if drawn is None or not drawn.names:
        return {}
    moments = [(drawn[name].mean(), drawn[name].std(correction=0)) for name in drawn.names]
    values = iter(torch.stack([moment for pair in moments for moment in pair]).tolist())
    names = [f"randomization/{name}{what}" for name in drawn.names for what in ("", "_std")]
    return dict(zip(names, values, strict=True))


def require_wandb(project: str) -> None:
    """Raise ``ImportError`` with the remedy unless Weights & Biases is installed."""
    try:
        import wandb

        wandb.init  # noqa: B018 (a folder that wandb itself left imports too, as an empty package)
    except (ImportError, AttributeError):
        text = f"wandb={project!r}: Weights & Biases is not installed here: pip install 'kouros[wandb]'"
        raise ImportError(text) from None


class WandbLogger:
    """The log, to Weights & Biases. A resumed run goes on there too, by the id in ``wandb.id``.

    A service that fails on the way is said once, and the training goes on.

    Args:
      folder: the run's.
      config: the run's; ``config.wandb`` is the project.
      tell: given a line of text when the service fails.

    Raises:
      RuntimeError: the service refuses, for want of a login or of a network.
    """

    def __init__(self, folder: Path, config: TrainConfig, tell: Callable[[str], None] = print) -> None:
        import wandb

        self._tell, self._failed = tell, False
        path = folder / "wandb.id"
        name = path.read_text("utf-8") if config.resume and path.is_file() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=config.wandb,
                name=folder.resolve().name,
                id=name,
                resume="allow",
                dir=str(folder),
                config=dataclasses.asdict(config),
            )
        except Exception as error:  # whatever a service may raise
            raise RuntimeError(f"wandb={config.wandb!r}: {error}") from error
        # Not wandb's own step, which may only rise: a training that goes back repeats its iterations.
        self._run.define_metric("*", step_metric="iteration")
        path.write_text(name, "utf-8")

    def write(self, log: dict[str, Any]) -> None:
        """Send a row with its ``iteration``."""
        try:
            self._run.log(log)
        except Exception as error:  # whatever a service may raise
            if not self._failed:
                self._tell(f"Weights & Biases: {error}; the training goes on, metrics.jsonl has it all")
            self._failed = True

    def write_histograms(self, drawn: dict[str, Histogram], iteration: int) -> None:
        import wandb

        pairs = {name: (h.counts.numpy(), h.edges.numpy()) for name, h in drawn.items()}
        sent = {name: wandb.Histogram(np_histogram=pair) for name, pair in pairs.items()}
        self.write({"iteration": iteration, **sent})

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._run.finish()
