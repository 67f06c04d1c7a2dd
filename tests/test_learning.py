"""The learner against slow oracles: NumPy, SciPy, finite differences, and a bandit with a known answer."""

from __future__ import annotations

import dataclasses

import gymnasium
import numpy as np
import pytest
import scipy.stats
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_env
from kouros.learning import checkpoint
from kouros.learning.config import STD_RANGE, PPOConfig
from kouros.learning.networks import (
    ActorNetwork,
    CriticNetwork,
    Normalizer,
    entropy,
    log_prob,
    project,
    reflection,
)
from kouros.learning.ppo import PPOAgent, _Learner, compute_gae

SMALL = PPOConfig(horizon=8, epochs=2, minibatches=2, actor_hidden=(16, 8), critic_hidden=(16, 8))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_gae_equals_the_sum_it_stands_for(seed: int, gamma: float, lam: float) -> None:
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, over the rest of its own episode."""
    rng = np.random.default_rng(seed)
    steps, worlds = 12, 3
    r, v, nv = rng.normal(size=(3, steps, worlds))
    done = rng.random((steps, worlds)) < 0.25
    terminated = done & (rng.random((steps, worlds)) < 0.5)
    found = compute_gae(*(torch.tensor(x) for x in (r, v, nv, terminated, done)), gamma, lam)
    for t in range(steps):
        for w in range(worlds):
            total, weight = 0.0, 1.0
            for k in range(t, steps):
                total += weight * (r[k, w] + gamma * nv[k, w] * (not terminated[k, w]) - v[k, w])
                weight *= gamma * lam
                if done[k, w]:
                    break
            assert found[t, w].item() == pytest.approx(total, abs=1e-9)


@given(st.integers(0, 10**6))
def test_log_prob_and_entropy_equal_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mean, action = rng.normal(size=(2, 4, 5))
    log_std = rng.normal(size=5) * 0.5
    normal = scipy.stats.norm(mean, np.exp(log_std))
    found = log_prob(*(torch.tensor(x) for x in (action, mean, log_std)))
    np.testing.assert_allclose(found, normal.logpdf(action).sum(-1), atol=1e-9)
    np.testing.assert_allclose(entropy(torch.tensor(log_std)), normal.entropy().sum(-1)[0], atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10**6))
def test_normalizer_equals_numpy_over_all_seen_data(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.normal(3.0, 5.0, size=(n, 4)).astype(np.float32) for n in sizes]
    normalizer = Normalizer(4)
    for batch in batches:
        normalizer.update(torch.from_numpy(batch))
    data = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, data.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(normalizer.variance, data.var(0), rtol=1e-3, atol=1e-4)
    x = torch.from_numpy(batches[0])
    expected = (batches[0] - data.mean(0)) / np.sqrt(data.var(0) + 1e-5)
    np.testing.assert_allclose(normalizer(x), expected.clip(-10, 10), rtol=1e-2, atol=1e-3)


def test_normalizer_refuses_what_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(8, 1\): expected \(n, 4\)"):
        Normalizer(4).update(torch.zeros(8, 1))


def test_std_bounds_are_fixed_and_no_trap() -> None:
    """Deviations stay in their range, whatever the gradient, and find back from its edge."""
    agent = PPOAgent(Target(), dataclasses.replace(SMALL, entropy_weight=1e3, learning_rate=1.0))
    actor = agent.actor
    assert {name for name, _ in actor.named_parameters() if "std" in name} == {"log_std"}
    agent.update(agent.collect_rollouts())
    assert actor.log_std.exp().tolist() == pytest.approx([STD_RANGE[1]] * 2)
    agent.config.entropy_weight = -1e3
    agent.update(agent.collect_rollouts())
    assert (actor.log_std.exp() < STD_RANGE[1]).all()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["elu", "relu", "silu", "tanh"])
def test_network_shapes(activation: str, layer_norm: bool) -> None:
    actor = ActorNetwork(5, 3, (8, 4), activation, layer_norm)
    critic = CriticNetwork(7, (8,), activation, layer_norm)
    assert actor(torch.randn(6, 5)).shape == (6, 3)
    assert critic(torch.randn(6, 7)).shape == (6,)


def random_reflection(size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Any signed permutation that is its own inverse."""
    order = rng.permutation(size)
    index = np.arange(size)
    for a, b in order[: size // 2 * 2].reshape(-1, 2)[: size // 3]:
        index[a], index[b] = b, a
    sign = rng.choice([-1.0, 1.0], size)
    sign = np.where(index < np.arange(size), sign[index], sign)
    return torch.tensor(index), torch.tensor(sign, dtype=torch.float32)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_projected_parameters_make_a_mirror_symmetric_network(seed: int, layer_norm: bool) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    obs, action = random_reflection(7, rng), random_reflection(5, rng)
    network = ActorNetwork(7, 5, (8, 6), layer_norm=layer_norm)
    mirror = reflection(network, obs, action)
    parameters = list(network.parameters())
    flat = torch.nn.utils.parameters_to_vector(parameters).detach()
    projected = project(flat + 0.1 * torch.randn_like(flat), mirror)
    torch.nn.utils.vector_to_parameters(projected, parameters)
    assert torch.equal(project(projected, mirror), projected)
    x = torch.randn(9, 7)
    image = obs[1] * x[:, obs[0]]
    expected = action[1] * network(x)[:, action[0]]
    torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=1e-4)
    std = network.log_std
    assert torch.equal(std, std[action[0]])


class Target(VectorEnv):
    """A bandit: the reward of an action is minus its squared distance from 0.5 x observation."""

    def __init__(self, num_envs: int = 64, limit: float = 10.0) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-limit, limit, (2,), np.float32)
        self._rng = np.random.default_rng(0)
        self.largest_action = 0.0

    def _observe(self) -> np.ndarray:
        self._obs = self._rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        return self._obs

    def reset(self, *, seed=None, options=None):
        return self._observe(), {}

    def step(self, actions):
        assert isinstance(actions, np.ndarray)
        self.largest_action = max(self.largest_action, np.abs(actions).max())
        rewards = -((actions - 0.5 * self._obs) ** 2).sum(-1)
        done = np.ones(self.num_envs, dtype=bool)
        last = self._obs
        return self._observe(), rewards, done, ~done, {"final_obs": list(last), "_final_obs": done}


@pytest.mark.parametrize("squash", [False, True])
def test_ppo_finds_a_known_optimum(squash: bool) -> None:
    env = Target(limit=1.0 if squash else 10.0)
    config = dataclasses.replace(
        SMALL, learning_rate=3e-3, entropy_weight=0.0, squash=squash, initial_std=0.5
    )
    agent = PPOAgent(env, config)
    logs: list[dict[str, float]] = []
    agent.train(100, lambda log: logs.append(log))
    obs = torch.tensor([[0.8, -0.6], [-0.2, 0.4]])
    torch.testing.assert_close(agent.act(obs), 0.5 * obs, atol=0.08, rtol=0)
    assert logs[-1]["learning/explained_variance"] <= 1.0
    assert {"learning/approx_kl", "learning/clip_fraction", "learning/entropy"} <= set(logs[-1])


def test_stored_actions_are_the_drawn_ones() -> None:
    """The environment sees clipped actions; the buffer keeps what the log-probability belongs to."""
    env = Target(limit=0.1)
    agent = PPOAgent(env, dataclasses.replace(SMALL, initial_std=1.0))
    rollout = agent.collect_rollouts()
    assert env.largest_action <= np.float32(0.1)
    assert rollout.actions.abs().max() > 1.0
    with torch.no_grad():
        expected = log_prob(rollout.actions, agent.actor(rollout.obs), agent.actor.log_std)
    torch.testing.assert_close(rollout.log_probs, expected)


@pytest.mark.parametrize("squash", [False, True])
def test_the_policy_is_the_mean_action_within_bounds(squash: bool) -> None:
    agent = PPOAgent(Target(limit=0.1), dataclasses.replace(SMALL, squash=squash))
    with torch.no_grad():
        agent.actor.log_std.zero_()
        agent.actor.mlp[-1].bias[:] = torch.tensor([3.0, -0.01])
        obs = torch.randn(5, 2)
        mean = agent.actor(obs).numpy()
    expected = 0.1 * np.tanh(mean) if squash else np.clip(mean, -0.1, 0.1)
    np.testing.assert_allclose(agent.act(obs), expected, atol=1e-6)
    np.testing.assert_allclose(agent.actor.act(obs).detach(), expected, atol=1e-6)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_rollout_never_crosses_an_episode(mode: AutoresetMode) -> None:
    """Pendulum's clock is in the observation here: what follows a step is one tick later."""

    class Clock(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

        def __init__(self, length: int) -> None:
            self.length, self.t = length, 0

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.t = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.full(1, self.t, np.float32), 1.0, False, self.t >= self.length, {}

    env = SyncVectorEnv([lambda n=n: Clock(n) for n in (3, 5)], autoreset_mode=mode)
    agent = PPOAgent(env, dataclasses.replace(SMALL, horizon=20))
    rollout = agent.collect_rollouts()
    ticks = (rollout.next_critic_obs - rollout.critic_obs).squeeze(-1)
    assert (ticks[rollout.valid] == 1.0).all()
    assert rollout.done.any()
    assert not rollout.terminated.any()
    assert rollout.valid.all() == (mode == AutoresetMode.SAME_STEP)
    agent.update(rollout)
    assert agent.evaluate(4)["length"] == 4.0
    rollout = agent.collect_rollouts()  # after an evaluation: from the beginning of an episode
    assert (rollout.obs[0] == 0.0).all()


def random_batch(seed: int, n: int = 64) -> tuple[PPOAgent, dict[str, torch.Tensor]]:
    """An agent in float64 and samples of which many are beyond the clip, on either side."""
    agent = PPOAgent(Target(), dataclasses.replace(SMALL, entropy_weight=0.01), seed)
    agent.actor.double(), agent.critic.double()
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = {"obs": normal(n, 2), "critic_obs": normal(n, 2), "actions": normal(n, 2)}
    with torch.no_grad():
        mean = agent.actor.mlp(batch["obs"])
        batch["log_probs"] = log_prob(batch["actions"], mean, agent.actor.log_std) + 0.3 * normal(n)
        batch["values"] = agent.critic.mlp(batch["critic_obs"])[:, 0] + 0.4 * normal(n)
    batch["advantages"], batch["returns"] = normal(n), batch["values"] + normal(n)
    return agent, batch


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_diagnostics_equal_numpys(seed: int) -> None:
    """Schulman et al. 2017, equations 7 and 9, sample by sample, with SciPy's densities."""
    agent, batch = random_batch(seed)
    clip, rows = agent.config.clip, torch.arange(0, 64, 2)
    sample = {name: values[rows].numpy() for name, values in batch.items()}
    with torch.no_grad():
        mean, std = agent.actor.mlp(batch["obs"][rows]).numpy(), agent.actor.log_std.exp().numpy()
        value = agent.critic.mlp(batch["critic_obs"][rows])[:, 0].numpy()
    pulled, kl, beyond, errors = [], [], [], []
    for i in range(len(rows)):
        new = scipy.stats.norm(mean[i], std).logpdf(sample["actions"][i]).sum()
        ratio = np.exp(new - sample["log_probs"][i])
        a, old, target = (sample[name][i] for name in ("advantages", "values", "returns"))
        pulled.append(min(a * ratio, a * min(max(ratio, 1 - clip), 1 + clip)))
        kl.append(ratio - 1 - np.log(ratio))
        beyond.append(abs(ratio - 1) > clip)
        near = old + min(max(value[i] - old, -clip), clip)
        errors.append(max((value[i] - target) ** 2, (near - target) ** 2))
    spread = scipy.stats.norm(0, std).entropy().sum()
    assert 0.2 < np.mean(beyond) < 0.9
    loss, log = agent._actor_loss(batch, rows)
    assert loss.item() == pytest.approx(-np.mean(pulled) - 0.01 * spread)
    assert [x.item() for x in log] == pytest.approx([-np.mean(pulled), spread, np.mean(kl), np.mean(beyond)])
    assert agent._critic_loss(batch, rows)[0].item() == pytest.approx(np.mean(errors))
    agent.config.value_clip = False
    plain = np.mean((value - sample["returns"]) ** 2)
    assert agent._critic_loss(batch, rows)[0].item() == pytest.approx(plain)


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_gradients_by_finite_differences(which: str) -> None:
    agent, batch = random_batch(5)
    loss_of = getattr(agent, f"_{which}_loss")
    network, rows = getattr(agent, which), torch.arange(64)
    parameters = list(network.parameters())
    slopes = torch.autograd.grad(loss_of(batch, rows)[0], parameters)
    with torch.no_grad():
        for p, slope in zip(parameters, slopes, strict=True):
            place = tuple(int(i) for i in np.unravel_index(int(slope.abs().argmax()), slope.shape))
            p[place] += 1e-6
            up = loss_of(batch, rows)[0]
            p[place] -= 2e-6
            down = loss_of(batch, rows)[0]
            p[place] += 1e-6
            assert slope[place].item() == pytest.approx((up - down).item() / 2e-6, rel=1e-4, abs=1e-8)


def test_a_step_goes_down_the_clipped_gradient() -> None:
    """The first step of Adam, with the gradient's norm clipped, computed by torch's own."""
    _, batch = random_batch(6)
    twin = torch.nn.Linear(3, 1)
    learner = _Learner(torch.nn.Linear(3, 1), dataclasses.replace(SMALL, max_grad_norm=0.1), None, 1)
    twin.load_state_dict(dict(zip(("weight", "bias"), (p.clone() for p in learner.parameters), strict=True)))
    optimizer = torch.optim.Adam(twin.parameters(), lr=SMALL.learning_rate, eps=1e-5)
    x = batch["obs"][:, :1].float() * torch.tensor([[1.0, 2.0, -1.0]])
    for _ in range(3):
        optimizer.zero_grad()
        twin(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        weight, bias = learner.parameters
        learner.differentiate(torch.nn.functional.linear(x, weight, bias).square().mean())
        learner.step(())
        for ours, theirs in zip(learner.parameters, twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_an_update_learns_from_what_it_says(mode: AutoresetMode, monkeypatch) -> None:
    """What the losses are given, against NumPy, from falls, time-outs and steps that teach nothing.

    Observations by the normalizers of before, advantages of mean 0 and deviation 1, a sample once an epoch.
    """
    env = Target(6)
    env.metadata = {"autoreset_mode": mode}
    agent = PPOAgent(env, dataclasses.replace(SMALL, epochs=3, minibatches=2, gamma=0.9, gae_lambda=0.8))
    rng, r = np.random.default_rng(3), agent._rollout
    for network in (agent.actor, agent.critic):
        network.normalizer.update(torch.from_numpy(rng.normal(1.0, 3.0, (50, 2)).astype(np.float32)))
    for values in vars(r).values():
        values.copy_(
            torch.from_numpy(
                rng.random(values.shape) < 0.3
                if values.dtype == torch.bool
                else rng.normal(size=values.shape)
            )
        )
    r.terminated &= r.done
    if mode == AutoresetMode.SAME_STEP:
        r.valid.fill_(True)
    with torch.no_grad():
        v, nv = agent.critic(r.critic_obs).double().numpy(), agent.critic(r.next_critic_obs).double().numpy()
    rewards, done = r.rewards.double().numpy(), r.done.numpy()
    delta = rewards + 0.9 * nv * ~r.terminated.numpy() - v
    advantages = np.zeros_like(delta)
    for t in reversed(range(8)):
        after = advantages[t + 1] if t < 7 else 0.0
        advantages[t] = delta[t] + 0.9 * 0.8 * ~done[t] * after
    keep = r.valid.numpy()
    a = advantages[keep]
    expected = {"returns": a + v[keep], "values": v[keep], "advantages": (a - a.mean()) / a.std(ddof=1)}
    for name, network in (("obs", agent.actor), ("critic_obs", agent.critic)):
        mean, variance = network.normalizer.mean.numpy(), network.normalizer.variance.numpy()
        expected[name] = (getattr(r, name).numpy()[keep] - mean) / np.sqrt(variance + 1e-5)
    given: dict[str, list] = {"actor": [], "critic": []}
    for which, calls in given.items():
        monkeypatch.setattr(agent, f"_{which}_gradients", lambda *args, calls=calls: calls.append(args))
    before = agent.actor.normalizer.mean.clone()
    agent.update(r)
    assert not torch.equal(agent.actor.normalizer.mean, before)
    for calls in given.values():
        ((batch, minibatches),) = calls
        for name, values in expected.items():
            np.testing.assert_allclose(batch[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        assert len(minibatches) == 6
        for epoch in (minibatches[:2], minibatches[2:4], minibatches[4:]):
            assert torch.cat(epoch).sort().values.tolist() == list(range(keep.sum()))
            assert abs(len(epoch[0]) - len(epoch[1])) <= 1
    assert not torch.equal(minibatches[0], minibatches[2])


def test_an_update_begins_at_a_ratio_of_one(monkeypatch) -> None:
    """After normalizers and networks have moved: the actions are judged by the policy that drew them."""
    agent = PPOAgent(Target(), dataclasses.replace(SMALL, learning_rate=0.01))
    agent.train(3)
    loss_of, logs = agent._actor_loss, []

    def noting(batch, rows):
        loss, log = loss_of(batch, rows)
        logs.append(log)
        return loss, log

    monkeypatch.setattr(agent, "_actor_loss", noting)
    agent.train(1)
    first, last = (log[2:] for log in (logs[0], logs[-1]))  # KL and clip fraction
    assert first[0].abs() < 1e-9 and first[1] == 0.0
    assert last[0] > 1e-4


def test_one_skipped_gradient_leaves_the_log_finite(monkeypatch) -> None:
    """The means are those of the steps that were taken."""
    agent = PPOAgent(Target(), dataclasses.replace(SMALL, target_kl=1e3))
    loss_of, calls, kls = agent._actor_loss, [], []

    def once(batch, rows):
        loss, log = loss_of(batch, rows)
        calls.append(None)
        kls.append(log[2].item())
        return (loss * np.nan, log) if len(calls) == 2 else (loss, log)

    monkeypatch.setattr(agent, "_actor_loss", once)
    logs: list[dict[str, float]] = []
    agent.train(2, logs.append)
    assert logs[1]["learning/skipped_updates"] == 1
    assert all(np.isfinite(value) for value in logs[1].values())
    assert logs[1]["learning/approx_kl"] == pytest.approx(np.mean([kls[0], *kls[2:]]), rel=1e-4)
    assert logs[1]["learning/learning_rate"] == pytest.approx(1.5 * SMALL.learning_rate)


def test_an_interrupted_rollout_spoils_nothing(monkeypatch) -> None:
    agent = PPOAgent(Target(), SMALL)
    step, calls = agent._step, []

    def interrupted() -> None:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(agent, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        agent.train(1)
    env = agent.env
    first = torch.from_numpy(env._obs.copy())  # type: ignore[attr-defined]
    assert torch.equal(agent.collect_rollouts().obs[0], first)


def test_an_evaluation_is_no_way_back_to_the_first_episode() -> None:
    """Of an environment without ``state_dict``: what follows is new, and the same in every run."""

    def begins() -> list[np.ndarray]:
        env = gymnasium.make_vec("Pendulum-v1", 2, "sync")
        agent = PPOAgent(env, dataclasses.replace(SMALL, horizon=200, minibatches=1))
        found = []
        for _ in range(3):
            agent.train(1)
            found.append(agent._rollout.obs[0].numpy().copy())
            agent.evaluate(2)
        return found

    a, b = begins(), begins()
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(np.array_equal(a[i], a[i + 1]) for i in range(2))


def test_a_final_observation_counts_where_an_episode_ended() -> None:
    """Also where all rows of it are numbers, and a mask says which are meant."""

    class Masked(Target):
        def step(self, actions):
            obs, rewards, done, never, _ = super().step(actions)
            done[1:] = False
            final = np.where(done[:, None], 7.0, 0.0).astype(np.float32)
            return obs, rewards, done, never, {"final_obs": final, "_final_obs": done}

    rollout = PPOAgent(Masked(), SMALL).collect_rollouts()
    assert (rollout.next_critic_obs[:, 0] == 7.0).all()
    assert torch.equal(rollout.next_critic_obs[:-1, 1:], rollout.critic_obs[1:, 1:])


def test_a_bad_gradient_is_skipped_and_counted() -> None:
    """One minibatch a network: its gradient is not finite, its parameters stay as they were."""
    agent = PPOAgent(Target(), dataclasses.replace(SMALL, epochs=1, minibatches=1))
    rollout = agent.collect_rollouts()
    parameters = [*agent.actor.parameters(), *agent.critic.parameters()]
    before = [p.clone() for p in parameters]
    rollout.rewards[0, 0] = float("inf")
    agent.update(rollout)
    assert agent._read_log()["learning/skipped_updates"] == 2
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old)
    rollout = agent.collect_rollouts()
    agent.update(rollout)
    assert not torch.equal(agent.actor.mlp[0].weight, before[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
@pytest.mark.parametrize("where", ["reward", "observation", "final"])
def test_a_faulty_world_is_ended_counted_and_alone(bad: float, where: str) -> None:
    """Of anybody's environment: nothing that is not finite reaches networks, normalizers or the log."""

    class Faulty(Target):
        def step(self, actions):
            obs, rewards, terminated, truncated, _ = super().step(actions)
            terminated[:] = False
            obs, final = obs.copy(), obs.copy()
            {"reward": rewards, "observation": obs, "final": final}[where][3] = bad
            return obs, rewards, terminated, truncated, {"final_obs": final}

    agent = PPOAgent(Faulty(), SMALL)
    logs: list[dict[str, float]] = []
    rollout = agent.collect_rollouts()
    others = torch.arange(64) != 3
    assert rollout.terminated[:, 3].all()
    assert not rollout.done[:, others].any()
    assert (rollout.rewards[:, 3] == 0.0).all()
    assert (rollout.rewards[:, others] != 0.0).all()
    agent.train(2, logs.append)
    assert logs[1]["task/faulty_steps"] == SMALL.horizon
    assert logs[1]["learning/skipped_updates"] == 0
    assert all(np.isfinite(value) for log in logs for value in log.values())
    assert torch.isfinite(agent.actor.normalizer.variance).all()
    if where == "observation":  # what replaces it is what the normalizer expects
        mean = agent.actor.normalizer.mean.clone()
        assert torch.allclose(agent.collect_rollouts().obs[1:, 3], mean)


@pytest.mark.parametrize(("target", "direction"), [(1e-9, -1), (1e3, 1), (0.0, 0)])
def test_the_rate_follows_the_divergence(target: float, direction: int) -> None:
    agent = PPOAgent(Target(), dataclasses.replace(SMALL, target_kl=target))
    logs: list[dict[str, float]] = []
    agent.train(4, logs.append)
    rates = [log["learning/learning_rate"] for log in logs[1:]]
    assert rates[0] == pytest.approx(SMALL.learning_rate * 1.5**direction)
    assert np.sign(np.diff(rates)).tolist() == [direction] * 2
    assert agent._critic_learner.rate == agent._actor_learner.rate


def test_an_adaptive_rate_stays_cautious() -> None:
    """After a divergence its bounds are lower too, or it would come back at once; a checkpoint says so."""
    agent = PPOAgent(Target(), dataclasses.replace(SMALL, target_kl=1e-9))
    agent.scale_rate(2.0**-10)
    agent.train(6)
    assert agent._actor_learner.rate < 1e-5
    other = PPOAgent(Target(), dataclasses.replace(SMALL, target_kl=1e-9))
    other.load_state_dict(agent.state_dict())
    assert other.caution == 2.0**-10
    assert other._actor_learner.rate == agent._actor_learner.rate


def test_a_log_of_several_iterations_is_their_mean() -> None:
    one, two = [], []
    PPOAgent(Target(), SMALL).train(4, one.append)
    PPOAgent(Target(), SMALL).train(4, two.append, log_interval=2)
    assert len(two) == 2
    for name in ("reward/mean", "learning/value_loss", "learning/std"):
        assert two[1][name] == pytest.approx((one[2][name] + one[3][name]) / 2, rel=1e-5)
    assert two[1]["learning/skipped_updates"] == 0


def state_bytes(agent: PPOAgent) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def walk(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    for part in (
        agent.actor.state_dict(),
        agent.critic.state_dict(),
        agent._actor_learner.optimizer.state_dict(),
        agent._critic_learner.optimizer.state_dict(),
        agent._generator.get_state(),
        agent.env.state_dict(),
        agent._now,
    ):
        walk(part)
    return found


def test_n_plus_n_equals_2n_bit_for_bit(tmp_path) -> None:
    """4 iterations at once, and 2, a checkpoint, a new process's worth of objects, 2 more."""

    def agent(seed: int) -> PPOAgent:
        return PPOAgent(make_env(8, max_episode_length=20), SMALL, seed=seed)

    whole = agent(1)
    logs: list[dict[str, float]] = []
    whole.train(4, lambda log: logs.append(log))
    first = agent(1)
    first.train(2)
    first.save_checkpoint(tmp_path / "c.pt", note="plain data")
    second = agent(7)
    second.load_checkpoint(tmp_path / "c.pt")
    again: list[dict[str, float]] = []
    second.train(2, lambda log: again.append(log))
    assert (second.iteration, second.total_steps, second.seed) == (4, whole.total_steps, 1)
    for a, b in zip(state_bytes(whole), state_bytes(second), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(logs[2:], again, strict=True):
        assert {k: v for k, v in a.items() if "time/" not in k} == {
            k: v for k, v in b.items() if "time/" not in k
        }


def test_a_state_is_loaded_whole_or_not_at_all_and_stays_the_callers(monkeypatch) -> None:
    agent = PPOAgent(make_env(8, max_episode_length=20), SMALL, seed=1)
    agent.train(2)
    state = agent.state_dict()
    kept = checkpoint.pack(state)
    ends = []
    for _ in range(2):  # the same state twice: the same course twice
        other = PPOAgent(make_env(8, max_episode_length=20), SMALL)
        other.load_state_dict(state)
        other.train(2)
        ends.append(state_bytes(other))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert checkpoint.pack(state) == kept
    now, before = agent._now, [x.clone() for x in state_bytes(agent)]
    alien = {**state, "resume": {**state["resume"], "generator": torch.zeros(16, dtype=torch.uint8)}}
    with pytest.raises(ValueError, match="another kind of device"):
        agent.load_state_dict(alien)
    with pytest.raises(ValueError, match="num_envs"):
        agent.load_state_dict(PPOAgent(make_env(4), SMALL).state_dict())
    assert agent._now is now
    assert all(torch.equal(a, b) for a, b in zip(before, state_bytes(agent), strict=True))


def test_symmetric_networks_stay_symmetric_through_training() -> None:
    env = make_env(8)
    agent = PPOAgent(env, SMALL)
    agent.train(4)
    obs, info = env.reset(seed=3)
    for network, x, out, key in (
        (agent.actor, obs, env.mirror["action"], "obs"),
        (agent.critic, info["critic_obs"], None, "critic_obs"),
    ):
        index, sign = env.mirror[key]
        with torch.no_grad():
            value, image = network(x), network(sign * x[:, index])
        expected = out[1] * value[:, out[0]] if out else value
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-4)
        flat = torch.nn.utils.parameters_to_vector(network.parameters())
        learner = agent._actor_learner if key == "obs" else agent._critic_learner
        assert learner.mirror
        assert torch.equal(project(flat, learner.mirror), flat)


class TestBadInput:
    def test_spaces(self) -> None:
        env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])
        with pytest.raises(TypeError, match=r"action space Discrete.*it learns continuous actions"):
            PPOAgent(env, SMALL)
        with pytest.raises(TypeError, match=r"PPOAgent learns from a VectorEnv; gymnasium\.make_vec"):
            PPOAgent(gymnasium.make("Pendulum-v1"), SMALL)  # type: ignore[arg-type]
        named = Target()
        named.single_observation_space = gymnasium.spaces.Dict({"a": named.single_observation_space})
        with pytest.raises(TypeError, match=r"observation space Dict.*FlattenObservation"):
            PPOAgent(named, SMALL)

    @pytest.mark.parametrize("name", ["reward", "terminated", "truncated"])
    def test_shapes_that_would_broadcast(self, name: str) -> None:
        class Short(Target):
            def step(self, actions):
                obs, *parts, info = super().step(actions)
                i = ("reward", "terminated", "truncated").index(name)
                parts[i] = parts[i][:1]
                return obs, *parts, info

        with pytest.raises(ValueError, match=rf"{name} of shape \(1,\): expected \(64,\)"):
            PPOAgent(Short(), SMALL).train(1)

    def test_a_critic_needs_its_own_last_observation(self) -> None:
        class Half(Target):
            def step(self, actions):
                *result, info = super().step(actions)
                return *result, {**info, "critic_obs": result[0]}

        with pytest.raises(ValueError, match="final_critic_obs"):
            PPOAgent(Half(), SMALL).train(1)

    def test_minibatches(self) -> None:
        with pytest.raises(ValueError, match=r"minibatches=5: must divide .* 8 x 64 = 512"):
            PPOAgent(Target(), dataclasses.replace(SMALL, minibatches=5))

    def test_squash_needs_bounds(self) -> None:
        with pytest.raises(ValueError, match="no bounds"):
            PPOAgent(Target(limit=np.inf), dataclasses.replace(SMALL, squash=True))

    def test_odd_hidden_size(self) -> None:
        with pytest.raises(ValueError, match="hidden size 15"):
            PPOAgent(make_env(8), dataclasses.replace(SMALL, actor_hidden=(15,)))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"learning_rate": 0.0}, "learning_rate=0.0"),
            ({"gamma": 1.1}, "gamma=1.1"),
            ({"entropy_weight": -1.0}, "entropy_weight=-1.0"),
            ({"target_kl": 0.01, "epochs": 1, "minibatches": 1}, "more than one gradient step"),
            ({"actor_hidden": (0,)}, "actor_hidden"),
            ({"activation": "gelu"}, "activation='gelu'"),
        ],
    )
    def test_configuration(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PPOConfig(**changes)

    def test_checkpoints(self, tmp_path) -> None:
        agent = PPOAgent(make_env(8), SMALL)
        path = tmp_path / "c.pt"
        with pytest.raises(FileNotFoundError, match=r"c\.pt: no such file"):
            agent.load_checkpoint(path)
        path.write_bytes(b"PK\x03\x04 not a checkpoint")
        with pytest.raises(ValueError, match="damaged"):
            agent.load_checkpoint(path)
        torch.save({"a": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="not written by Kouros"):
            agent.load_checkpoint(path)
        torch.save({"kouros_format": 99}, path)
        with pytest.raises(ValueError, match="format 99"):
            agent.load_checkpoint(path)
        checkpoint.save(path, agent.policy_state())
        with pytest.raises(ValueError, match="holds a policy only"):
            agent.load_checkpoint(path)
        agent.train(1)
        agent.save_checkpoint(path)
        other = PPOAgent(make_env(8), dataclasses.replace(SMALL, actor_hidden=(32,)))
        with pytest.raises(ValueError, match=r"actor_hidden=\(16, 8\) there, \(32,\) here"):
            other.load_checkpoint(path)
        with pytest.raises(ValueError, match="num_envs"):
            PPOAgent(make_env(4), SMALL).load_checkpoint(path)

    def test_a_pickle_is_not_run(self, tmp_path) -> None:
        """Loading a stranger's file executes nothing."""

        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "owned"), "w"))

        torch.save({"kouros_format": 1, "x": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
            checkpoint.load(tmp_path / "evil.pt")
        assert not (tmp_path / "owned").exists()
