"""How fast this machine is, layer by layer, each against the physics under it, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table

from kouros.envs.config import HumanoidEnvConfig
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.graphs import Recorded
from kouros.learning.config import PPOConfig
from kouros.learning.ppo import PPOAgent
from kouros.physics.simulation import make_simulation


def interleaved(functions: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
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
            _synchronize()
            before = time.perf_counter()
            function()
            _synchronize()
            times[name].append(time.perf_counter() - before)
        if not turns:
            start = time.perf_counter()  # the first turn compiles and records
        turns += 1
    return {name: values[1:] for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """An environment, raw physics on the same model, and a learner.

    Raw physics is the engine's step alone, driven by the controls that the environment gave its own
    worlds and from the same states: the robots of both fall and stand alike. On a GPU it is a CUDA
    graph too.
    """

    def __init__(self, config: HumanoidEnvConfig, ppo: PPOConfig | None = None, device: str = "cpu") -> None:
        start = time.perf_counter()
        free = torch.cuda.mem_get_info()[0] if device != "cpu" else 0
        self.env = env = HumanoidBaseEnv(config, device)
        self.build_seconds = time.perf_counter() - start
        self._agent = PPOAgent(env, ppo or PPOConfig())
        self.horizon = self._agent.config.horizon
        generator = torch.Generator(env.device).manual_seed(0)
        shape = (env.num_envs, env.robot.num_joints)
        self._actions = [
            0.5 * torch.randn(shape, generator=generator, device=env.device) for _ in range(self.horizon)
        ]
        self.first_step_seconds = -time.perf_counter()
        env.step(self._actions[0])
        _synchronize()
        self.first_step_seconds += time.perf_counter()
        self.bytes_per_world = 0.0
        if device != "cpu":
            self.bytes_per_world = (free - torch.cuda.mem_get_info()[0]) / env.num_envs
        self._raw = make_simulation(env.simulation.model, env.num_envs, device, config.engine)
        self._controls = [env.simulation.ctrl.clone()] * self.horizon
        self._recorded: Recorded | None = None

    def _raw_step(self) -> None:
        if self._raw.device.type == "cpu":
            self._raw.step(self.env.config.frame_skip)
            return
        for _ in range(self.env.config.frame_skip):
            self._raw.step()  # sensors every time: MuJoCo Warp's own step, nothing left out

    def env_steps(self) -> None:
        """``env.step``, ``horizon`` times: observations, rewards and resets included."""
        for action in self._actions:
            self.env.step(action)

    def physics_steps(self) -> None:
        """The physics of the last :meth:`remember`, alone."""
        step = self._raw_step
        if self._raw.device.type == "cuda":
            self._recorded = self._recorded or Recorded(step, self._raw.device, owner=self._raw)
            step = self._recorded.replay
        for ctrl in self._controls:
            self._raw.ctrl.copy_(ctrl)
            step()

    def remember(self) -> None:
        """Put the raw worlds where the environment is, and note the controls it is about to give."""
        self._raw.load_state_dict(self.env.simulation.state_dict())
        scale, offset = self.env.action_scale, self.env.action_offset
        self._controls = [(offset + scale * a).to(self._raw.dtype) for a in self._actions]

    def rollout(self) -> None:
        """``horizon`` steps of the policy in the environment, stored."""
        self._rollout = self._agent.collect_rollouts()

    def update(self) -> None:
        """One PPO update."""
        self._agent.update(self._rollout)

    def iteration(self) -> None:
        """One PPO iteration: rollout and update, and the log read."""
        self._agent.train(1)

    def measure(self, seconds: float) -> dict[str, float]:
        """Control steps per second of each layer (medians), and ratios taken turn by turn."""
        layers = {
            "remember": self.remember,
            "physics": self.physics_steps,
            "env": self.env_steps,
            "rollout": self.rollout,
            "update": self.update,
            "iteration": self.iteration,
        }
        self._agent.train(1)  # the first one only sets the normalizers
        times = interleaved(layers, seconds)
        samples = self.horizon * self.env.num_envs
        median = {name: statistics.median(values) for name, values in times.items()}

        def ratio(slow: str, fast: str) -> float:
            return statistics.median(f / s for s, f in zip(times[slow], times[fast], strict=True))

        return {
            "worlds": self.env.num_envs,
            "build_seconds": self.build_seconds,
            "first_step_seconds": self.first_step_seconds,
            "kB_per_world": self.bytes_per_world / 1e3,
            **{name: samples / median[name] for name in ("physics", "env", "rollout", "iteration")},
            "env / physics": ratio("env", "physics"),
            "rollout / physics": ratio("rollout", "physics"),
            "iteration / env": ratio("iteration", "env"),
            "update_ms": 1e3 * median["update"],
            "iteration_ms": 1e3 * median["iteration"],
        }


def report(results: list[dict[str, float]]) -> None:
    """Print figures of :meth:`Bench.measure`, a column each."""
    table = Table("", title="control steps per second (medians), and ratios taken turn by turn")
    for row in results:
        table.add_column(f"{row['worlds']:,.0f} worlds", justify="right")
    for name in results[0]:
        table.add_row(name, *(f"{row[name]:,.{0 if row[name] >= 100 else 2}f}" for row in results))
    Console().print(table)
