"""The environment's laws: what it returns, what a mask touches, what mirrors, what ends an episode."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from conftest import make_env, random_actions
from kouros.envs.config import (
    CurriculumConfig,
    HumanoidEnvConfig,
    RandomizationConfig,
    TerrainConfig,
    randomization,
)
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.observations import OBSERVATIONS
from kouros.envs.rewards import REWARDS, reward
from kouros.physics.rotations import rotate_inverse


def test_spaces_match_what_is_returned() -> None:
    env = make_env()
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, info = env.reset(seed=1)
    for _ in range(3):
        assert env.observation_space.contains(obs.numpy())
        assert info["critic_obs"].shape == (8, *env.critic_observation_space.shape)
        obs, rewards, terminated, truncated, info = env.step(torch.zeros(env.action_space.shape))
        assert rewards.shape == terminated.shape == truncated.shape == (8,)
        assert rewards.dtype == torch.float32
        assert terminated.dtype == truncated.dtype == torch.bool
        assert info["height"].shape == info["forward_velocity"].shape == (8,)
        assert info["metrics"].shape == (len(env.metric_names), 8)
    sizes = [OBSERVATIONS[n].compute(env).shape[1] for n in env.config.actor_observations]
    assert env.single_observation_space.shape == (sum(sizes),)
    assert env.action_space.contains(env.action_space.sample())


def test_observation_is_its_terms_in_order_from_sensors() -> None:
    """Against MuJoCo's own sensors on a state that moves: gyro, orientation, joints."""
    env = make_env(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        obs, *_ = env.step(random_actions(env, generator))
    sim = env.simulation
    sim.forward()
    quat = sim.sensor("imu_orientation")
    down = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand(4, 3)
    parts = obs.split([3, 3, 3, 2, 29, 29, 29], dim=1)
    expected = (
        sim.sensor("imu_gyro"),
        rotate_inverse(quat, down),
        env.command,
        None,
        sim.qpos[:, 7:] - torch.tensor(env.robot.default_joint_pos),
        sim.qvel[:, 6:],
        env.action,
    )
    for part, value in zip(parts, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(part, value.float(), atol=1e-5, rtol=1e-5)
    velocity = OBSERVATIONS["base_lin_vel"].compute(env)
    # The IMU sits 5 cm off the base's origin: its velocity is v + w x r.
    offset = torch.tensor(sim.model.site("imu_in_pelvis").pos).expand(4, 3)
    at_imu = velocity + torch.linalg.cross(parts[0].double(), offset)
    torch.testing.assert_close(
        at_imu.float(), sim.sensor("imu_linear_velocity").float(), atol=1e-5, rtol=1e-4
    )


def mirrored(x: torch.Tensor, rule: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    index, sign = rule
    return sign * x[:, index]


@pytest.mark.parametrize("task", ["walk", "stand"])
def test_a_mirrored_world_gives_mirrored_observations_and_equal_rewards(task: str) -> None:
    """World 1 is put into the mirror image of world 0 and both are driven by mirrored actions."""
    env = make_env(2, task=task, harness=0.5)
    sim = env.simulation
    if env.poses:
        for tensor, away in ((env.poses.pose, 0.0), (env.poses.goal, 0.1)):
            tensor[:1] += away
            tensor[1:] = mirrored(tensor[:1], env.mirror["action"])
    flip = torch.tensor([1.0, -1, 1, 1, -1, 1, -1], dtype=torch.float64)
    joints = (env.mirror["action"][0], env.mirror["action"][1].double())
    sim.qpos[1, :7] = flip * sim.qpos[0, :7]
    sim.qpos[1, 7:] = mirrored(sim.qpos[:1, 7:], joints)
    sim.qvel[1, :3] = torch.tensor([1.0, -1, 1]) * sim.qvel[0, :3]
    sim.qvel[1, 3:6] = torch.tensor([-1.0, 1, -1]) * sim.qvel[0, 3:6]
    sim.qvel[1, 6:] = mirrored(sim.qvel[:1, 6:], joints)
    env.set_command(torch.tensor([[0.4, 0.2, 0.3], [0.4, -0.2, -0.3]]))
    env.phase[:] = torch.tensor([0.1, 0.6])
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        action = 0.3 * torch.randn(1, 29, generator=generator)
        both = torch.cat((action, mirrored(action, env.mirror["action"])))
        obs, rewards, _, _, info = env.step(both)
        for name, values in (("obs", obs), ("critic_obs", info["critic_obs"])):
            image = mirrored(values[:1], env.mirror[name])
            # The published figures themselves differ a little from side to side.
            torch.testing.assert_close(image, values[1:], atol=2e-2, rtol=2e-2)
        assert abs(rewards[0] - rewards[1]) < 2e-3
    assert obs.abs().max() > 0.5


@pytest.mark.parametrize("task", ["walk", "stand"])
def test_partial_reset_touches_only_its_rows(task: str) -> None:
    env = make_env(6, task=task, randomization=randomization("sim2real"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        env.step(random_actions(env, generator, 0.1))

    def per_world() -> dict[str, torch.Tensor]:
        state = env.state_dict()
        parts = state | state["randomization"] | state["actuators"] | state["poses"]
        found = {name: x for name, x in parts.items() if isinstance(x, torch.Tensor) and x.dim()}
        ages = {name: found.pop(name).transpose(0, 1) for name in ("frames", "targets")}
        del found["generator"]
        return found | ages

    before = per_world()
    state = env.simulation.state_dict()["state"]
    mask = torch.tensor([False, True, False, False, True, False])
    obs, _ = env.reset(options={"reset_mask": mask})
    after = per_world()
    for name, values in before.items():
        assert torch.equal(after[name][~mask], values[~mask]), name
    assert torch.equal(env.simulation.state_dict()["state"][~mask], state[~mask])
    assert env.episode_length.tolist() == [7, 0, 7, 7, 0, 7]
    assert (env.action[mask] == 0).all()
    assert obs.shape == env.observation_space.shape


def test_autoreset_returns_the_next_episode_and_keeps_the_last_observation() -> None:
    """World 0 is turned upside down: it falls, alone, and its books close."""
    env = make_env(3)
    env.step(torch.zeros(env.action_space.shape))
    env.simulation.qpos[0, 3:7] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    obs, _, terminated, truncated, info = env.step(torch.zeros(env.action_space.shape))
    assert terminated.tolist() == [True, False, False]
    assert not truncated.any()
    assert info["_episode"].tolist() == [True, False, False]
    assert info["episode"]["l"].tolist() == [2, 0, 0]
    assert info["episode"]["t"][0].item() == pytest.approx(0.04)
    assert info["final_obs"][0, 5] > 0.5  # gravity points out of its head
    assert obs[0, 5] < -0.9
    assert torch.equal(info["final_obs"][1:], obs[1:])
    assert torch.equal(info["final_critic_obs"][1:], info["critic_obs"][1:])
    assert env.episode_length.tolist() == [0, 2, 2]


@pytest.mark.parametrize("task", ["walk", "stand"])
def test_the_last_observation_differs_only_where_an_episode_ended(task: str) -> None:
    """Also in the steps in which commands change."""
    env = make_env(6, task=task, resampling_interval=0.1, max_episode_length=17)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        obs, _, terminated, truncated, info = env.step(random_actions(env, generator, 1.0))
        done = terminated | truncated
        for name, returned in (("final_obs", obs), ("final_critic_obs", info["critic_obs"])):
            assert torch.equal((info[name] != returned).any(-1), done)


def test_time_out_is_not_a_fall() -> None:
    env = make_env(2, max_episode_length=3)
    total = torch.zeros(2)
    for step in range(3):
        _, rewards, terminated, truncated, info = env.step(torch.zeros(env.action_space.shape))
        total += rewards
        assert not terminated.any()
        assert truncated.all() == (step == 2)
    torch.testing.assert_close(info["episode"]["r"], total)
    assert info["episode"]["l"].tolist() == [3, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_a_sick_world_is_reset_counted_and_alone(bad: float) -> None:
    env, healthy = make_env(3), make_env(3)
    action = torch.zeros(env.action_space.shape)
    env.simulation.qvel[1, 8] = bad
    obs, rewards, terminated, _, info = env.step(action)
    expected, *_ = healthy.step(action)
    assert terminated.tolist() == [False, True, False]
    assert rewards[1] == 0
    sick = env.metric_names.index("task/sick_worlds")
    for values in (obs, rewards, info["critic_obs"], info["final_obs"], info["metrics"]):
        assert torch.isfinite(values).all()
    assert torch.equal(obs[[0, 2]], expected[[0, 2]])
    assert info["metrics"][sick].tolist() == [0, 1, 0]
    obs, *_, info = env.step(action)
    assert torch.isfinite(obs).all()
    assert (info["metrics"][sick] == 0).all()


def test_same_seed_same_episodes() -> None:
    one, two, other = make_env(4, seed=5), make_env(4, seed=5), make_env(4, seed=6)
    g1, g2 = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for _ in range(60):
        a, *_ = one.step(random_actions(one, g1))
        b, *_ = two.step(random_actions(two, g2))
    assert torch.equal(a, b)
    assert not torch.equal(one.command, other.command)
    assert (one.harness != other.config.harness).any()
    for _ in range(2):  # wherever it comes from, harness included
        _, info = one.reset(seed=5)
        assert torch.equal(info["critic_obs"], make_env(4, seed=5).reset(seed=5)[1]["critic_obs"])


@pytest.mark.parametrize("task", ["walk", "stand"])
def test_n_plus_n_equals_2n_through_a_state_dict(task: str) -> None:
    changes: dict[str, Any] = {"task": task, "resampling_interval": 0.3}
    env = make_env(4, **changes)
    generator = torch.Generator().manual_seed(0)
    actions = [random_actions(env, generator) for _ in range(80)]
    for action in actions[:40]:
        env.step(action)
    saved = env.state_dict()
    for action in actions[40:]:
        expected = env.step(action)
    again = make_env(4, seed=9, **changes)
    again.load_state_dict(saved)
    for action in actions[40:]:
        found = again.step(action)
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[4]["critic_obs"], expected[4]["critic_obs"])


def test_commands_are_resampled_by_each_worlds_own_clock() -> None:
    env = make_env(2000, resampling_interval=0.1, standing_fraction=0.25)
    low, high = (
        torch.tensor(x)
        for x in zip(*(getattr(env.config, f"command_{axis}") for axis in ("vx", "vy", "yaw")), strict=True)
    )
    standing = (env.command == 0).all(-1)
    assert abs(standing.float().mean() - 0.25) < 0.03
    moving = env.command[~standing]
    assert ((moving >= low) & (moving <= high)).all()
    torch.testing.assert_close(moving.mean(0), (low + high) / 2, atol=0.05, rtol=0)
    env.reset(options={"reset_mask": torch.arange(2000) < 0})
    action = torch.zeros(env.action_space.shape)
    for step in range(1, 11):
        before = env.command.clone()
        _, _, terminated, _, _ = env.step(action)
        changed = (env.command != before).any(-1)
        on_time = (env.episode_length % 5 == 0) & ~terminated
        if step % 5:
            assert not changed[~terminated].any()
        else:
            assert changed[on_time].float().mean() > 0.8


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("position", lambda r, a: r.default_joint_pos + r.action_scale * a),
        ("velocity", lambda r, a: a),
        ("effort", lambda r, a: 0.25 * r.effort_limit * a),
    ],
)
def test_control_modes(mode: str, expected) -> None:
    env = make_env(2, control_mode=mode)
    env.step(torch.full(env.action_space.shape, 0.3))
    np.testing.assert_allclose(env.simulation.ctrl[0], expected(env.robot, 0.3), rtol=1e-6)


def test_actions_are_clipped_to_the_space() -> None:
    env = make_env(2, action_limit=1.0)
    env.step(torch.full(env.action_space.shape, 5.0))
    assert (env.action == 1.0).all()
    assert env.single_action_space.high[0] == 1.0


def test_gait_clock_and_its_observation() -> None:
    """Left and right swing half a cycle apart, for swing_fraction of it, and not when standing."""
    env = make_env(2, gait_period=0.8, swing_fraction=0.4)
    env.coast[:] = 0.0
    env.set_command(torch.tensor([[0.5, 0, 0], [0.0, 0, 0]]))
    env.phase[:] = 0.0
    swings = []
    for _ in range(40):
        env.step(torch.zeros(env.action_space.shape))
        env.set_command(torch.tensor([[0.5, 0, 0], [0.0, 0, 0]]))
        swing, height = env.swing, env.swing_height
        swings.append(swing)
        clock = OBSERVATIONS["gait_phase"].compute(env)
        assert clock[0].norm().item() == pytest.approx(1.0)
        assert (clock[1] == 0).all()
        assert (height[~swing] == 0).all()
        assert (height[swing] > -1e-6).all()
    share = torch.stack(swings).float().mean(0)
    assert share[0].tolist() == pytest.approx([0.4, 0.4], abs=0.03)
    assert (share[1] == 0).all()
    assert not torch.stack(swings).all(-1).any()  # never both at once


def test_a_command_to_stand_leaves_one_cycle_to_come_to_a_halt() -> None:
    env = make_env(1, gait_period=0.8, resampling_interval=1e6)
    env.set_command(torch.tensor([0.5, 0, 0]))
    action = torch.zeros(env.action_space.shape)
    env.step(action)
    env.set_command(torch.zeros(3))
    steps = 0
    while env.moving:
        env.step(action)
        steps += 1
    assert steps in (40, 41)  # 0.8 s at 50 Hz, up to rounding


def test_harness_holds_weakens_and_is_gone() -> None:
    """A limp robot stays up with it and falls without; strength falls with time and rises with falls."""

    def fallen(strength: float) -> int:
        env = make_env(16, harness=strength)
        generator = torch.Generator().manual_seed(0)
        falls = 0
        for _ in range(100):
            _, _, terminated, _, _ = env.step(random_actions(env, generator))
            falls += int(terminated.sum())
        return falls

    assert fallen(1.0) == 0
    assert fallen(0.0) >= 16
    env = make_env(2, harness=1.0)
    env.harness[:] = 0.5
    env.simulation.qpos[0, 3:7] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    env.step(torch.zeros(env.action_space.shape))
    assert env.harness[0] > 0.5 > env.harness[1]
    env = make_env(1, harness=0.0)
    env.step(torch.zeros(env.action_space.shape))
    assert (env.simulation.field("xfrc_applied") == 0).all()


def test_harness_wrench_is_a_spring_towards_upright() -> None:
    """Against mju_quat2Mat: torque = k cross(body z, world z) - d w_xy; force up where low."""
    from kouros.envs import humanoid

    env = make_env(1, harness=1.0)
    sim = env.simulation
    quat = np.array([0.9, 0.2, -0.3, 0.25])
    quat /= np.linalg.norm(quat)
    sim.qpos[0, 3:7] = torch.from_numpy(quat)
    sim.qpos[0, 2] = 0.6
    sim.qvel[0, 3:6] = torch.tensor([0.4, -0.5, 0.6])
    env._refresh()
    env._pull_harness()
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quat)
    matrix = matrix.reshape(3, 3)
    rate = matrix @ [0.4, -0.5, 0.6] * [1, 1, 0]
    torque = humanoid.HARNESS_TORQUE * np.cross(matrix[:, 2], [0, 0, 1]) - humanoid.HARNESS_DAMPING * rate
    force = [0, 0, humanoid.HARNESS_FORCE * (env.config.target_height - 0.6)]
    base = sim.model.body(env.robot.base_body).id
    np.testing.assert_allclose(sim.field("xfrc_applied")[0, base], [*force, *torque], atol=1e-3)


class TestRewards:
    def test_total_is_the_weighted_sum_of_terms(self) -> None:
        env = make_env(4)
        _, rewards, _, _, info = env.step(torch.zeros(env.action_space.shape))
        terms = dict(zip(env.metric_names, info["metrics"], strict=True))
        for name, weight in env.config.rewards.items():
            torch.testing.assert_close(terms[f"reward/{name}"], weight * REWARDS[name](env))
        total = sum(terms[f"reward/{name}"] for name in env.config.rewards)
        torch.testing.assert_close(rewards, total * env.config.control_dt)

    def test_a_user_adds_one_with_a_function_and_a_line(self) -> None:
        @reward
        def forward_speed(env: HumanoidBaseEnv) -> torch.Tensor:
            return env.base_lin_vel_b[:, 0]

        try:
            env = make_env(2, rewards={"forward_speed": 3.0})
            _, rewards, _, _, info = env.step(torch.zeros(env.action_space.shape))
            torch.testing.assert_close(rewards, 3.0 * 0.02 * info["forward_velocity"])
        finally:
            del REWARDS["forward_speed"]

    @pytest.mark.parametrize("name", sorted(REWARDS))
    def test_every_term_is_finite_varies_and_has_one_value_a_world(self, name: str) -> None:
        env = make_env(16)
        generator = torch.Generator().manual_seed(0)
        values = []
        for _ in range(60):
            env.step(random_actions(env, generator, 1.0))
            values.append(REWARDS[name](env))
        stacked = torch.stack(values)
        assert stacked.shape == (60, 16)
        assert torch.isfinite(stacked).all()
        if name != "alive":
            assert stacked.std() > 0

    def test_penalties_know_position_from_velocity(self) -> None:
        """A still robot in an odd pose pays for the pose, not for motion; and the other way round."""
        env = make_env(2)
        env.joint_pos = env.default_joint_pos + torch.tensor([[0.3], [0.0]])
        env.joint_vel = torch.tensor([[0.0], [2.0]]).expand(2, 29)
        assert REWARDS["pose"](env)[0] > 0 == REWARDS["pose"](env)[1]
        assert REWARDS["joint_velocity"](env)[1] > 0 == REWARDS["joint_velocity"](env)[0]

    def test_tracking_is_best_on_target(self) -> None:
        env = make_env(3)
        env.set_command(torch.tensor([0.5, 0.1, 0.2]))
        env.mean_velocity[:] = env.command + torch.tensor([[0.0], [0.2], [1.0]])
        for name in ("track_linear_velocity", "track_yaw_rate"):
            value = REWARDS[name](env)
            assert value[0] == 1.0 > value[1] > value[2]


class TestBadInput:
    def test_actions(self) -> None:
        env = make_env(2)
        with pytest.raises(ValueError, match=r"shape \(2, 28\), expected \(2, 29\)"):
            env.step(torch.zeros(2, 28))
        with pytest.raises(TypeError, match="int64"):
            env.step(torch.zeros(2, 29, dtype=torch.int64))
        with pytest.raises(TypeError, match="float64, expected a float32"):
            env.step(torch.zeros(2, 29, dtype=torch.float64))
        env.step(torch.zeros(2, 29, requires_grad=True))  # the policy's own tensor is welcome
        with pytest.raises(TypeError, match="ndarray"):
            env.step(np.zeros((2, 29), np.float32))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="on meta"):
            env.step(torch.zeros(2, 29, device="meta"))
        action = torch.zeros(2, 29)
        action[1, 4] = float("nan")
        before = env.simulation.qpos.clone()
        with pytest.raises(ValueError, match="not finite in world 1"):
            env.step(action)
        assert torch.equal(env.simulation.qpos, before)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"robot": "g2"}, "robot='g2': choose from g1"),
            ({"rewards": {"track_velocity": 1.0}}, "rewards='track_velocity'"),
            (
                {"actor_observations": ("joint_poss",)},
                "actor_observations='joint_poss'.*'joint_pos'",
            ),
            ({"critic_observations": ("x",)}, "critic_observations='x'"),
            ({"pose_weights": {"tail": 1.0}}, "pose_weights: 'tail' matches no joint"),
            ({"pose_range": {"tail": 1.0}}, "pose_range: 'tail' matches no joint"),
            ({"pose_range": {"elbow": -0.1}}, "pose_range={'elbow': -0.1}: must not be negative"),
            ({"crouch": (0.3, 0.0)}, r"crouch=\(0.3, 0.0\): must be \(lowest, highest\)"),
            ({"pose_speed": 0.0}, "pose_speed=0.0: must be greater than 0"),
            ({"num_envs": 0}, "num_envs=0: must be greater than 0"),
            ({"timestep": -0.005}, "timestep=-0.005"),
            ({"command_vx": (1.0, 0.0)}, r"command_vx=\(1.0, 0.0\): must be \(lowest, highest\)"),
            ({"standing_fraction": 1.5}, "standing_fraction=1.5"),
            ({"harness": 2.0}, "harness=2.0"),
            ({"timestep": math.inf}, "timestep=inf: must be finite"),
            ({"command_vx": (math.nan, 1.0)}, "command_vx=.*: must be finite"),
            ({"rewards": {"alive": math.nan}}, "rewards=.*: must be finite"),
            ({"control_mode": "torque"}, "control_mode='torque'"),
        ],
    )
    def test_configuration(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HumanoidBaseEnv(HumanoidEnvConfig(**{"num_envs": 1, **changes}))

    def test_reset_options(self) -> None:
        env = make_env(2)
        with pytest.raises(ValueError, match=r"reset_mask.*shape \(3,\)"):
            env.reset(options={"reset_mask": torch.zeros(3, dtype=torch.bool)})
        with pytest.raises(ValueError, match="options='mask'"):
            env.reset(options={"mask": None})

    def test_state_of_another_size(self) -> None:
        with pytest.raises(ValueError, match="num_envs"):
            make_env(2).load_state_dict(make_env(3).state_dict())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"randomization": randomization("light")}, "randomization"),
            ({"actuator": "explicit"}, "actuators"),
            ({"crouch": (0.0, 0.3)}, "poses"),
        ],
    )
    def test_state_of_another_robot(self, changes: dict, message: str) -> None:
        """Refused with nothing changed."""
        env, other = make_env(2), make_env(2, seed=1, **changes)
        before = env.simulation.qpos.clone()
        for one, two in ((env, other), (other, env)):
            with pytest.raises(ValueError, match=f"{message}: the state is of another one"):
                one.load_state_dict(two.state_dict())
        assert torch.equal(env.simulation.qpos, before)


# A value for each field that must show in what the environment returns.
OTHER = {
    "terrain": TerrainConfig(types=("rough",), levels=1),
    "num_envs": 5,
    "timestep": 0.004,
    "frame_skip": 3,
    "solver_iterations": 1,
    "collisions": "full",
    "control_mode": "effort",
    "action_scale": 0.5,
    "action_limit": 0.2,
    "max_episode_length": 20,
    "fall_tilt": 0.2,
    "fall_height": 0.7,
    "command_vx": (0.0, 0.1),
    "command_vy": (0.0, 0.1),
    "command_yaw": (-0.1, 0.1),
    "standing_fraction": 0.9,
    "standing_command": 0.8,
    "heading_fraction": 0.0,
    "heading_stiffness": 0.1,
    "resampling_interval": 0.3,
    "pose_range": {"waist": 0.3},
    "crouch": (0.1, 0.2),
    "pose_speed": 0.1,
    "gait_period": 0.5,
    "swing_fraction": 0.3,
    "swing_height": 0.02,
    "actuator": "explicit",
    "randomization": RandomizationConfig(mass=(0.5, 0.5)),
    "curriculum": CurriculumConfig(
        enabled=True,
        terrain_difficulty=(0.0,) * 5,
        push_frequency=(0.0,) * 5,
        mass_variance=(0.0,) * 5,
        friction_variance=(0.0,) * 5,
    ),
    "harness": 0.5,
    "harness_fall_time": 0.1,
    "actor_observations": ("command", "joint_pos"),
    "critic_observations": ("base_height",),
    "wrappers": ("history:2",),
    "rewards": {"alive": 1.0},
    "tracking_sigma": 0.2,
    "tracking_time": 1.0,
    "target_height": 0.8,
    "pose_weights": {"knee": 1.0},
}


def test_a_push_adds_its_speed_and_comes_on_time() -> None:
    pushes = RandomizationConfig(push_velocity=(0.7, 0.7), push_interval=(0.1, 0.3))
    env = make_env(32, randomization=pushes, harness=0.0)
    twin = make_env(32, harness=0.0)
    waits: list[float] = []
    for _ in range(30):
        twin.simulation.load_state_dict(env.simulation.state_dict())
        due = (env.until_push <= env.config.control_dt + 1e-6).clone()
        action = torch.zeros(32, 29)
        *_, terminated, truncated, _ = env.step(action)
        twin.step(action)
        going_on = ~(terminated | truncated)
        change = env.simulation.qvel[:, :2] - twin.simulation.qvel[:, :2]
        expected = torch.where(due, 0.7, 0.0).double()
        torch.testing.assert_close(change.norm(dim=-1)[going_on], expected[going_on])
        torch.testing.assert_close(env.base_lin_vel_w[:, :2].double(), env.simulation.qvel[:, :2])
        waits += env.until_push[due & going_on].tolist()
    assert len(waits) > 32 and 0.1 <= min(waits) < 0.12 and 0.28 < max(waits) <= 0.3


# One robot so far; no random action drives a joint as fast as torque_speed needs (test_randomization does);
# MuJoCo C is bit-equal at any number of threads (test_physics), the engines agree (test_warp), a graph is
# of a GPU; and the first point of a line search is good enough for a robot that does not break.
WITHOUT_EFFECT = {"robot", "torque_speed", "num_threads", "engine", "graph", "line_search_iterations"}


def trace(**changes: object) -> list[torch.Tensor]:
    """What an environment returns in 60 steps of random actions, episodes ending both ways."""
    base: dict[str, Any] = {"num_envs": 6, "max_episode_length": 45, "resampling_interval": 0.2}
    base |= {"heading_fraction": 0.5, "pose_range": {"elbow": 0.3}}
    env = make_env(**{**base, **changes})
    generator = torch.Generator().manual_seed(0)
    steps = [env.step(random_actions(env, generator, 1.0)) for _ in range(60)]
    returned = [torch.stack([s[i] for s in steps]).float() for i in range(4)]
    return returned + [torch.stack([s[4][key] for s in steps]) for key in ("critic_obs", "metrics")]


def test_every_field_has_an_effect_and_a_line_of_help() -> None:
    import inspect

    source = inspect.getsource(HumanoidEnvConfig)
    fields = {field.name for field in dataclasses.fields(HumanoidEnvConfig)}
    assert fields == set(OTHER) | WITHOUT_EFFECT
    for name in fields:
        after = source.split(f"\n    {name}: ", 1)[1].split('\n    """', 1)
        assert len(after) == 2
        assert "\n\n" not in after[0]
    assert make_env(1, line_search_iterations=7).simulation.model.opt.ls_iterations == 7
    expected = trace()
    assert all(torch.equal(a, b) for a, b in zip(expected, trace(), strict=True))
    for name, value in OTHER.items():
        found = trace(**{name: value})
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not same, f"{name}={value!r} changes nothing"
