"""The curriculum: stages of difficulty, and a way up and down them that only success opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kouros.checks import require, require_numbers
from kouros.envs.config import CURRICULUM_FIELDS, CurriculumConfig

# From the numbers of this process to those of each that trains with it.
Everywhere = Callable[[list[float]], list[list[float]]]
# Of the way that its commands asked for, a robot that follows them makes at least this share. A robot
# that stands still keeps its velocity error small where commands are slow.
FOLLOWED = 0.5
# In an error message: what each figure of a stage is about.
DRIVEN = {
    "terrain_difficulty": "the terrain",
    "command_speed": "the commands",
    "push_frequency": "pushes",
    "mass_variance": "random masses",
    "friction_variance": "random friction",
}


@dataclasses.dataclass(frozen=True)
class CurriculumStage:
    """One stage; every figure in [0, 1], see :class:`kouros.envs.config.CurriculumConfig`."""

    name: str
    terrain_difficulty: float = 0.0
    command_speed: float = 1.0
    push_frequency: float = 0.0
    mass_variance: float = 0.0
    friction_variance: float = 0.0

    def __post_init__(self) -> None:
        require_numbers(self)
        for field in CURRICULUM_FIELDS:
            require(self, field, 0 <= getattr(self, field) <= 1, "must lie in [0, 1]")

    def params(self) -> dict[str, float]:
        return {field: getattr(self, field) for field in CURRICULUM_FIELDS}


def make_stages(config: CurriculumConfig) -> tuple[CurriculumStage, ...]:
    """The stages that a configuration lists field by field."""
    columns = [getattr(config, field) for field in CURRICULUM_FIELDS]
    return tuple(CurriculumStage(*row) for row in zip(config.names, *columns, strict=True))


class CurriculumManager:
    """Which stage a training is at. It knows of nothing but counts of episodes.

    Stages need not become harder in every figure: slower commands where the ground becomes rough are
    a good stage. But each must differ from the one before.

    Attributes:
      stages: what there is to go through.
      stage: index of the present one.
      success_rate: of the last judgement, 0 before the first.
      history: a dict for each move: ``from``, ``to`` (names), ``episodes`` and ``success_rate``.

    Args:
      stages: two or more; the five of :class:`kouros.envs.config.CurriculumConfig` if None.
      advance_at: success rate, 0 to 1, from which on the next stage begins.
      retreat_below: success rate below which the stage before comes back.
      min_episodes: how many episodes are judged together, at least.

    Raises:
      ValueError: fewer than two stages, two alike in a row, or thresholds that do not fit.
    """

    def __init__(
        self,
        stages: Sequence[CurriculumStage] | None = None,
        advance_at: float = 0.8,
        retreat_below: float = 0.2,
        min_episodes: int = 100,
    ) -> None:
        # The same checks, and messages, as of the configuration.
        CurriculumConfig(advance_at=advance_at, retreat_below=retreat_below, min_episodes=min_episodes)
        self.stages = tuple(make_stages(CurriculumConfig()) if stages is None else stages)
        if len(self.stages) < 2:
            raise ValueError(f"stages: {len(self.stages)} of them lead nowhere; list at least two")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.params() == after.params():
                raise ValueError(f"stages: {after.name!r} changes nothing after {before.name!r}; drop it")
        self.advance_at, self.retreat_below, self.min_episodes = advance_at, retreat_below, min_episodes
        self.restart()

    def restart(self) -> None:
        """Back to the first stage, with nothing counted."""
        self.stage, self.success_rate = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self._successes = self._episodes = 0

    def update(self, successes: int, episodes: int) -> bool:
        """Count ended episodes; judge them once there are ``min_episodes``, and then count anew.

        Args:
          successes: how many of them succeeded.
          episodes: how many have ended since the last call.

        Returns:
          Whether the stage has changed: by one, up or down.

        Raises:
          ValueError: more successes than episodes, or less than none.
        """
        if not 0 <= successes <= episodes:
            raise ValueError(f"successes={successes} of episodes={episodes}: must be between 0 and all")
        self._successes += successes
        self._episodes += episodes
        if self._episodes < self.min_episodes:
            return False
        episodes, self.success_rate = self._episodes, self._successes / self._episodes
        self._successes = self._episodes = 0
        way = (self.success_rate >= self.advance_at) - (self.success_rate < self.retreat_below)
        before, self.stage = self.stage, min(max(self.stage + way, 0), len(self.stages) - 1)
        if self.stage == before:
            return False
        names = {"from": self.stages[before].name, "to": self.stages[self.stage].name}
        self.history.append({**names, "episodes": episodes, "success_rate": self.success_rate})
        return True

    def get_current_params(self) -> dict[str, float]:
        """The present stage's figures by name, each in [0, 1]."""
        return self.stages[self.stage].params()

    def get_progress(self) -> float:
        """0 at the first stage, 1 at the last."""
        return self.stage / (len(self.stages) - 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "stage": self.stage,
            "success_rate": self.success_rate,
            "history": [dict(move) for move in self.history],
            "successes": self._successes,
            "episodes": self._episodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
          ValueError: the state is of a curriculum with more stages.
        """
        if not state["stage"] < len(self.stages):
            raise ValueError(f"stage={state['stage']}: of another curriculum; {len(self.stages)} here")
        self.stage, self.success_rate = state["stage"], state["success_rate"]
        self.history = [dict(move) for move in state["history"]]
        self._successes, self._episodes = state["successes"], state["episodes"]


class RunningCurriculum:
    """A :class:`CurriculumManager` in a running environment, fed with the episodes that succeed there.

    An episode succeeds when it ends by time-out, its mean velocity error is below ``success_error``, it
    has made at least :data:`FOLLOWED` of the way that its commands asked for, and no harness helps any more.
    Worlds are counted in rounds, once each: when every world has ended an episode that began in this round,
    the latest of each goes to the manager and a new round begins. So short episodes, which are falls, weigh
    no more than long ones, and none is from another stage. They are counted on the device, in tensors
    that stay where they are.

    Attributes:
      manager: which stage it is.

    Args:
      config: the stages, and what they ask.
      num_envs: number of worlds.
      device: of the worlds.
      targets: what brings each figure of a stage into force, in place, as a recorded step needs it; what
        the environment has switched off is missing.

    Raises:
      ValueError: a stage asks for something that is switched off, or changes nothing.
    """

    def __init__(
        self,
        config: CurriculumConfig,
        num_envs: int,
        device: torch.device,
        targets: Mapping[str, Callable[[float], object]],
    ) -> None:
        for field in CURRICULUM_FIELDS:
            values = getattr(config, field)
            if field not in targets and any(values):
                raise ValueError(
                    f"curriculum.{field}={values!r}: drives {DRIVEN[field]}, which this environment has "
                    "switched off; switch it on, or make every entry 0"
                )
        self.config, self._targets = config, targets
        self.manager = CurriculumManager(
            make_stages(config), config.advance_at, config.retreat_below, config.min_episodes
        )
        self._error = torch.zeros(num_envs, device=device)
        self._way = torch.zeros_like(self._error)
        # Episodes of each world that have ended in this round; below 0 while one from before is under way.
        self._ended = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._succeeded = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._apply()

    def _apply(self) -> None:
        for field, value in self.manager.get_current_params().items():
            if field in self._targets:
                self._targets[field](value)

    def restart(self) -> None:
        """Back to the first stage; the episodes under way count for nothing."""
        self.manager.restart()
        self._ended.fill_(-1)
        self._apply()

    def count(
        self,
        velocity: torch.Tensor,
        command: torch.Tensor,
        length: torch.Tensor,
        done: torch.Tensor,
        good: torch.Tensor,
    ) -> None:
        """Take in a step of every world.

        Args:
          velocity, command: ``(num_envs, 3)`` vx, vy (m/s) and yaw rate (rad/s), base frame.
          length: ``(num_envs,)``, steps of the episode.
          done: ``(num_envs,)`` bool, the episode ends.
          good: ``(num_envs,)`` bool, by time-out and without a harness.
        """
        self._error += (velocity - command)[:, :2].norm(dim=-1)
        self._way += ((velocity - FOLLOWED * command) * command).sum(-1)
        success = good & (self._error < self.config.success_error * length) & (self._way >= 0.0)
        counts = done & (self._ended >= 0)
        self._succeeded.copy_(torch.where(counts, success, self._succeeded))
        self._ended += counts

    def begin(self, mask: torch.Tensor) -> None:
        """Begin new episodes in the worlds of the mask; one that did not end counts for nothing."""
        self._error.masked_fill_(mask, 0.0)
        self._way.masked_fill_(mask, 0.0)
        self._ended.masked_fill_(mask & (self._ended < 0), 0)

    def advance(self, everywhere: Everywhere = lambda counts: [counts]) -> dict[str, float]:
        """End the round, if every world has ended an episode, and bring what comes of it into force.

        Waits for the device: not for within a step.

        Args:
          everywhere: of several processes that train together, from the numbers of this one to those of each.

        Returns:
          For the log: ``curriculum/stage`` (index), ``curriculum/progress`` (0 to 1) and
          ``curriculum/success``, the success rate of the last judgement.
        """
        counts = torch.stack((self._ended.min(), self._succeeded.sum())).tolist()
        fewest, successes = zip(*everywhere(counts), strict=True)
        if min(fewest) > 0:
            self._ended.fill_(-1)
            if self.manager.update(sum(successes), len(successes) * len(self._ended)):
                self._apply()
        return {
            "curriculum/stage": float(self.manager.stage),
            "curriculum/progress": self.manager.get_progress(),
            "curriculum/success": self.manager.success_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"manager": self.manager.state_dict(), **{k: getattr(self, k).clone() for k in _COUNTS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, its stage in force."""
        self.manager.load_state_dict(state["manager"])
        for name in _COUNTS:
            getattr(self, name).copy_(state[name])
        self._apply()


_COUNTS = ("_error", "_way", "_ended", "_succeeded")
