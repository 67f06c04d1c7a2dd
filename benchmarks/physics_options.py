"""What the model's physics options cost: the task's model against others, in one run.

    python benchmarks/physics_options.py --output benchmarks/results/physics_options.json

Every model is stepped from the same states with the same controls, in turn; a ratio is the median over the
turns. Once with robots that walk under the shipped policy, once with robots that flail as in early training.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mujoco
import torch
import tyro
from rich.console import Console
from rich.table import Table

from kouros.envs.config import CALM
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.scene import make_model
from kouros.files import write_json
from kouros.learning.run import load_policy
from kouros.physics.simulation import make_simulation


def interleaved(functions: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Durations of each function, called in turn: a machine's moods fall on all of them alike.

    Args:
      functions: what to time.
      seconds: time for all turns together, about; at least three are kept.

    Returns:
      Seconds of each call, without the first turn.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    turns = 0
    while turns < 4 or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - before)
        if not turns:
            start = time.perf_counter()
        turns += 1
    return {name: values[1:] for name, values in times.items()}


@dataclasses.dataclass
class Config:
    """Cost of a physics step with other options, in units of the task's own."""

    worlds: int = 256
    """Number of worlds."""
    seconds: float = 60.0
    """Time for the comparison, s."""
    output: Path | None = None
    """JSON file for the figures."""


def variants(env: HumanoidBaseEnv) -> dict[str, mujoco.MjModel]:
    """The task's model, and others that differ from it in one thing each."""
    models = {"as in the task": env.simulation.model}
    full = make_model(env.robot, dataclasses.replace(env.config, collisions="full"))
    models["every shape, self-collision"] = full
    models["all seven capsules of a sole"] = soles = copy.copy(full)
    limbs = soles.geom_group == 2
    soles.geom_contype[limbs] = soles.geom_conaffinity[limbs] = 0
    models["dense Jacobian"] = dense = copy.copy(env.simulation.model)
    dense.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    models["constraint islands"] = islands = copy.copy(env.simulation.model)
    islands.opt.disableflags ^= mujoco.mjtDisableBit.mjDSBL_ISLAND
    return models


@torch.no_grad()
def costs(policy: Callable[[torch.Tensor], torch.Tensor], env: HumanoidBaseEnv, seconds: float) -> dict:
    """Cost of a physics step of each variant, in units of the task's own, for robots under a policy."""
    obs, _ = env.reset(seed=0)
    simulations = {name: make_simulation(m, env.num_envs) for name, m in variants(env).items()}

    def act() -> None:
        nonlocal obs
        for _ in range(10):
            obs, *_ = env.step(policy(obs))
        state = env.simulation.state_dict()
        for simulation in simulations.values():
            simulation.load_state_dict(state)

    functions = {name: lambda s=s: s.step(4 * env.config.frame_skip) for name, s in simulations.items()}
    for _ in range(10):
        act()
    # Whoever comes first after the policy finds cold caches: that turn is not counted.
    times = interleaved({"act": act, "first": functions["as in the task"], **functions}, seconds)
    base = times["as in the task"]
    return {
        name: statistics.median(t / b for t, b in zip(times[name], base, strict=True)) for name in functions
    }


def main(config: Config) -> None:
    actor, env_config, _ = load_policy("walk")
    env = HumanoidBaseEnv(dataclasses.replace(env_config, num_envs=config.worlds, harness=0.0, **CALM))
    generator = torch.Generator().manual_seed(0)
    policies = {
        "walking": actor.act,
        "flailing": lambda obs: 0.5 * torch.randn(env.action_space.shape, generator=generator),
    }
    results = {name: costs(policy, env, config.seconds / 2) for name, policy in policies.items()}
    table = Table("cost of a physics step", *(f"robots {name}" for name in results))
    for name in results["walking"]:
        table.add_row(name, *(f"{ratios[name]:.2f}" for ratios in results.values()))
    Console().print(table)
    if config.output:
        write_json(config.output, results)


if __name__ == "__main__":
    main(tyro.cli(Config))
