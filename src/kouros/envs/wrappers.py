"""Observation wrappers: what is made of the policy's observation on its way, stacked as one likes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorWrapper
from gymnasium.vector.utils import batch_space

from kouros.checks import require_state
from kouros.envs.config import HumanoidEnvConfig, parse_wrapper
from kouros.envs.humanoid import HumanoidBaseEnv, make_box
from kouros.normalizer import Normalizer
from kouros.physics.kinematics import SitePositions, read_chains

Mirror = tuple[torch.Tensor, torch.Tensor]


class ObservationWrapper(VectorWrapper):
    """Changes what the policy sees of a humanoid environment, wrapped or not.

    A subclass of your own writes :meth:`observation`, a function of the wrapped environment's observation
    alone. It is applied to what ``reset``, ``step`` and ``observe`` return and to ``info["final_obs"]``;
    the critic's observation stays as it is. What is not defined here is the wrapped environment's:
    ``env.command`` works through any stack.

    Attributes:
      config: the wrapped environment's, with this wrapper's entry at the end of ``wrappers``.
      mirror: the wrapped environment's, with the wrapped observation's reflection.

    Args:
      env: the environment to wrap.
      size: length of the new observation; as the wrapped one's if None.
      mirror: the new observation's reflection, ``(index, sign)``; the wrapped one's if None and the length is
        the same. Else there is none, and networks will not be symmetric.

    Raises:
      TypeError: ``env`` is not a humanoid environment.
      ValueError: the stack has such a wrapper already.
    """

    env: Env
    config: HumanoidEnvConfig
    mirror: dict[str, Mirror]
    entry = ""

    def __init__(self, env: Env, size: int | None = None, mirror: Mirror | None = None) -> None:
        before = _size(env)
        super().__init__(env)
        # A subclass may do anything: it goes by its own name, which no file knows.
        known = type(self) in (KinematicObservation, HistoryObservation, NormalizeObservation)
        entry = self.entry if known else type(self).__name__
        there = [other.partition(":")[0] for other in env.config.wrappers]
        if entry.partition(":")[0] in there:
            raise ValueError(f"{type(self).__name__}: the stack {env.config.wrappers} has it already")
        self.config = copy.copy(env.config)
        self.config.wrappers = (*env.config.wrappers, entry)
        self.single_observation_space = make_box(np.inf, size or before)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        if mirror or size in (None, before):
            self.mirror = {**env.mirror, "obs": mirror or env.mirror["obs"]} if env.mirror else {}
        else:
            self.mirror = {}

    def __getattr__(self, name: str) -> Any:
        if name == "env" or name.startswith("__"):  # while a copy is being made there is none
            raise AttributeError(name)
        return getattr(self.env, name)

    def observation(self, obs: torch.Tensor) -> torch.Tensor:
        """The new observation ``(num_envs, size)`` for the wrapped environment's, without any memory.

        Part of a recorded step: docs/gpu.md says what that asks of it.
        """
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """As the environment's."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self.observation(obs), info

    def step(
        self, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """As the environment's."""
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        info["final_obs"] = self.observation(info["final_obs"])
        return self.observation(obs), rewards, terminated, truncated, info

    def observe(self) -> torch.Tensor:
        """The observation of the present state, ``(num_envs, size)``."""
        return self.observation(self.env.observe())

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What one step leaves for the next besides what the wrapped environment does."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on: the wrapped environment's state under ``env``, and one's own."""
        own = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return {"env": self.env.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, bit for bit.

        Raises:
          ValueError: the state is of another stack, another number of worlds or another model.
        """
        own = self._tensors()
        require_state(type(self).__name__, state, own)
        self.env.load_state_dict(state["env"])
        for name, tensor in own.items():
            tensor.copy_(state[name])


Env = HumanoidBaseEnv | ObservationWrapper


class KinematicObservation(ObservationWrapper):
    """Appends the places of both hands, and the base's velocity where asked.

    The hands are the robot's sites ``robot.hands`` in the base frame, m, left then right: forward kinematics
    of the joint positions; the policy's of those that it knows (bias, noise and delay of the encoders
    included), as on a robot, and the critic's of the true ones. The velocity is the base's, base frame, m/s;
    no robot measures it, so that a policy that sees it cannot be exported. Both go to the policy and to the
    critic.

    Args:
      env: the environment to wrap.
      include_fk: append the hands' places.
      include_velocity: append the base's velocity.

    Raises:
      ValueError: nothing is asked for.
    """

    def __init__(self, env: Env, include_fk: bool = True, include_velocity: bool = False) -> None:
        if not (include_fk or include_velocity):
            raise ValueError("include_fk=False, include_velocity=False: nothing is left to observe")
        before = _size(env)
        self._fk, self._velocity = include_fk, include_velocity
        suffix = (":velocity" if include_fk else ":only-velocity") if include_velocity else ""
        self.entry = f"kinematic{suffix}"
        reflections = include_fk * [_HANDS] + include_velocity * [_VECTOR]
        mirror = {}
        if env.mirror:
            mirror = {name: _joined(env.mirror[name], *reflections) for name in ("obs", "critic_obs")}
        self._added = sum(len(sign) for _, sign in reflections)
        super().__init__(env, before + self._added, mirror.get("obs"))
        self.mirror |= mirror
        self.critic_observation_space = make_box(np.inf, env.critic_observation_space.shape[0] + self._added)
        robot = env.robot
        #: Both hands' chains of joints, see :func:`kouros.physics.kinematics.read_chains`.
        self.chains = read_chains(env.simulation.model, robot.base_body, robot.hands)
        self._hands = SitePositions(self.chains, robot.joint_names).to(env.device)

    def _both(self, when: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """What is appended for the policy and for the critic: of now, or of the state before any reset."""
        true, known, velocity = (
            getattr(self.env, f"{when}{name}")
            for name in ("joint_pos", "measured_joint_pos", "base_lin_vel_b")
        )
        critic = self._seen(true, velocity)
        return (critic if known is true else self._seen(known, velocity)), critic

    def _seen(self, joint_pos: torch.Tensor, base_lin_vel_b: torch.Tensor) -> torch.Tensor:
        parts = [self._hands(joint_pos).flatten(1)] if self._fk else []
        return torch.cat(parts + [base_lin_vel_b] * self._velocity, dim=-1)

    def _append(self, obs: torch.Tensor, info: dict[str, Any]) -> torch.Tensor:
        seen, true = self._both()
        info["critic_obs"] = torch.cat((info["critic_obs"], true), dim=-1)
        return torch.cat((obs, seen), dim=-1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._append(obs, info), info

    def step(
        self, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        obs = self._append(obs, info)
        done = (terminated | truncated).unsqueeze(-1)
        finals = [x[:, -self._added :] for x in (obs, info["critic_obs"])]
        if self.simulation.may_have(done):
            finals = [torch.where(done, *pair) for pair in zip(self._both("final_"), finals, strict=True)]
        for name, final in zip(("final_obs", "final_critic_obs"), finals, strict=True):
            info[name] = torch.cat((info[name], final), dim=-1)
        return obs, rewards, terminated, truncated, info

    def observe(self) -> torch.Tensor:
        obs = self.env.observe()
        return torch.cat((obs, self._both()[0]), dim=-1)


class HistoryObservation(ObservationWrapper):
    """The last observations one after the other, oldest first, each world's own.

    An episode begins with a history full of its first observation. ``observe`` puts the observation of
    the present state in the newest place (in all places of an episode that has just begun).

    Args:
      env: the environment to wrap.
      history_length: number of observations, at least 1.

    Raises:
      ValueError: ``history_length`` is not a whole number of at least 1.
    """

    def __init__(self, env: Env, history_length: int) -> None:
        length = history_length
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"history_length={length!r}: must be a whole number, at least 1")
        size = _size(env)
        self.entry = f"history:{length}"
        mirror = _joined(*[env.mirror["obs"]] * length) if env.mirror else None
        super().__init__(env, length * size, mirror)
        self.history_length = length
        self._frames = torch.zeros(env.num_envs, length, size, device=env.device)
        self._begun = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
        self.observe()

    def _full(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.unsqueeze(1).expand_as(self._frames)

    def _keep(self, frames: torch.Tensor) -> torch.Tensor:
        self._frames.copy_(frames)
        return frames.flatten(1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        mask = _reset_mask(options, obs)
        self._begun.masked_fill_(mask, False)
        return self._keep(torch.where(mask[:, None, None], self._full(obs), self._frames)), info

    def step(
        self, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        done = terminated | truncated
        before = self._frames[:, 1:]
        info["final_obs"] = torch.cat((before.flatten(1), info["final_obs"]), dim=-1)
        frames = torch.cat((before, obs.unsqueeze(1)), dim=1)
        torch.logical_not(done, out=self._begun)
        shown = self._keep(torch.where(done[:, None, None], self._full(obs), frames))
        return shown, rewards, terminated, truncated, info

    def observe(self) -> torch.Tensor:
        obs = self.env.observe()
        frames = torch.cat((self._frames[:, :-1], obs.unsqueeze(1)), dim=1)
        return self._keep(torch.where(self._begun[:, None, None], frames, self._full(obs)))

    def forget(self) -> None:
        """Begin every history anew, with the next observation."""
        self._begun.zero_()

    @property
    def memory(self) -> torch.Tensor:
        """What the policy file carries of it: all observations but the newest, and 1 for a history that has
        begun; zeros for one that has not."""
        begun = self._begun.float().unsqueeze(-1)
        return torch.cat((self._frames[:, :-1].flatten(1) * begun, begun), dim=-1)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"frames": self._frames, "begun": self._begun}


class NormalizeObservation(ObservationWrapper):
    """Shifts and scales the observation by running statistics, and clips it to +-10.

    The statistics are those of all observations that ``reset`` and ``step`` returned (``final_obs`` and
    ``observe`` count nothing), merged by batches (Chan, Golub & LeVeque 1979) in float64. What is subtracted
    and divided by are the mean and deviation of these observations *and their mirror images*, so that
    mirror-symmetric networks stay symmetric; where the environment has no ``mirror``, of the observations
    alone.

    Attributes:
      mean, variance: ``(size,)`` float64, of all observations seen.
      count: how many those were, a float64 scalar.

    Args:
      env: the environment to wrap.
      statistics: what :attr:`statistics` was: go by these, frozen. None: begin with none.

    Raises:
      ValueError: the statistics are of another length.
    """

    entry = "normalize"

    def __init__(self, env: Env, statistics: dict[str, list[float]] | None = None) -> None:
        super().__init__(env)
        size = _size(self)
        self._seen = Normalizer(size).double().to(env.device)
        self.mean, self.variance, self.count = self._seen.buffers()
        self._applied = Normalizer(size).to(env.device)
        self._frozen = torch.zeros((), dtype=torch.bool, device=env.device)
        self._reflection = tuple(part.to(env.device) for part in self.mirror.get("obs", ()))
        if statistics is not None:
            for name in ("mean", "variance"):
                found = torch.tensor(statistics[name], dtype=torch.float64)
                if found.shape != (size,):
                    raise ValueError(f"statistics: {name} of {len(found)} values, the observation has {size}")
                getattr(self, name).copy_(found)
            self.count.fill_(1.0)
            self._apply()
            self.freeze()

    @property
    def frozen(self) -> bool:
        """Whether the statistics stay as they are."""
        return bool(self._frozen)

    def freeze(self, frozen: bool = True) -> None:
        """Keep the statistics as they are from now on, or no longer."""
        self._frozen.fill_(frozen)

    @property
    def statistics(self) -> dict[str, list[float]]:
        """The ``mean`` and ``variance`` that observations are normalized with, as plain data."""
        return {"mean": self._applied.mean.tolist(), "variance": self._applied.variance.tolist()}

    def _apply(self) -> None:
        mean, variance = self.mean, self.variance
        if self._reflection:
            index, sign = self._reflection
            image = sign * mean[index]
            variance = 0.5 * (variance + variance[index]) + (0.5 * (mean - image)).square()
            mean = 0.5 * (mean + image)
        self._applied.mean.copy_(mean)
        self._applied.variance.copy_(variance)

    def _count(self, obs: torch.Tensor) -> None:
        before = [tensor.clone() for tensor in self._seen.buffers()]
        self._seen.update(obs.double())
        for tensor, old in zip(self._seen.buffers(), before, strict=True):
            tensor.copy_(torch.where(self._frozen, old, tensor))
        self._apply()

    def observation(self, obs: torch.Tensor) -> torch.Tensor:
        return self._applied(obs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        begun = obs[_reset_mask(options, obs)]  # the others' have been counted
        if len(begun):
            self._count(begun)
        return self.observation(obs), info

    def step(
        self, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        self._count(obs)
        info["final_obs"] = self.observation(info["final_obs"])
        return self.observation(obs), rewards, terminated, truncated, info

    def _tensors(self) -> dict[str, torch.Tensor]:
        seen = {"mean": self.mean, "variance": self.variance, "count": self.count, "frozen": self._frozen}
        return {**seen, **{f"applied_{k}": v for k, v in self._applied.named_buffers()}}


def make_env(
    config: HumanoidEnvConfig | None = None,
    device: str | torch.device = "cpu",
    statistics: dict[str, list[float]] | None = None,
) -> Env:
    """The environment of a configuration, in the wrappers that it names.

    Args:
      config: the task's figures; the task ``walk`` if None.
      device: where the worlds live.
      statistics: for ``normalize``, as a policy's contract has them; frozen. None: begin with none.

    Raises:
      ValueError: see :class:`HumanoidBaseEnv`.
    """
    config = copy.copy(config or HumanoidEnvConfig())
    entries, config.wrappers = config.wrappers, ()
    env: Env = HumanoidBaseEnv(config, device)
    for entry in entries:
        name, argument = parse_wrapper(entry)
        if name == "kinematic":
            env = KinematicObservation(env, argument != "only-velocity", "velocity" in argument)
        elif name == "history":
            env = HistoryObservation(env, int(argument))
        else:
            env = NormalizeObservation(env, statistics)
    return env


def make_policy_env(config: HumanoidEnvConfig, statistics: dict[str, list[float]] | None) -> Env:
    """:func:`make_env` for a trained policy: what it was trained to see does not move any more.

    Raises:
      ValueError: the configuration normalizes, and there are no statistics.
    """
    if "normalize" in config.wrappers and statistics is None:
        raise ValueError(
            "statistics=None: this policy sees normalized observations; hand over contract['statistics']"
        )
    return make_env(config, statistics=statistics)


# Reflections of both hands' places, left then right, and of a vector.
_HANDS = torch.tensor([3, 4, 5, 0, 1, 2]), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
_VECTOR = torch.tensor([0, 1, 2]), torch.tensor([1.0, -1.0, 1.0])


def _size(env: Env) -> int:
    if not isinstance(env, Env):
        raise TypeError(f"env: {env}: only a HumanoidBaseEnv can be wrapped, bare or in other wrappers")
    shape = env.single_observation_space.shape
    assert shape
    return shape[0]


def _joined(*parts: Mirror) -> Mirror:
    """The reflection of vectors one after the other."""
    starts = np.cumsum([0, *(len(sign) for _, sign in parts)])
    index = torch.cat([index + int(start) for (index, _), start in zip(parts, starts, strict=False)])
    return index, torch.cat([sign for _, sign in parts])


def _reset_mask(options: dict[str, Any] | None, obs: torch.Tensor) -> torch.Tensor:
    everywhere = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
    return torch.as_tensor((options or {}).get("reset_mask", everywhere), device=obs.device)
