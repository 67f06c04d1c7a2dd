"""What uneven ground costs: env.step of walk-rough against walk, on this machine's CPU, in one run.

    python benchmarks/rough_throughput.py --output benchmarks/results/rough_throughput.json

The two are stepped in turn under the same random actions, so that the machine's moods fall on both alike;
the ratio is the median over the turns. The robots of walk-rough are spread evenly over types and levels.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
import tyro
from rich.console import Console

from kouros.envs.config import HumanoidEnvConfig, walk_rough
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.scene import ground_geoms
from kouros.files import write_json


@dataclasses.dataclass
class Config:
    """Control steps per second of walk and of walk-rough."""

    worlds: int = 256
    """Number of worlds."""
    turns: int = 15
    """Turns of 25 control steps each."""
    output: str | None = None
    """JSON file for the figures."""


def make(config: HumanoidEnvConfig, worlds: int) -> HumanoidBaseEnv:
    # Without the curriculum, levels are drawn evenly.
    terrain = dataclasses.replace(config.terrain, curriculum=False)
    env = HumanoidBaseEnv(dataclasses.replace(config, num_envs=worlds, terrain=terrain))
    env.reset(seed=0)
    return env


def main(config: Config) -> None:
    envs = {"walk": make(HumanoidEnvConfig(), config.worlds), "walk-rough": make(walk_rough(), config.worlds)}
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
    samples = 25 * config.worlds

    def ratio(of: dict[str, list[float]]) -> float:
        return statistics.median(a / b for a, b in zip(of["walk"], of["walk-rough"], strict=True))

    result = {
        "worlds": config.worlds,
        "threads": envs["walk"].simulation.num_threads,  # type: ignore[attr-defined]
        "shapes": ground_geoms(envs["walk-rough"].simulation.model).stop,
        **{f"{name}, control steps/s": samples / statistics.median(s) for name, s in seconds.items()},
        "walk-rough / walk": ratio(seconds),
        "walk-rough / walk, physics alone": ratio(physics),
    }
    Console().print(result)
    if config.output:
        write_json(config.output, result)


if __name__ == "__main__":
    main(tyro.cli(Config))
