"""Kouros against the physics under it and against EnvPool, on this machine's CPU, in one run.

    pip install -e '.[bench]' && python benchmarks/cpu_throughput.py --output benchmarks/results/cpu.json

EnvPool's G1JoystickFlatTerrain-v1 is MuJoCo Playground's task for the same robot in C++: PD control at
50 Hz over 5 ms steps as here. All of them are stepped in turn, so that the machine's moods fall on all
alike; a ratio is the median over the turns.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time

import numpy as np
import tyro
from rich.console import Console

from kouros.envs.config import HumanoidEnvConfig
from kouros.files import write_json
from kouros.learning.bench import Bench, report


@dataclasses.dataclass
class Config:
    """Control steps per second: raw physics, env.step, PPO end to end, EnvPool."""

    worlds: int = 256
    """Number of worlds."""
    seconds: float = 30.0
    """Time for each comparison, s."""
    output: str | None = None
    """JSON file for the figures."""


def envpool_steps(worlds: int, steps: int, threads: int):
    import envpool

    env = envpool.make_gymnasium("G1JoystickFlatTerrain-v1", num_envs=worlds, num_threads=threads, seed=0)
    env.reset()
    rng = np.random.default_rng(0)
    shape = (worlds, *env.action_space.shape)

    def run() -> None:
        for _ in range(steps):
            env.step(0.5 * rng.standard_normal(shape))

    return run


def main(config: Config) -> None:
    bench = Bench(HumanoidEnvConfig(num_envs=config.worlds))
    result = bench.measure(config.seconds)
    peer = envpool_steps(config.worlds, bench.horizon, os.cpu_count() or 1)
    peer()
    turns: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(turns) < 3 or time.perf_counter() - start < config.seconds:
        before = time.perf_counter()
        bench.env_steps()
        middle = time.perf_counter()
        peer()
        turns.append((middle - before, time.perf_counter() - middle))
    samples = bench.horizon * config.worlds
    result["envpool"] = samples / statistics.median(theirs for _, theirs in turns)
    result["env / envpool"] = statistics.median(theirs / ours for ours, theirs in turns)
    report([result])
    if config.output:
        write_json(config.output, result)
        Console().print(f"saved in {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config))
