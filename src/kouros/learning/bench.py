"""How fast this machine is, layer by layer, each against the physics under it, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kouros.devices import require_cuda
from kouros.envs.config import HumanoidEnvConfig
from kouros.envs.scene import room_for_contacts
from kouros.envs.wrappers import make_env
from kouros.graphs import Recorded
from kouros.learning.config import PPOConfig
from kouros.learning.ppo import PPOAgent, mark, seconds_between
from kouros.physics.simulation import make_simulation


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free_memory() -> int:
    """Of the current GPU, bytes; 0 where there is none."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


class Bench:
    """An environment, raw physics on the same model, and a learner.

    Raw physics is the engine's step alone, from the very states that the environment's worlds were in
    before each of its steps and under the same controls: the same work. On a GPU it is a CUDA graph too.
    """

    def __init__(self, config: HumanoidEnvConfig, ppo: PPOConfig | None = None, device: str = "cpu") -> None:
        if device != "cpu":
            require_cuda(device)
        free = _free_memory()
        start = time.perf_counter()
        self.env = env = make_env(config, device)
        self.build_seconds = time.perf_counter() - start
        self.horizon = (ppo or PPOConfig()).horizon
        generator = torch.Generator(env.device).manual_seed(0)
        shape = (env.num_envs, env.robot.num_joints)
        self._actions = [
            0.5 * torch.randn(shape, generator=generator, device=env.device) for _ in range(self.horizon)
        ]
        start = time.perf_counter()
        env.step(self._actions[0])
        _synchronize()
        self.first_step_seconds = time.perf_counter() - start
        self.bytes_per_world = (free - _free_memory()) / env.num_envs if device != "cpu" else 0.0
        self._agent = PPOAgent(env, ppo)
        sizes = (config.engine, config.num_threads, room_for_contacts(config))
        rubbing = "friction_loss" in config.randomization.enabled()
        self._raw = make_simulation(env.simulation.model, env.num_envs, device, *sizes, dry_friction=rubbing)
        self._recorded: Recorded | None = None

    def env_steps(self) -> None:
        """``env.step``, ``horizon`` times: observations, rewards and resets included."""
        for action in self._actions:
            self.env.step(action)

    def physics_seconds(self, before: dict[str, Any], actions: Sequence[torch.Tensor]) -> float:
        """Seconds that the physics alone takes of the steps that lead on from a state of the environment."""
        env = self.env
        env.load_state_dict(before)
        states = []
        for action in actions:  # the same steps again, to see what the physics is given in each
            states.append(env.simulation.state_dict())
            env.step(action)
        step = self._raw_step
        self._raw.load_state_dict(states[0])  # what the worlds' models differ in is known before a recording
        if self._raw.device.type == "cuda":
            self._recorded = self._recorded or Recorded(step, self._raw.device, owner=self._raw)
            step = self._recorded.replay
        marks = []
        for state, action in zip(states, actions, strict=True):
            self._raw.load_state_dict(state)
            self._raw.ctrl.copy_(env.action_offset + env.action_scale * action)
            start = mark(self._raw.device)
            step()
            marks.append((start, mark(self._raw.device)))
        _synchronize()
        return sum(seconds_between(*pair) for pair in marks)

    def _raw_step(self) -> None:
        if self._raw.device.type == "cpu":
            self._raw.step(self.env.config.frame_skip)
            return
        for _ in range(self.env.config.frame_skip):
            self._raw.step()  # sensors every time: MuJoCo Warp's own step, nothing left out

    def turn(self) -> dict[str, float]:
        """Seconds of each layer, ``horizon`` steps each, one after the other."""

        def clock(function: Callable[[], object]) -> float:
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            return time.perf_counter() - start

        before = self.env.state_dict()
        seconds = {"env": clock(self.env_steps)}
        seconds["physics"] = self.physics_seconds(before, self._actions)
        before = self.env.state_dict()
        seconds["rollout"] = clock(self._agent.collect_rollouts)
        rollout = self._agent._rollout
        actions = list(self._agent.actor.bound(rollout.actions))
        seconds["physics of the rollout"] = self.physics_seconds(before, actions)
        seconds["update"] = clock(lambda: self._agent.update(rollout))
        seconds["iteration"] = clock(lambda: self._agent.train(1))
        return seconds

    def measure(self, seconds: float) -> dict[str, float]:
        """Control steps per second of each layer (medians), and ratios taken turn by turn."""
        self._agent.train(1)  # the first one only sets the normalizers
        self.turn()  # compiles and records
        turns: list[dict[str, float]] = []
        start = time.perf_counter()
        while len(turns) < 3 or time.perf_counter() - start < seconds:
            turns.append(self.turn())
        samples = self.horizon * self.env.num_envs
        median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}

        def ratio(slow: str, fast: str) -> float:
            return statistics.median(turn[fast] / turn[slow] for turn in turns)

        return {
            "worlds": self.env.num_envs,
            "build_seconds": self.build_seconds,
            "first_step_seconds": self.first_step_seconds,
            "kB_per_world": self.bytes_per_world / 1e3,
            **{name: samples / median[name] for name in ("physics", "env", "rollout", "iteration")},
            "env / physics": ratio("env", "physics"),
            "rollout / physics": ratio("rollout", "physics of the rollout"),
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
