"""Proximal Policy Optimization for any Gymnasium ``VectorEnv``, of NumPy arrays or of tensors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn

from kouros.graphs import Recorded
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
from kouros.learning.ranks import ALONE, Ranks
from kouros.threads import torch_threads

# What a loss is and what the log shows of it.
Loss = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
# What the log says of the gradient steps on each network: means over them.
ACTOR_LOG = ("policy_loss", "entropy", "approx_kl", "clip_fraction", "actor_gradient_norm")
CRITIC_LOG = ("value_loss", "critic_gradient_norm")
# The adaptive rate moves by this factor, between these bounds.
RATE_FACTOR = 1.5
RATE_RANGE = (1e-5, 1e-2)
# An observation or a reward beyond this, or NaN, is no number to learn from.
LARGEST = 1e8
# Parameters that one launch of the fused optimizer takes as one tensor.
PIECE = 8192


@dataclasses.dataclass
class Rollout:
    """``horizon`` steps of every world. Shapes ``(horizon, num_envs, ...)``; the next rollout overwrites it.

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

    **Faults.** A world that returns what is not finite (or beyond all sense) is taken as ended there, with
    reward zero, and counted; a gradient that is not finite is skipped, and counted.

    **Ranks.** Of several processes each has an environment of its own, and an equal part of the samples;
    normalizers, advantages and gradients are of all of them together, so that all have the same networks.

    Attributes:
      actor, critic: the networks.
      iteration, total_steps: updates and control steps so far, of all ranks.
      samples: control steps in one rollout of all ranks.
      caution: factor on the learning rate, below 1 after the training diverged; see :meth:`scale_rate`.

    Args:
      env: a vector environment with Box observations and actions.
      config: the learner's figures.
      seed: of the first weights, of exploration, of minibatches and of the environment.
      device: where the networks live; the environment's device if None.
      ranks: the processes that learn together, with environments of the same size.

    Raises:
      TypeError: not a ``VectorEnv``; observations or actions are not a one-dimensional Box.
      ValueError: the samples of a rollout do not split into the minibatches, or the environment does
        not reset itself.
    """

    def __init__(
        self,
        env: VectorEnv,
        config: PPOConfig | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if not hasattr(env, "single_observation_space"):
            raise TypeError(f"env={env}: PPOAgent learns from a VectorEnv; gymnasium.make_vec makes one")
        self.env, self.seed, self.config, self.ranks = env, seed, config or PPOConfig(), ranks
        self.device = torch.device(device or getattr(env, "device", None) or "cpu")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        config = self.config
        obs_dim = _box_size("observation", env.single_observation_space)
        action_dim = _box_size("action", env.single_action_space)
        critic_space = getattr(env, "critic_observation_space", env.single_observation_space)
        samples = config.horizon * env.num_envs
        self.samples = samples * ranks.size
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
        if self._next_step_reset and ranks.size > 1:
            raise ValueError(
                "autoreset_mode=NEXT_STEP: of several ranks each must learn from as many samples"
            )

        self._generator = torch.Generator(self.device)
        self._generator.manual_seed(self._own_seed)
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
        mirror = getattr(env, "mirror", {}) if config.symmetric else {}
        self._mirror = {name: (i.to(self.device), s.to(self.device)) for name, (i, s) in mirror.items()}
        actor_mirror = critic_mirror = None
        if self._mirror:
            unchanged = (torch.zeros(1, dtype=torch.int64), torch.ones(1))
            actor_mirror = reflection(self.actor, mirror["obs"], mirror["action"])
            critic_mirror = reflection(self.critic, mirror["critic_obs"], unchanged)
        self._actor_learner = _Learner(self.actor.to(self.device), config, actor_mirror, len(ACTOR_LOG))
        self._critic_learner = _Learner(self.critic.to(self.device), config, critic_mirror, len(CRITIC_LOG))
        self._learners = (self._actor_learner, self._critic_learner)
        if ranks.size > 1:  # one all-reduce for both gradients
            self._gradients = torch.cat([learner.gradient for learner in self._learners])
            sizes_of = [len(learner.gradient) for learner in self._learners]
            for learner, part in zip(self._learners, self._gradients.split(sizes_of), strict=True):
                learner.place_gradient(part)
        self._second_thread = ThreadPoolExecutor(1)
        self._second_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.iteration = 0
        self.total_steps = 0
        self.caution = 1.0
        self._now: dict[str, torch.Tensor] | None = None
        self._episodes: dict[str, float] = {}
        self._seconds = {"env": 0.0, "policy": 0.0}

        # Where the next rollout goes, which step of it is next, and what is made of it.
        n, horizon = env.num_envs, config.horizon
        sizes = {
            "obs": obs_dim,
            "critic_obs": critic_dim,
            "next_critic_obs": critic_dim,
            "actions": action_dim,
        }
        kinds = {"terminated": torch.bool, "done": torch.bool, "valid": torch.bool}
        self._rollout = Rollout(
            **{
                field.name: torch.zeros(
                    (horizon, n, sizes[field.name]) if field.name in sizes else (horizon, n),
                    dtype=kinds.get(field.name, torch.float32),
                    device=self.device,
                )
                for field in dataclasses.fields(Rollout)
            }
        )
        self._slot = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._order = torch.zeros(
            config.epochs * config.minibatches,
            samples // config.minibatches,
            dtype=torch.int64,
            device=self.device,
        )
        self._turn = torch.zeros(1, dtype=torch.int64, device=self.device)
        names = ("obs", "critic_obs", "actions", "log_probs")
        self._batch = {name: torch.zeros_like(getattr(self._rollout, name).flatten(0, 1)) for name in names}
        for name in ("advantages", "values", "returns"):
            self._batch[name] = torch.zeros(samples, device=self.device)
        # On a GPU, a control step and a gradient step are recorded once and replayed.
        self._recorded: dict[str, Recorded] = {}
        on_gpu = config.graph and self.device.type == "cuda"
        self._record_steps = on_gpu and getattr(env, "graph_safe", False)
        self._record_gradients = on_gpu and not self._next_step_reset
        # Sums for the log, kept where they arise; see _read_log.
        self._metric_names = tuple(getattr(env, "metric_names", ()))
        self._step_sums = torch.zeros(len(self._metric_names) + 5, device=self.device)
        self._update_sums = torch.zeros(2, device=self.device)
        self._since_log = {"steps": 0, "updates": 0, "gradients": 0}

    @property
    def _own_seed(self) -> int:
        """Of worlds and noise: the networks are the same in all ranks, these are not."""
        return self.seed + 1_000_003 * self.ranks.rank

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
        # Later starts, of an environment without state_dict, are others than the first.
        obs, info = self.env.reset(seed=self._own_seed + 10_007 * self.iteration)
        n = self.env.num_envs
        return {
            "obs": self._tensor(obs).clone(),
            "critic_obs": self._tensor(info.get("critic_obs", obs)).clone(),
            "resetting": torch.zeros(n, dtype=torch.bool, device=self.device),
            "return": torch.zeros(n, device=self.device),
            "length": torch.zeros(n, device=self.device),
        }

    @torch.no_grad()
    def collect_rollouts(self) -> Rollout:
        """Run the policy for ``horizon`` steps."""
        step = self._step
        self._slot.zero_()  # the rollout before may have been interrupted
        if self._now is None:
            self._now = self._start()
            self._recorded.pop("step", None)
        with _tensor_cores(self.device):
            if self._record_steps:
                if "step" not in self._recorded:
                    self._recorded["step"] = Recorded(
                        self._step,
                        self.device,
                        [self._generator, *getattr(self.env, "generators", ())],
                        self.env,
                        [*self._now.values(), self._slot, self._step_sums],
                    )
                step = self._recorded["step"].replay
            for _ in range(self.config.horizon):
                step()
        self.total_steps += self.samples
        self._since_log["steps"] += self.config.horizon
        return self._rollout

    def _step(self) -> None:
        """One control step of every world, into the next slot of the rollout."""
        now = self._now
        assert now
        start = time.perf_counter()
        mean, log_std = self.actor(now["obs"]), self.actor.log_std
        actions = mean + log_std.exp() * self._noise(mean.shape)
        log_probs = log_prob(actions, mean, log_std)
        middle = time.perf_counter()
        sent = self.actor.bound(actions).nan_to_num_(0.0)  # of networks that have diverged
        obs, reward, terminated, truncated, info = self._env_step(sent)
        self._seconds["policy"] += middle - start
        self._seconds["env"] += time.perf_counter() - middle

        rewards, terminated = self._tensor(reward), self._tensor(terminated, torch.bool)
        truncated = self._tensor(truncated, torch.bool)
        obs = self._tensor(obs)
        critic_obs = self._tensor(info.get("critic_obs", obs))
        next_critic_obs = self._final_obs(info, critic_obs)
        for name, x in (("reward", rewards), ("terminated", terminated), ("truncated", truncated)):
            if x.shape != (self.env.num_envs,):  # it would broadcast
                raise ValueError(f"{name} of shape {tuple(x.shape)}: expected ({self.env.num_envs},)")
        seen = (rewards.unsqueeze(1), obs, critic_obs, next_critic_obs)
        faulty = ~(torch.stack([x.abs().amax(-1) for x in seen]).amax(0) < LARGEST)
        terminated = terminated | faulty
        done = terminated | truncated
        rows = faulty.unsqueeze(-1)
        rewards = rewards.masked_fill(faulty, 0.0)
        # What says nothing: the normalizers hardly notice.
        obs = torch.where(rows, self.actor.normalizer.mean, obs)
        critic_obs = torch.where(rows, self.critic.normalizer.mean, critic_obs)
        next_critic_obs = torch.where(rows, self.critic.normalizer.mean, next_critic_obs)
        step = Rollout(
            obs=now["obs"],
            critic_obs=now["critic_obs"],
            next_critic_obs=next_critic_obs,
            actions=actions,
            log_probs=log_probs,
            rewards=rewards,
            terminated=terminated,
            done=done,
            valid=~now["resetting"],
        )
        for name, values in vars(step).items():
            getattr(self._rollout, name).index_copy_(0, self._slot, values.unsqueeze(0))
        self._slot.add_(1).remainder_(self.config.horizon)

        now["return"] += rewards
        now["length"] += ~now["resetting"]
        counts = (done.float(), now["return"] * done, now["length"] * done, faulty.float())
        ends = torch.stack(counts).sum(1)
        parts = [rewards.mean().unsqueeze(0), ends]
        if "metrics" in info:
            parts.append(info["metrics"].mean(1))
        sums = torch.cat(parts)
        self._step_sums[: len(sums)] += sums
        now["return"].masked_fill_(done, 0.0)
        now["length"].masked_fill_(done, 0.0)
        if self._next_step_reset:
            now["resetting"].copy_(done)
        now["obs"].copy_(obs)
        now["critic_obs"].copy_(critic_obs)

    def _final_obs(self, info: dict[str, Any], critic_obs: torch.Tensor) -> torch.Tensor:
        """What followed the step within its own episode: not the next episode's first observation."""
        key = "final_critic_obs" if "critic_obs" in info else "final_obs"
        final, there = info.get(key), info.get(f"_{key}")
        if self._next_step_reset:
            return critic_obs
        if final is None:
            if "final_obs" in info:
                raise ValueError('info["critic_obs"]: info["final_critic_obs"] must come with it')
            return critic_obs
        if isinstance(final, torch.Tensor) or (isinstance(final, np.ndarray) and final.dtype != object):
            final = self._tensor(final)
            if there is None:  # all rows are filled
                return final
            return torch.where(self._tensor(there, torch.bool).unsqueeze(1), final, critic_obs)
        merged = critic_obs.clone()
        for row, value in enumerate(final):  # Gymnasium: an object array with gaps
            if value is not None:
                merged[row] = self._tensor(value)
        return merged

    def update(self, rollout: Rollout) -> None:
        """One PPO update."""
        config = self.config
        with torch.no_grad(), _tensor_cores(self.device):
            critic_obs = self.critic.normalizer(rollout.critic_obs)
            values = self.critic.mlp(critic_obs).squeeze(-1)
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
            batch = self._batch
            made = {
                "obs": self.actor.normalizer(rollout.obs),
                "critic_obs": critic_obs,
                "actions": rollout.actions,
                "log_probs": rollout.log_probs,
                "advantages": advantages,
                "values": values,
                "returns": advantages + values,
            }
            for name, x in made.items():
                batch[name].copy_(x.flatten(0, 1))
            if self._next_step_reset:
                batch = {name: x[rollout.valid.flatten()] for name, x in batch.items()}
            advantages = batch["advantages"]
            mean, variance = self._moments(advantages.unsqueeze(1))
            advantages -= mean
            n = len(advantages) * self.ranks.size
            advantages /= (variance * (n / (n - 1))).sqrt() + 1e-8
        learners, actor = self._learners, self._actor_learner
        kl = -actor.sums[ACTOR_LOG.index("approx_kl")].clone()
        taken = actor.skipped.clone()
        orders = [self._shuffle(len(batch["obs"])) for _ in range(config.epochs)]
        if self._record_gradients:
            self._order.copy_(torch.stack(orders).view_as(self._order))
            self._turn.zero_()
            if "gradient" not in self._recorded:
                changed = [self._turn, *(t for learner in learners for t in learner.tensors())]
                with _tensor_cores(self.device):
                    self._recorded["gradient"] = Recorded(self._both_gradients, self.device, tensors=changed)
            gradients = len(self._order)
            for _ in range(gradients):
                self._recorded["gradient"].replay()
        else:
            minibatches = [rows for order in orders for rows in order.chunk(config.minibatches)]
            gradients = len(minibatches)
            # Half the threads for each network: layers this small gain little from more than one.
            with torch_threads(max(1, torch.get_num_threads() // 2)), _tensor_cores(self.device):
                if self.ranks.size > 1:
                    for rows in minibatches:
                        self._shared_gradient(batch, rows)
                else:
                    critic = self._second_thread.submit(self._critic_gradients, batch, minibatches)
                    self._actor_gradients(batch, minibatches)
                    critic.result()
        kl = self.ranks.mean_(kl + actor.sums[ACTOR_LOG.index("approx_kl")])
        taken += gradients - actor.skipped
        for learner in learners:
            learner.symmetrize()
            learner.adapt_rate(kl / taken.clamp(min=1.0), self.caution)
        with torch.no_grad():
            # Of its own samples in each rank; the log shows their mean.
            residual = (batch["returns"] - batch["values"]).var() / batch["returns"].var().clamp(min=1e-8)
            self._update_sums += torch.stack((1.0 - residual, self.actor.log_std.exp().mean()))
        self._since_log["updates"] += 1
        self._since_log["gradients"] += gradients
        if config.normalize_observations:
            # After the update: the ratio needs the normalizer that the actions were drawn with.
            self._update_normalizers(rollout)

    def _both_gradients(self) -> None:
        """A gradient step of both networks on the minibatch whose turn it is, side by side."""
        rows = self._order.index_select(0, self._turn)[0]
        here, beside = torch.cuda.current_stream(), self._second_stream
        assert beside
        beside.wait_stream(here)
        if self.ranks.size > 1:
            self._shared_gradient(self._batch, rows, beside)
        else:
            with torch.cuda.stream(beside):
                self._critic_gradients(self._batch, [rows])
            self._actor_gradients(self._batch, [rows])
            here.wait_stream(beside)
        self._turn += 1

    def _shared_gradient(
        self, batch: dict[str, torch.Tensor], rows: torch.Tensor, beside: torch.cuda.Stream | None = None
    ) -> None:
        """A gradient step of both networks along the mean gradients of all ranks."""
        with torch.cuda.stream(beside):
            critic_loss, critic_log = self._critic_loss(batch, rows)
            self._critic_learner.differentiate(critic_loss)
        actor_loss, actor_log = self._actor_loss(batch, rows)
        self._actor_learner.differentiate(actor_loss)
        if beside:
            torch.cuda.current_stream().wait_stream(beside)
        self.ranks.mean_(self._gradients)
        self._critic_learner.step(critic_log)
        self._actor_learner.step(actor_log)
        self.actor.clamp_std()

    def _actor_gradients(self, batch: dict[str, torch.Tensor], minibatches: list[torch.Tensor]) -> None:
        for rows in minibatches:
            loss, log = self._actor_loss(batch, rows)
            self._actor_learner.differentiate(loss)
            self._actor_learner.step(log)
            self.actor.clamp_std()

    def _critic_gradients(self, batch: dict[str, torch.Tensor], minibatches: list[torch.Tensor]) -> None:
        for rows in minibatches:
            loss, log = self._critic_loss(batch, rows)
            self._critic_learner.differentiate(loss)
            self._critic_learner.step(log)

    def _actor_loss(self, batch: dict[str, torch.Tensor], rows: torch.Tensor) -> Loss:
        """The clipped objective (Schulman et al. 2017, equation 7) and the entropy bonus."""
        config = self.config
        advantages, log_std = batch["advantages"][rows], self.actor.log_std
        mean = self.actor.mlp(batch["obs"][rows])
        log_ratio = log_prob(batch["actions"][rows], mean, log_std) - batch["log_probs"][rows]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - config.clip, 1.0 + config.clip)
        policy_loss = -torch.min(advantages * ratio, advantages * clipped).mean()
        spread = entropy(log_std)
        with torch.no_grad():
            # Schulman's low-variance estimator of KL(old, new): joschu.net/blog/kl-approx.html
            approx_kl = (ratio - 1.0 - log_ratio).mean()
            clip_fraction = ((ratio - 1.0).abs() > config.clip).float().mean()
        log = (policy_loss.detach(), spread.detach(), approx_kl, clip_fraction)
        return policy_loss - config.entropy_weight * spread, log

    def _critic_loss(self, batch: dict[str, torch.Tensor], rows: torch.Tensor) -> Loss:
        """Squared errors, the worse of the value's and of the clipped value's."""
        config = self.config
        returns, old = batch["returns"][rows], batch["values"][rows]
        values = self.critic.mlp(batch["critic_obs"][rows]).squeeze(-1)
        errors = (values - returns).square()
        if config.value_clip:
            clipped = old + (values - old).clamp(-config.clip, config.clip)
            errors = torch.max(errors, (clipped - returns).square())
        loss = errors.mean()
        return loss, (loss.detach(),)

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, ``(size,)``, of the rows ``(n, size)`` of all ranks."""
        mean, variance = x.mean(0), x.var(0, correction=0)
        if self.ranks.size > 1:  # the mean variance within, and that between
            of_all = self.ranks.mean_(mean.clone())
            variance = self.ranks.mean_(variance + (mean - of_all).square())
            mean = of_all
        return mean, variance

    def _read_log(self) -> dict[str, float]:
        """Means since the last call: the one place where training waits for the device."""
        actor, critic, since = self._actor_learner, self._critic_learner, self._since_log
        sums = (self._step_sums, actor.sums, critic.sums, self._update_sums)
        now = torch.stack((actor.skipped, critic.skipped, actor.rate))
        numbers = self.ranks.mean_(torch.cat((*sums, now))).tolist()
        values, (actor_skipped, critic_skipped, rate) = iter(numbers[:-3]), numbers[-3:]

        def take(names: Sequence[str], count: float) -> dict[str, float]:
            return {name: value / max(1, count) for name, value in zip(names, values)}  # noqa: B905

        log = take(("reward/mean",), since["steps"])
        episodes, total, length, faulty = (next(values) for _ in range(4))
        log["task/faulty_steps"] = faulty * self.ranks.size
        log |= take(self._metric_names, since["steps"])
        learning = take(ACTOR_LOG, since["gradients"] - actor_skipped)
        learning |= take(CRITIC_LOG, since["gradients"] - critic_skipped)
        learning |= take(("explained_variance", "std"), since["updates"])
        learning |= {"skipped_updates": actor_skipped + critic_skipped, "learning_rate": rate}
        if since["updates"]:
            log |= {f"learning/{name}": value for name, value in learning.items()}
        if episodes:
            self._episodes = {"episode/return": total / episodes, "episode/length": length / episodes}
        self._forget_log()
        return log | self._episodes

    def _forget_log(self) -> None:
        actor, critic = self._learners
        counts = (self._step_sums, actor.sums, critic.sums, self._update_sums, actor.skipped, critic.skipped)
        for part in counts:
            part.zero_()
        self._since_log = dict.fromkeys(self._since_log, 0)

    @torch.no_grad()
    def last_step(self) -> dict[str, torch.Tensor]:
        """``actions`` as drawn and ``observations`` as normalized now: the last step, a row a world."""
        obs = self.actor.normalizer(self._rollout.obs[-1])
        return {"actions": self._rollout.actions[-1], "observations": obs}

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
            network.normalizer.merge(*self._moments(obs), len(obs) * self.ranks.size)

    def train(
        self,
        iterations: int,
        callback: Callable[[dict[str, float]], bool | None] | None = None,
        log_interval: int = 1,
    ) -> None:
        """Alternate rollouts and updates.

        Args:
          iterations: how many of each.
          callback: called with the log, means over ``log_interval`` iterations (``time/rollout`` and
            ``time/learning`` are the last one's); True stops the training.
          log_interval: iterations between logs. On a GPU nothing waits in between.
        """
        simulation = getattr(self.env, "simulation", None)
        start = time.perf_counter()
        for done in range(1, iterations + 1):
            marks = [mark(self.device)]
            with torch_threads(1):
                rollout = self.collect_rollouts()
            marks.append(mark(self.device))
            if self.iteration == 0 and self.config.normalize_observations:
                self._update_normalizers(rollout)  # the first samples only set the scale
            else:
                self.update(rollout)
            marks.append(mark(self.device))
            self.iteration += 1
            since = self._since_log["steps"] // self.config.horizon
            due = self.iteration % log_interval == 0
            if not due and done < iterations:
                continue
            log = self._read_log()
            # At iterations that depend on nothing else: a resumed run moves where the whole one did.
            if due and hasattr(self.env, "advance_curriculum"):
                log |= self.env.advance_curriculum(self.ranks.everywhere)
            now = time.perf_counter()
            log["time/iteration"] = (now - start) / since
            log["time/steps_per_second"] = since * self.samples / (now - start)
            log["time/rollout"], log["time/learning"] = map(seconds_between, marks[:2], marks[1:])
            if self.device.type == "cpu":
                log["time/policy"] = self._seconds["policy"] / since
                log["time/env"] = self._seconds["env"] / since
                if simulation:
                    log["time/physics"] = simulation.seconds / since
                    simulation.seconds = 0.0
            self._seconds = {"env": 0.0, "policy": 0.0}
            if callback and callback(log):
                break
            start = time.perf_counter()

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

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, tensors and plain data; of this rank alone."""
        resume: dict[str, Any] = {
            "seed": self.seed,
            "critic": self.critic.state_dict(),
            "actor_optimizer": self._actor_learner.optimizer.state_dict(),
            "critic_optimizer": self._critic_learner.optimizer.state_dict(),
            "iteration": self.iteration,
            "total_steps": self.total_steps,
            "episodes": self._episodes,
            "caution": self.caution,
            **self._own_state(),
        }
        return {**self.policy_state(), "resume": resume}

    def _own_state(self) -> dict[str, Any]:
        """What each rank has for itself."""
        own: dict[str, Any] = {"generator": self._generator.get_state(), "now": self._now}
        if hasattr(self.env, "state_dict"):
            own["env"] = self.env.state_dict()
        return own

    def checkpoint_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` of all ranks together, in the first of them; all must call it."""
        content = self.state_dict()
        if self.ranks.size > 1:
            own = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, self._own_state())
            content["resume"]["others"] = self.ranks.gather(own)[1:]
        return content

    def save_checkpoint(self, path: str | Path, **extra: Any) -> None:
        """Write all that the rest of the run depends on (and ``extra``, plain data) to one file.

        Raises:
          OSError: it cannot be written; an older file of that name is untouched.
        """
        content = self.checkpoint_dict()
        if self.ranks.first:
            checkpoint.save(path, {**extra, **content})

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on from a checkpoint: on the CPU, bit for bit as if the run had not stopped.

        An environment without ``state_dict`` starts new episodes.

        Raises:
          FileNotFoundError, ValueError: no such file; not a checkpoint; see :meth:`load_state_dict`.
        """
        content = checkpoint.load(path, self.device)
        if "resume" not in content:
            raise ValueError(f"checkpoint {path}: holds a policy only; resume from checkpoint.pt")
        others = content["resume"].pop("others", [])
        if len(others) + 1 != self.ranks.size:
            raise ValueError(
                f"checkpoint {path}: of {len(others) + 1} processes, these are {self.ranks.size}; "
                f"torchrun --nproc-per-node {len(others) + 1} goes on with it"
            )
        if not self.ranks.first:
            content["resume"] |= others[self.ranks.rank - 1]
        self.load_state_dict(content, f"checkpoint {path}")

    def load_state_dict(self, content: dict[str, Any], where: str = "state") -> None:
        """Go on from :meth:`state_dict`.

        Raises:
          ValueError: it is of another learner, of other observations or actions, or another number of
            worlds. The agent is as it was.
        """
        theirs, ours = content["ppo"], dataclasses.asdict(self.config)
        for field in ours:
            if theirs.get(field) != ours[field]:
                raise ValueError(f"{where}: {field}={theirs.get(field)!r} there, {ours[field]!r} here")
        resume = content["resume"]
        for network, state in ((self.actor, content["actor"]), (self.critic, resume["critic"])):
            for name, ours in network.state_dict().items():
                shape = tuple(state[name].shape) if name in state else "nothing"
                if shape != tuple(ours.shape):
                    raise ValueError(
                        f"{where}: of other observations or actions: {name} is {shape} there, "
                        f"{tuple(ours.shape)} here"
                    )
        if resume["generator"].shape != self._generator.get_state().shape:
            raise ValueError(f"{where}: of another kind of device; go on with it where it began")
        now = None
        if "env" in resume and hasattr(self.env, "load_state_dict"):
            self.env.load_state_dict(resume["env"])  # or refuses, with nothing changed yet
            now = resume["now"] and {name: x.clone() for name, x in resume["now"].items()}
        self._now = now
        self._recorded = {}  # of tensors that are replaced
        self.actor.load_state_dict(content["actor"])
        self.critic.load_state_dict(resume["critic"])
        for name, learner in (("actor", self._actor_learner), ("critic", self._critic_learner)):
            learner.load(resume[f"{name}_optimizer"])
        self._slot.zero_()
        self._generator.set_state(resume["generator"].cpu())
        self.seed = resume["seed"]
        self.iteration, self.total_steps = resume["iteration"], resume["total_steps"]
        self._episodes, self.caution = resume["episodes"], resume.get("caution", 1.0)
        self._forget_log()

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of both networks, and :attr:`caution`."""
        self.caution *= factor
        for learner in self._learners:
            learner.rate.mul_(factor)


class _Learner:
    """Adam on one network, with clipped, and where asked mirror-symmetric, gradients.

    Parameters and gradients are two vectors: clipping, projection, the check and Adam are one operation each.

    Attributes:
      rate: the learning rate, a tensor that a recorded step reads.
      skipped: how many steps were left out since the last log because the gradient was not finite.
      sums: of what the log shows of each step that was taken.
    """

    def __init__(self, network: nn.Module, config: PPOConfig, mirror: Mirror | None, log_size: int) -> None:
        self.config = config
        parameters = list(network.parameters())
        device = parameters[0].device
        self.mirror = (mirror[0].to(device), mirror[1].to(device)) if mirror else None
        sizes = [p.numel() for p in parameters]
        self.parameters = parameters
        self.vector = nn.utils.parameters_to_vector(parameters).detach()
        self.gradient = torch.zeros_like(self.vector)
        for p, part in zip(parameters, self.vector.split(sizes), strict=True):
            p.data = part.view_as(p)
        self.symmetrize()
        if self.mirror:
            with torch.no_grad():
                for p in parameters:
                    # Of independent weights the projection keeps half the variance.
                    p.mul_(math.sqrt(2.0) if p.dim() == 2 else 1.0)
        self.rate = torch.tensor(config.learning_rate, device=device)
        self.skipped = torch.zeros((), device=device)
        self.sums = torch.zeros(log_size, device=device)
        # In pieces: the fused kernel gives each tensor few of a GPU's processors.
        pieces = [nn.Parameter(piece) for piece in self.vector.split(PIECE)]
        self.optimizer = torch.optim.Adam(
            pieces, lr=self.rate, eps=1e-5, fused=True, capturable=device.type == "cuda"
        )
        self.place_gradient(self.gradient)

    def tensors(self) -> list[torch.Tensor]:
        """All that :meth:`step` and the log change."""
        found = [self.vector, self.skipped, self.sums]
        for piece in self.optimizer.param_groups[0]["params"]:
            state = self.optimizer.state[piece]
            if not state:  # Adam makes its own at the first step
                state["step"] = torch.zeros((), device=piece.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(piece), torch.zeros_like(piece)
            found += state.values()
        return found

    def load(self, optimizer: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))  # it would go on in these very tensors
        group = self.optimizer.param_groups[0]
        self.rate.copy_(group["lr"])
        group["lr"] = self.rate

    @torch.no_grad()
    def symmetrize(self) -> None:
        """Make the parameters exactly equal to their reflection: rounding does not treat all alike."""
        if self.mirror:
            self.vector.copy_(project(self.vector, self.mirror))

    def place_gradient(self, place: torch.Tensor) -> None:
        """Use a part of somebody else's vector for the gradient."""
        self.gradient = place
        pieces = self.optimizer.param_groups[0]["params"]
        for piece, slope in zip(pieces, place.split(PIECE), strict=True):
            piece.grad = slope

    def differentiate(self, loss: torch.Tensor) -> None:
        slopes = torch.autograd.grad(loss, self.parameters)
        torch.cat([slope.flatten() for slope in slopes], out=self.gradient)

    @torch.no_grad()
    def step(self, log: tuple[torch.Tensor, ...]) -> None:
        """One step down along the gradient; one that is not finite is skipped, and counted.

        Args:
          log: what the log shows of it; the gradient's norm before clipping comes after it.
        """
        if self.mirror:
            self.gradient.copy_(project(self.gradient, self.mirror))
        norm = self.gradient.norm()
        self.gradient *= (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        # Adam's own switch for mixed precision: where it is 1, the step is left out, on the device.
        bad = (~torch.isfinite(norm)).float()
        setattr(self.optimizer, "found_inf", bad)  # noqa: B010 (torch does not declare it)
        self.skipped += bad
        self.optimizer.step()
        # Of a step left out nothing counts: one such must not make a mean NaN.
        self.sums += torch.where(bad > 0.0, 0.0, torch.stack((*log, norm)))

    def adapt_rate(self, kl: torch.Tensor, caution: float) -> None:
        """A smaller rate after a step of more than twice the target, a larger one below half of it."""
        target = self.config.target_kl
        if target:
            factor = torch.where(kl > 2.0 * target, 1.0 / RATE_FACTOR, 1.0)
            factor = torch.where(kl < 0.5 * target, RATE_FACTOR, factor)
            low, high = RATE_RANGE
            self.rate.mul_(factor).clamp_(low * caution, high * caution)


@contextlib.contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Matrix products in TF32 on a GPU: ten bits of mantissa, a multiple of the speed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def mark(device: torch.device) -> float | torch.cuda.Event:
    """A point in the device's time."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds between two marks that the device has passed."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000.0
    assert isinstance(end, float)
    return end - start


def _box_size(what: str, space: gymnasium.Space) -> int:
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        fix = "give each environment gymnasium.wrappers.FlattenObservation (make_vec's wrappers=)"
        if what == "action":
            fix = "it learns continuous actions, in a row for each world"
        raise TypeError(f"{what} space {space}: PPOAgent needs a one-dimensional Box: {fix}")
    return int(space.shape[0])
