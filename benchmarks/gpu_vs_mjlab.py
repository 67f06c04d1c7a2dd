"""Kouros and mjlab 1.6.0 on one GPU, one after the other in one session: the same robot, the same shapes.

    python benchmarks/gpu_vs_mjlab.py --mjlab-path FOLDER[:FOLDER...] --output benchmarks/results/gpu.json

mjlab needs MuJoCo 3.11 and Kouros 4.0: install mjlab==1.6.0 elsewhere (``pip install --target FOLDER
mjlab==1.6.0``) and name that folder. Both are a G1 on flat ground that follows velocity commands, 4 steps
of 5 ms a control step, 10 solver and 20 line search iterations; random actions of deviation 0.5 for
``env.step``; 512-256-128 actor and critic, 24 steps, 5 epochs of 4 minibatches for learning. The tasks are
each project's own: mjlab's feet make more contacts than ours, which costs its physics more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import tyro

from kouros.envs.config import HumanoidEnvConfig
from kouros.files import write_json
from kouros.learning.bench import Bench, report
from kouros.learning.config import PPOConfig

HIDDEN = (512, 256, 128)


@dataclasses.dataclass
class Config:
    """Control steps per second of both, and milliseconds of an update and of an iteration."""

    mjlab_path: str
    """PYTHONPATH of a mjlab 1.6.0 with all that it needs."""
    worlds: tuple[int, ...] = (4096,)
    """Numbers of worlds."""
    seconds: float = 10.0
    """Time for our own figures at each number of worlds, s."""
    output: Path | None = None
    """JSON file for the figures."""


def mjlab(worlds: int, path: str) -> dict:
    """What ``_mjlab_peer.py`` prints last."""
    script = Path(__file__).with_name("_mjlab_peer.py")
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, script, str(worlds)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"mjlab_path={path}: mjlab failed there:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(config: Config) -> None:
    ppo = PPOConfig(horizon=24, actor_hidden=HIDDEN, critic_hidden=HIDDEN)
    results = []
    for worlds in config.worlds:
        row = Bench(HumanoidEnvConfig(num_envs=worlds), ppo, "cuda").measure(config.seconds)
        peer = mjlab(worlds, config.mjlab_path)
        row |= {f"mjlab {name}": value for name, value in peer.items() if isinstance(value, float)}
        row["env / mjlab env"] = row["env"] / peer["env_steps_per_second"]
        row["mjlab iteration / iteration"] = peer["iteration_ms"] / row["iteration_ms"]
        results.append(row)
    report(results)
    if config.output:
        write_json(config.output, results)


if __name__ == "__main__":
    main(tyro.cli(Config))
