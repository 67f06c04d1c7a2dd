"""What only a GPU can show: recorded steps equal the same lines one by one. Skipped where there is none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kouros.envs.config import HumanoidEnvConfig, randomization
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.rewards import REWARDS
from kouros.envs.wrappers import make_env
from kouros.learning.config import PPOConfig
from kouros.learning.networks import log_prob
from kouros.learning.ppo import PPOAgent
from kouros.physics.simulation import make_simulation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

CONFIG = HumanoidEnvConfig(
    num_envs=64,
    max_episode_length=15,
    resampling_interval=0.1,
    randomization=dataclasses.replace(randomization("sim2real"), push_interval=(0.05, 0.2)),
)
PPO = PPOConfig(horizon=8, epochs=2, minibatches=2)


ROWS = ("critic_obs", "final_critic_obs", "height", "forward_velocity")
PUBLIC = ("projected_gravity", "velocity", "mean_velocity", "swing_height", "foot_contact", "base_lin_vel_b")


def public(*envs: HumanoidBaseEnv):
    """The tensors that terms are made of, after a replay and after the same lines."""
    return (tuple(getattr(env, name) for env in envs) for name in PUBLIC)


def pair() -> list[HumanoidBaseEnv]:
    """The same environment recorded and not."""
    return [HumanoidBaseEnv(dataclasses.replace(CONFIG, graph=graph), "cuda") for graph in (True, False)]


def test_a_recorded_step_gives_the_same_numbers() -> None:
    recorded, eager = pair()
    recorded.reset(seed=0)
    eager.reset(seed=0)
    generator = torch.Generator("cuda").manual_seed(0)
    rubbish = []
    for step in range(25):
        actions = 0.5 * torch.randn(64, 29, generator=generator, device="cuda")
        # From the same states: contacts come in another order each time, and rounding differs.
        eager.simulation.load_state_dict(recorded.simulation.state_dict())
        eager._refresh()
        a, b = recorded.step(actions), eager.step(actions)
        for x, y in zip(a[2:4], b[2:4], strict=True):
            assert torch.equal(x, y), step
        for x, y in (
            *zip(a[:2], b[:2], strict=True),
            *((a[4][k], b[4][k]) for k in ROWS),
            *public(recorded, eager),
        ):
            close = (x - y).abs().reshape(64, -1).amax(-1) < 1e-2
            assert close.float().mean() > 0.95, step
        torch.testing.assert_close(
            a[4]["metrics"].median(1)[0], b[4]["metrics"].median(1)[0], atol=1e-2, rtol=0.01
        )
        torch.testing.assert_close(recorded.command, eager.command)
        torch.testing.assert_close(recorded.phase, eager.phase)
        assert torch.equal(recorded.episode_length, eager.episode_length)
        # Memory that torch thinks is free is written over: the recording's must not be among it.
        rubbish = [torch.full((2**k,), torch.nan, device="cuda") for k in range(4, 22)]
        if step == 10:
            for env in (recorded, eager):
                env.reset(options={"reset_mask": torch.arange(64, device="cuda") < 5})
    del rubbish
    assert torch.isfinite(a[0]).all()


def test_returned_tensors_are_the_callers() -> None:
    env, _ = pair()
    env.reset(seed=0)
    first = env.step(torch.zeros(64, 29, device="cuda"))[0]
    kept = first.clone()
    env.step(torch.ones(64, 29, device="cuda"))
    assert torch.equal(first, kept)


def test_recorded_learning_learns_the_same() -> None:
    """One iteration each, from the same rollout: the parameters after a recorded update and an eager one."""
    agents = [PPOAgent(env, dataclasses.replace(PPO, graph=env.config.graph), seed=3) for env in pair()]
    for agent in agents:
        agent.train(2)
    a, b = agents
    for name, values in vars(a._rollout).items():
        getattr(b._rollout, name).copy_(values)
    b.actor.load_state_dict(a.actor.state_dict())
    b.critic.load_state_dict(a.critic.state_dict())
    for ours, theirs in ((a._actor_learner, b._actor_learner), (a._critic_learner, b._critic_learner)):
        for x, y in zip(ours.tensors(), theirs.tensors(), strict=True):
            y.detach().copy_(x)
    b._generator.set_state(a._generator.get_state())
    for agent in agents:
        agent.update(agent._rollout)
    for x, y in zip(a.actor.parameters(), b.actor.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
    for x, y in zip(a.critic.parameters(), b.critic.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
    log, log_b = a._read_log(), b._read_log()
    assert log["learning/approx_kl"] == pytest.approx(log_b["learning/approx_kl"], rel=0.05)


def test_a_recorded_rollout_is_one() -> None:
    agent = PPOAgent(pair()[0], PPO)
    agent.train(3)  # the next rollout has the end of the second episode in it
    r = agent.collect_rollouts()
    with torch.no_grad():
        expected = log_prob(r.actions, agent.actor(r.obs), agent.actor.log_std)
    torch.testing.assert_close(r.log_probs, expected, atol=0.1, rtol=0)  # TF32
    going_on = ~r.done[:-1]
    assert torch.equal(r.critic_obs[1:][going_on], r.next_critic_obs[:-1][going_on])
    assert not torch.equal(r.critic_obs[1:][~going_on], r.next_critic_obs[:-1][~going_on])
    assert not torch.equal(r.actions[0], r.actions[1])


def test_a_term_that_needs_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "alive", lambda env: env.phase * env.phase.sum().item())
    with pytest.raises(RuntimeError, match="cannot record this"):
        pair()[0].step(torch.zeros(64, 29, device="cuda"))


def test_a_run_goes_on_from_a_checkpoint(tmp_path) -> None:
    env = HumanoidBaseEnv(CONFIG, "cuda")
    agent = PPOAgent(env, PPO)
    agent.train(3)
    agent.save_checkpoint(tmp_path / "c.pt")
    agent.train(1)
    other = PPOAgent(HumanoidBaseEnv(CONFIG, "cuda"), PPO, seed=5)
    other.train(2)
    other.load_checkpoint(tmp_path / "c.pt")
    logs: list[dict[str, float]] = []
    other.train(2, logs.append)
    assert (other.iteration, other.total_steps) == (5, 5 * agent.samples)
    assert all(np.isfinite(list(log.values())).all() for log in logs)


def test_training_waits_only_for_its_log() -> None:
    agent = PPOAgent(HumanoidBaseEnv(CONFIG, "cuda"), PPO)
    agent.train(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            agent.update(agent.collect_rollouts())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stack_of_wrappers_is_recorded_with_the_step() -> None:
    """Nothing in it waits, and after a replay the public tensors are those of the replay."""
    stack = ("kinematic:velocity", "history:3", "normalize")
    env = make_env(dataclasses.replace(CONFIG, wrappers=stack), "cuda")
    agent = PPOAgent(env, PPO)
    agent.train(2)
    env.step(torch.zeros(64, 29, device="cuda"))  # rebinds them
    count = env.count.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.collect_rollouts()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert agent._now is not None
    assert torch.equal(env.base_lin_vel_b, agent._now["critic_obs"][:, -3:])
    assert env.count == count + agent.samples


def test_a_sick_world_is_reset_and_counted_on_the_device() -> None:
    env, _ = pair()
    env.reset(seed=0)
    env.step(torch.zeros(64, 29, device="cuda"))
    env.simulation.qvel[2] = torch.nan
    obs, _, terminated, _, info = env.step(torch.zeros(64, 29, device="cuda"))
    assert bool(terminated[2])
    assert info["metrics"][env.metric_names.index("task/sick_worlds")].sum() == 1
    assert torch.isfinite(obs).all()


def test_too_many_worlds_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"num_envs=100000000: a world takes .* use at most \d+"):
        HumanoidBaseEnv(dataclasses.replace(CONFIG, num_envs=100_000_000), "cuda")
    with pytest.raises(RuntimeError, match="cuda:9"):
        make_simulation(HumanoidBaseEnv(CONFIG).simulation.model, 1, "cuda:9")


def test_model_fields_come_before_the_recording() -> None:
    env, _ = pair()
    env.step(torch.zeros(64, 29, device="cuda"))
    with pytest.raises(RuntimeError, match="before a graph"):
        env.simulation.model_field("jnt_stiffness")
