"""What randomization, wrappers and uneven ground cost: env.step of each against plain walk, in one run.

    python benchmarks/variants_throughput.py --output benchmarks/results/variants_throughput.json

All are stepped in turn under the same random actions, so that the machine's moods fall on all alike; ratios
are medians over the turns. The robots of walk-rough are spread evenly over types and levels.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
import tyro
from rich.console import Console

from kouros.envs.config import HumanoidEnvConfig, randomization, walk_rough
from kouros.envs.wrappers import make_env
from kouros.files import write_json


@dataclasses.dataclass
class Config:
    """Control steps per second of walk and of what is harder."""

    worlds: int = 256
    """Number of worlds."""
    turns: int = 15
    """Turns of 25 control steps each."""
    output: str | None = None
    """JSON file for the figures."""


def variants() -> dict[str, HumanoidEnvConfig]:
    rough = walk_rough()
    rough.terrain.curriculum = False  # levels are drawn evenly
    sim2real = HumanoidEnvConfig(randomization=randomization("sim2real"), wrappers=("history:5",))
    return {"walk": HumanoidEnvConfig(), "sim2real, history:5": sim2real, "walk-rough": rough}


def main(config: Config) -> None:
    envs = {
        name: make_env(dataclasses.replace(variant, num_envs=config.worlds), "cpu")
        for name, variant in variants().items()
    }
    for env in envs.values():
        env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in envs}
    physics: dict[str, list[float]] = {name: [] for name in envs}
    for turn in range(config.turns + 1):
        actions = [0.5 * torch.randn(config.worlds, 29, generator=generator) for _ in range(25)]
        for name, env in envs.items():
            env.simulation.seconds = 0.0
            start = time.perf_counter()
            for action in actions:
                env.step(action)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
                physics[name].append(env.simulation.seconds)
    result: dict[str, Any] = {"worlds": config.worlds, "threads": envs["walk"].simulation.num_threads}
    for name in envs:

        def ratio(of: dict[str, list[float]], name: str = name) -> float:
            return statistics.median(a / b for a, b in zip(of["walk"], of[name], strict=True))

        result[name] = {
            "control steps per second": 25 * config.worlds / statistics.median(seconds[name]),
            "against walk": ratio(seconds),
            "against walk, physics alone": ratio(physics),
        }
    Console().print(result)
    if config.output:
        write_json(config.output, result)


if __name__ == "__main__":
    main(tyro.cli(Config))
