"""Proximal Policy Optimization for any Gymnasium ``VectorEnv``, of NumPy arrays or of tensors."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn

from kouros.learning import checkpoint
from kouros.learning.config import PPOConfig
from kouros.learning.networks import (
    ActorNetwork,
    CriticNetwork,
    Mirror,
    entropy,
    log_prob,
    project,
    reflection,
)
from kouros.threads import torch_threads


@dataclasses.dataclass
class Rollout:
    """``horizon`` steps of every world. Shapes ``(horizon, num_envs, ...)``.

    ``next_critic_obs`` is what followed each step within its own episode (never the first
    observation of the next one). ``valid`` is false for the steps in which an environment with
    next-step autoreset ignores the action: they teach nothing.
    """

    obs: torch.Tensor
    critic_obs: torch.Tensor
    next_critic_obs: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    done: torch.Tensor
    valid: torch.Tensor


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    done: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Generalized advantage estimates (Schulman et al. 2015, arXiv 1506.02438, equation 16).

    ``A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}`` with
    ``delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)``: a time-out bootstraps from the
    value of its own last state, a fall does not.

    Args:
      rewards, values, next_values: ``(horizon, num_envs)`` float.
      terminated: episode ended in a terminal state, ``(horizon, num_envs)`` bool.
      done: episode ended, terminal or not.
      gamma: discount.
      gae_lambda: weight of longer returns.

    Returns:
      Advantages, ``(horizon, num_envs)``; returns are ``advantages + values``.
    """
    deltas = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    carry = gamma * gae_lambda * (~done).to(deltas.dtype)
    advantages = torch.empty_like(deltas)
    advantage = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + carry[t] * advantage
        advantages[t] = advantage
    return advantages


class PPOAgent:
    """Learns a policy by PPO with clipped objective, clipped values and GAE.

    Actions are stored as drawn from the Gaussian, with their log-probabilities; clipping to the
    action space (or tanh, with ``config.squash``) happens on the way to the environment.

    Where the environment offers more, it is used: ``info["critic_obs"]`` (with
    ``critic_observation_space``) for an asymmetric critic, ``mirror`` for symmetric networks,
    ``info["metrics"]`` ``(len(metric_names), num_envs)`` for the log, ``state_dict`` for exact resume.

    Attributes:
      actor, critic: the networks.
      iteration, total_steps: updates and control steps so far.
      samples: control steps in one rollout.

    Args:
      env: a vector environment with Box observations and actions.
      config: the learner's figures.
      seed: of the first weights, of exploration, of minibatches and of the environment.
      device: where the networks live; the environment's device if None.

    Raises:
      TypeError: observations or actions are not a one-dimensional Box.
      ValueError: the samples of a rollout do not split into the minibatches, or the environment does
        not reset itself.
    """

    def __init__(
        self,
        env: VectorEnv,
        config: PPOConfig | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        self.env, self.seed, self.config = env, seed, config or PPOConfig()
        self.device = torch.device(device or getattr(env, "device", None) or "cpu")
        config = self.config
        obs_dim = _box_size("observation", env.single_observation_space)
        action_dim = _box_size("action", env.single_action_space)
        critic_space = getattr(env, "critic_observation_space", env.single_observation_space)
        self.samples = samples = config.horizon * env.num_envs
        if samples % config.minibatches or samples < 2 * config.minibatches:
            raise ValueError(
                f"minibatches={config.minibatches}: must divide horizon x num_envs = "
                f"{config.horizon} x {env.num_envs} = {samples} into parts of at least two"
            )
        space: Any = env.single_action_space
        if config.squash and not np.isfinite([space.low, space.high]).all():
            raise ValueError("squash=True: the action space has no bounds; use squash=False")
        mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        if mode == AutoresetMode.DISABLED:
            raise ValueError("autoreset_mode=DISABLED: PPOAgent needs an environment that resets itself")
        self._next_step_reset = mode == AutoresetMode.NEXT_STEP

        self._generator = torch.Generator(self.device)
        self._generator.manual_seed(seed)
        shared = (config.activation, config.layer_norm)
        critic_dim = _box_size("critic observation", critic_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = ActorNetwork(
                obs_dim, action_dim, config.actor_hidden, *shared, config.initial_std, config.squash
            )
            self.critic = CriticNetwork(critic_dim, config.critic_hidden, *shared)
        self.actor.low.copy_(torch.as_tensor(space.low))
        self.actor.high.copy_(torch.as_tensor(space.high))
        self._mirror = getattr(env, "mirror", None) if config.symmetric else None
        actor_mirror = critic_mirror = None
        if self._mirror:
            unchanged = (torch.zeros(1, dtype=torch.int64), torch.ones(1))
            actor_mirror = reflection(self.actor, self._mirror["obs"], self._mirror["action"])
            critic_mirror = reflection(self.critic, self._mirror["critic_obs"], unchanged)
        self._actor_learner = _Learner(self.actor.to(self.device), config, actor_mirror)
        self._critic_learner = _Learner(self.critic.to(self.device), config, critic_mirror)
        self._second_thread = ThreadPoolExecutor(1)
        self.iteration = 0
        self.total_steps = 0
        self._seconds = {"env": 0.0, "policy": 0.0}
        self._now: dict[str, torch.Tensor] | None = None
        self._episodes: dict[str, float] = {}

    @torch.no_grad()
    def act(self, obs: torch.Tensor, deterministic: bool = True) -> torch.Tensor:
        """Actions as the environment takes them, ``(num_envs, action_dim)``."""
        action = self.actor(obs)
        if not deterministic:
            action = action + self.actor.log_std.exp() * self._noise(action.shape)
        return self.actor.bound(action)

    def _noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def _tensor(self, value: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype, device=self.device)

    def _env_step(self, action: torch.Tensor):
        if hasattr(self.env, "device"):
            return self.env.step(action)
        return self.env.step(action.cpu().numpy())  # an environment of NumPy arrays

    def _start(self) -> dict[str, torch.Tensor]:
        """What goes on from rollout to rollout: the last observations and the episodes under way."""
        obs, info = self.env.reset(seed=self.seed)
        n = self.env.num_envs
        return {
            "obs": self._tensor(obs),
            "critic_obs": self._tensor(info.get("critic_obs", obs)),
            "resetting": torch.zeros(n, dtype=torch.bool, device=self.device),
            "return": torch.zeros(n, device=self.device),
            "length": torch.zeros(n, device=self.device),
        }

    @torch.no_grad()
    def collect_rollouts(self) -> tuple[Rollout, dict[str, float]]:
        """Run the policy for ``horizon`` steps; also what happened, for the log."""
        now = self._now = self._now or self._start()
        steps: list[dict[str, torch.Tensor]] = []
        metrics, ends = [], []
        for _ in range(self.config.horizon):
            start = time.perf_counter()
            mean, log_std = self.actor(now["obs"]), self.actor.log_std
            actions = mean + log_std.exp() * self._noise(mean.shape)
            log_probs = log_prob(actions, mean, log_std)
            middle = time.perf_counter()
            obs, reward, terminated, truncated, info = self._env_step(self.actor.bound(actions))
            self._seconds["policy"] += middle - start
            self._seconds["env"] += time.perf_counter() - middle

            rewards, terminated = self._tensor(reward), self._tensor(terminated, torch.bool)
            done = terminated | self._tensor(truncated, torch.bool)
            critic_obs = self._tensor(info.get("critic_obs", obs))
            steps.append(
                {
                    "obs": now["obs"],
                    "critic_obs": now["critic_obs"],
                    "next_critic_obs": self._final_obs(info, critic_obs),
                    "actions": actions,
                    "log_probs": log_probs,
                    "rewards": rewards,
                    "terminated": terminated,
                    "done": done,
                    "valid": ~now["resetting"],
                }
            )
            now["return"] += rewards
            now["length"] += ~now["resetting"]
            ends.append(torch.stack((done.float(), now["return"] * done, now["length"] * done)).sum(1))
            now["return"].masked_fill_(done, 0.0)
            now["length"].masked_fill_(done, 0.0)
            if self._next_step_reset:
                now["resetting"] = done
            now["obs"], now["critic_obs"] = self._tensor(obs), critic_obs
            if "metrics" in info:
                metrics.append(info["metrics"])
        rollout = Rollout(**{key: torch.stack([s[key] for s in steps]) for key in steps[0]})
        self.total_steps += rollout.rewards.numel()
        log = {"reward/mean": float(rollout.rewards.mean())}
        if metrics:
            means = torch.stack(metrics).mean((0, 2)).tolist()
            log |= dict(zip(getattr(self.env, "metric_names"), means, strict=True))  # noqa: B009
        count, total, length = torch.stack(ends).sum(0).tolist()
        if count:
            self._episodes = {"episode/return": total / count, "episode/length": length / count}
        return rollout, log | self._episodes

    def _final_obs(self, info: dict[str, Any], critic_obs: torch.Tensor) -> torch.Tensor:
        """What followed the step within its own episode: not the next episode's first observation."""
        final = info.get("final_critic_obs", info.get("final_obs"))
        if self._next_step_reset or final is None:
            return critic_obs
        if isinstance(final, torch.Tensor) or (isinstance(final, np.ndarray) and final.dtype != object):
            return self._tensor(final)
        rows = np.flatnonzero(info["_final_obs"])  # Gymnasium: an object array with gaps
        merged = critic_obs.clone()
        for row in rows:
            merged[row] = self._tensor(final[row])
        return merged

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One PPO update; returns the learning diagnostics, means over all gradient steps."""
        config = self.config
        with torch.no_grad():
            values = self.critic(rollout.critic_obs)
            next_values = self.critic(rollout.next_critic_obs)
        advantages = compute_gae(
            rollout.rewards,
            values,
            next_values,
            rollout.terminated,
            rollout.done,
            config.gamma,
            config.gae_lambda,
        )
        batch = {
            "obs": rollout.obs,
            "critic_obs": rollout.critic_obs,
            "actions": rollout.actions,
            "log_probs": rollout.log_probs,
            "advantages": advantages,
            "values": values,
            "returns": advantages + values,
        }
        batch = {key: x.flatten(0, 1) for key, x in batch.items()}
        if self._next_step_reset:
            batch = {key: x[rollout.valid.flatten()] for key, x in batch.items()}
        minibatches = [
            rows
            for _ in range(config.epochs)
            for rows in self._shuffle(len(batch["obs"])).chunk(config.minibatches)
        ]
        # Half the threads for each network: layers this small gain little from more than one.
        with torch_threads(max(1, torch.get_num_threads() // 2)):
            critic = self._second_thread.submit(self._update_critic, batch, minibatches)
            log = self._update_actor(batch, minibatches)
            log |= critic.result()
        log["learning/skipped_updates"] = self._actor_learner.skipped + self._critic_learner.skipped
        for learner in (self._actor_learner, self._critic_learner):
            learner.symmetrize()
        residual = (batch["returns"] - batch["values"]).var() / batch["returns"].var().clamp(min=1e-8)
        log["learning/explained_variance"] = 1.0 - float(residual)
        if config.normalize_observations:
            # After the update: the ratio needs the normalizer that the actions were drawn with.
            self._update_normalizers(rollout)
        return log

    def _update_actor(
        self, batch: dict[str, torch.Tensor], minibatches: list[torch.Tensor]
    ) -> dict[str, float]:
        config, learner = self.config, self._actor_learner
        logs = []
        for rows in minibatches:
            advantages = batch["advantages"][rows]
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            log_std = self.actor.log_std
            mean = self.actor(batch["obs"][rows])
            log_ratio = log_prob(batch["actions"][rows], mean, log_std) - batch["log_probs"][rows]
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1.0 - config.clip, 1.0 + config.clip)
            policy_loss = -torch.min(advantages * ratio, advantages * clipped).mean()
            spread = entropy(log_std)
            norm = learner.descend(policy_loss - config.entropy_weight * spread)
            self.actor.clamp_std()
            with torch.no_grad():
                # Schulman's low-variance estimator of KL(old, new): joschu.net/blog/kl-approx.html
                approx_kl = (ratio - 1.0 - log_ratio).mean()
                clip_fraction = ((ratio - 1.0).abs() > config.clip).float().mean()
                logs.append(torch.stack((policy_loss, spread, approx_kl, clip_fraction, norm)))
        names = ("policy_loss", "entropy", "approx_kl", "clip_fraction", "actor_gradient_norm")
        log = dict(zip(names, torch.stack(logs).mean(0).tolist(), strict=True))
        log["std"] = float(self.actor.log_std.detach().exp().mean())
        return {f"learning/{name}": value for name, value in log.items()}

    def _update_critic(
        self, batch: dict[str, torch.Tensor], minibatches: list[torch.Tensor]
    ) -> dict[str, float]:
        config, learner = self.config, self._critic_learner
        logs = []
        for rows in minibatches:
            returns, old = batch["returns"][rows], batch["values"][rows]
            values = self.critic(batch["critic_obs"][rows])
            loss = (values - returns).square()
            if config.value_clip:
                clipped = old + (values - old).clamp(-config.clip, config.clip)
                loss = torch.max(loss, (clipped - returns).square())
            loss = loss.mean()
            logs.append(torch.stack((loss.detach(), learner.descend(loss))))
        names = ("value_loss", "critic_gradient_norm")
        log = dict(zip(names, torch.stack(logs).mean(0).tolist(), strict=True))
        return {f"learning/{name}": value for name, value in log.items()}

    def _shuffle(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self._generator, device=self.device)

    def _update_normalizers(self, rollout: Rollout) -> None:
        for name, network, obs in (
            ("obs", self.actor, rollout.obs),
            ("critic_obs", self.critic, rollout.critic_obs),
        ):
            obs = obs.flatten(0, 1)
            if self._mirror:
                index, sign = self._mirror[name]
                obs = torch.cat((obs, sign * obs[:, index]))
            network.normalizer.update(obs)

    def train(
        self, iterations: int, callback: Callable[[dict[str, float]], bool | None] | None = None
    ) -> None:
        """Alternate rollouts and updates. ``callback(log)`` after each; True stops the training."""
        for _ in range(iterations):
            start = time.perf_counter()
            self._seconds = {"env": 0.0, "policy": 0.0}
            simulation = getattr(self.env, "simulation", None)
            physics = -simulation.seconds if simulation else 0.0
            with torch_threads(1):
                rollout, log = self.collect_rollouts()
            middle = time.perf_counter()
            if self.iteration == 0 and self.config.normalize_observations:
                self._update_normalizers(rollout)  # the first samples only set the scale
            else:
                log |= self.update(rollout)
            self.iteration += 1
            end = time.perf_counter()
            log["time/iteration"] = end - start
            if simulation:
                log["time/physics"] = physics + simulation.seconds
            log["time/env"] = self._seconds["env"]
            log["time/policy"] = self._seconds["policy"]
            log["time/learning"] = end - middle
            log["time/steps_per_second"] = rollout.rewards.numel() / (end - start)
            if callback and callback(log):
                break

    @torch.no_grad()
    def evaluate(self, episodes: int = 10) -> dict[str, float]:
        """Mean ``return`` and ``length`` of at least so many episodes under the mean action.

        In the training environment as it is now, with what helps training in it. The training goes on
        as if nothing had happened, or from new episodes if the environment has no ``state_dict``.
        """
        before = self.env.state_dict() if hasattr(self.env, "state_dict") else None
        obs, _ = self.env.reset()
        n = self.env.num_envs
        quota = math.ceil(episodes / n)  # the same for each world: short episodes weigh no more
        total, length, count = (torch.zeros(n, device=self.device) for _ in range(3))
        resetting = torch.zeros(n, dtype=torch.bool, device=self.device)
        while (count < quota).any():
            action = self.act(self._tensor(obs))
            obs, reward, terminated, truncated, _ = self._env_step(action)
            counts = (count < quota) & ~resetting
            total += torch.where(counts, self._tensor(reward), 0.0)
            length += counts
            done = self._tensor(terminated, torch.bool) | self._tensor(truncated, torch.bool)
            count += done & counts
            if self._next_step_reset:
                resetting = done
        if before:
            self.env.load_state_dict(before)  # type: ignore[attr-defined]
        else:
            self._now = None
        return {
            "return": float(total.sum() / count.sum()),
            "length": float(length.sum() / count.sum()),
        }

    def policy_state(self) -> dict[str, Any]:
        """The policy alone: its configuration and weights."""
        return {"ppo": dataclasses.asdict(self.config), "actor": self.actor.state_dict()}

    def save_checkpoint(self, path: str | Path, **extra: Any) -> None:
        """Write all that the rest of the run depends on (and ``extra``, plain data) to one file.

        Raises:
          OSError: it cannot be written; an older file of that name is untouched.
        """
        resume: dict[str, Any] = {
            "seed": self.seed,
            "critic": self.critic.state_dict(),
            "actor_optimizer": self._actor_learner.optimizer.state_dict(),
            "critic_optimizer": self._critic_learner.optimizer.state_dict(),
            "skipped": (self._actor_learner.skipped, self._critic_learner.skipped),
            "generator": self._generator.get_state(),
            "iteration": self.iteration,
            "total_steps": self.total_steps,
            "episodes": self._episodes,
            "now": self._now,
        }
        if hasattr(self.env, "state_dict"):
            resume["env"] = self.env.state_dict()
        checkpoint.save(path, {**extra, **self.policy_state(), "resume": resume})

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on from a checkpoint: on the CPU, bit for bit as if the run had not stopped.

        An environment without ``state_dict`` starts new episodes.

        Raises:
          FileNotFoundError, ValueError: no such file; not a checkpoint; one without what resuming
            needs; of another learner, of other observations or actions, or another number of worlds.
            The agent is as it was.
        """
        content = checkpoint.load(path, self.device)
        if "resume" not in content:
            raise ValueError(f"checkpoint {path}: holds a policy only; resume from checkpoint.pt")
        theirs, ours = content["ppo"], dataclasses.asdict(self.config)
        for field in ours:
            if theirs.get(field) != ours[field]:
                raise ValueError(
                    f"checkpoint {path}: {field}={theirs.get(field)!r} there, {ours[field]!r} here"
                )
        resume = content["resume"]
        for network, state in ((self.actor, content["actor"]), (self.critic, resume["critic"])):
            for name, ours in network.state_dict().items():
                shape = tuple(state[name].shape) if name in state else "nothing"
                if shape != tuple(ours.shape):
                    raise ValueError(
                        f"checkpoint {path}: of other observations or actions: {name} is {shape} there, "
                        f"{tuple(ours.shape)} here"
                    )
        if "env" in resume and hasattr(self.env, "load_state_dict"):
            self.env.load_state_dict(resume["env"])  # or refuses, with nothing changed yet
            self._now = resume["now"]
        self.actor.load_state_dict(content["actor"])
        self.critic.load_state_dict(resume["critic"])
        self._actor_learner.optimizer.load_state_dict(resume["actor_optimizer"])
        self._critic_learner.optimizer.load_state_dict(resume["critic_optimizer"])
        self._actor_learner.skipped, self._critic_learner.skipped = resume["skipped"]
        self._generator.set_state(resume["generator"].cpu())
        self.seed = resume["seed"]
        self.iteration, self.total_steps = resume["iteration"], resume["total_steps"]
        self._episodes = resume["episodes"]


class _Learner:
    """Adam on one network, with clipped, and where asked mirror-symmetric, gradients."""

    def __init__(self, network: nn.Module, config: PPOConfig, mirror: Mirror | None) -> None:
        self.max_norm = config.max_grad_norm
        self.skipped = 0
        parameters = list(network.parameters())
        device = parameters[0].device
        self.mirror = (mirror[0].to(device), mirror[1].to(device)) if mirror else None
        self.parameters = parameters
        self.symmetrize()
        if self.mirror:
            with torch.no_grad():
                for p in parameters:
                    # Of independent weights the projection keeps half the variance.
                    p.mul_(math.sqrt(2.0) if p.dim() == 2 else 1.0)
        # All gradients in one vector: clipping, projection and the check are one operation each.
        self.gradient = torch.zeros(sum(p.numel() for p in parameters), device=device)
        for p, part in zip(parameters, self.gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=1e-5, fused=True)

    @torch.no_grad()
    def symmetrize(self) -> None:
        """Make the parameters exactly equal to their reflection: rounding does not treat all alike."""
        if self.mirror:
            flat = project(nn.utils.parameters_to_vector(self.parameters), self.mirror)
            nn.utils.vector_to_parameters(flat, self.parameters)

    def descend(self, loss: torch.Tensor) -> torch.Tensor:
        """One step down; the gradient's norm before clipping. A non-finite gradient is skipped."""
        self.gradient.zero_()
        loss.backward()
        if self.mirror:
            self.gradient.copy_(project(self.gradient, self.mirror))
        norm = self.gradient.norm()
        if torch.isfinite(norm):
            self.gradient *= (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            self.optimizer.step()
        else:
            self.skipped += 1
        return norm


def _box_size(what: str, space: gymnasium.Space) -> int:
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise TypeError(f"{what} space {space}: PPOAgent needs a one-dimensional Box")
    return int(space.shape[0])
