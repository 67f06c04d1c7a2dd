"""How fast this machine is, layer by layer, each against the physics under it, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from kouros.envs.config import HumanoidEnvConfig
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.learning.config import PPOConfig
from kouros.learning.ppo import PPOAgent
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
        turns += 1
    return {name: values[1:] for name, values in times.items()}


class Bench:
    """An environment, raw physics on the same model, and a learner.

    Raw physics is ``simulation.step`` alone, driven by the controls that the environment gave its own
    worlds and from the same states: the robots of both fall and stand alike.
    """

    def __init__(self, config: HumanoidEnvConfig) -> None:
        start = time.perf_counter()
        self.env = HumanoidBaseEnv(config)
        self.build_seconds = time.perf_counter() - start
        self._raw = make_simulation(self.env.simulation.model, config.num_envs)
        self._agent = PPOAgent(self.env, PPOConfig())
        self.horizon = self._agent.config.horizon
        self._generator = torch.Generator().manual_seed(0)
        self._actions = [
            0.5 * torch.randn(self.env.num_envs, self.env.robot.num_joints, generator=self._generator)
            for _ in range(self.horizon)
        ]
        self._controls = [self.env.simulation.ctrl.clone()] * self.horizon

    def env_steps(self) -> None:
        """``env.step``, ``horizon`` times: observations, rewards and resets included."""
        for action in self._actions:
            self.env.step(action)

    def physics_steps(self) -> None:
        """The physics of the last :meth:`remember`, alone."""
        for ctrl in self._controls:
            self._raw.ctrl.copy_(ctrl)
            self._raw.step(self.env.config.frame_skip)

    def remember(self) -> None:
        """Put the raw worlds where the environment is, and note the controls it is about to give."""
        self._raw.load_state_dict(self.env.simulation.state_dict())
        scale, offset = self.env.action_scale, self.env.action_offset
        self._controls = [(offset + scale * a).to(self._raw.dtype) for a in self._actions]

    def iteration(self) -> None:
        """One PPO iteration: rollout and update."""
        self._agent.train(1)

    def measure(self, seconds: float) -> dict[str, float]:
        """Control steps per second of each layer (medians), and ratios taken turn by turn."""
        layers = {
            "remember": self.remember,
            "physics": self.physics_steps,
            "env": self.env_steps,
            "iteration": self.iteration,
        }
        times = interleaved(layers, seconds)
        samples = self.horizon * self.env.num_envs

        def ratio(slow: str, fast: str) -> float:
            return statistics.median(f / s for s, f in zip(times[slow], times[fast], strict=True))

        return {
            "worlds": self.env.num_envs,
            "build_seconds": self.build_seconds,
            **{name: samples / statistics.median(times[name]) for name in layers if name != "remember"},
            "env / physics": ratio("env", "physics"),
            "iteration / env": ratio("iteration", "env"),
        }


def report(results: list[dict[str, float]]) -> None:
    """Print figures of :meth:`Bench.measure`, a row each."""
    table = Table(title="control steps per second (medians), and ratios taken turn by turn")
    for title in results[0]:
        table.add_column(title, justify="right")
    for row in results:
        table.add_row(*(f"{v:.2f}" if v < 100 else f"{v:,.0f}" for v in row.values()))
    Console().print(table)
