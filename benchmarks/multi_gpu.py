"""Weak scaling of the training: as many worlds on each GPU, whatever their number.

    for n in 1 2 4; do
      torchrun --nproc-per-node $n benchmarks/multi_gpu.py --output benchmarks/results/multi_gpu.json
    done

All in one session of one machine. Each call adds a row to the file; the table shows all of them. Efficiency
is the speed of n processes over n times that of one. On a machine without a GPU it measures cores instead.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from kouros.devices import pick_device
from kouros.envs.wrappers import make_env
from kouros.files import write_json
from kouros.learning.config import train_defaults
from kouros.learning.ppo import PPOAgent
from kouros.learning.ranks import Ranks, joined, rank_device


@dataclasses.dataclass
class Config:
    """Iterations of several processes, one a GPU."""

    worlds: int = 4096
    """Worlds of each process."""
    iterations: int = 50
    """Iterations that count, after 10 that do not."""
    horizon: int = 24
    """Control steps of each world in an iteration."""
    hidden: tuple[int, ...] = (512, 256, 128)
    """Units of the networks' hidden layers."""
    output: Path | None = None
    """JSON file that the row is added to."""


def measure(config: Config, device: str, ranks: Ranks) -> dict[str, Any]:
    """What a row of the table says."""
    run = train_defaults(device)
    run.env.num_envs, run.ppo.horizon = config.worlds, config.horizon
    run.ppo.actor_hidden = run.ppo.critic_hidden = config.hidden
    if device == "cpu":
        run.env.num_threads = 1
    agent = PPOAgent(make_env(run.env, device), run.ppo, ranks=ranks)
    agent.train(10, log_interval=10)
    ranks.everywhere([0.0])  # all begin together
    start = time.perf_counter()
    agent.train(config.iterations, log_interval=config.iterations)
    if device != "cpu":
        torch.cuda.synchronize()
    (slowest,) = max(ranks.everywhere([time.perf_counter() - start]))
    return {
        "processes": ranks.size,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "worlds_each": config.worlds,
        "samples": agent.samples,
        "iteration_s": slowest / config.iterations,
        "steps_per_second": config.iterations * agent.samples / slowest,
    }


def main(config: Config) -> None:
    device = rank_device(pick_device())
    with joined(device) as ranks:
        row = measure(config, device, ranks)
    if not ranks.first:
        return
    rows = json.loads(config.output.read_text()) if config.output and config.output.exists() else []
    rows.append(row)
    one = next((r["steps_per_second"] for r in rows if r["processes"] == 1), float("nan"))
    table = Table("processes", "device", "worlds each", "iteration (s)", "control steps/s", "efficiency")
    for r in rows:
        speed, n = r["steps_per_second"], r["processes"]
        figures = (f"{r['iteration_s']:.4f}", f"{speed:,.0f}", f"{speed / (n * one):.3f}")
        table.add_row(str(n), r["device"], str(r["worlds_each"]), *figures)
    Console().print(table)
    if config.output:
        write_json(config.output, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
