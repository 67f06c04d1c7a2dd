"""The commands' laws: what is drawn, what a mask touches, where a heading turns the robot."""

from __future__ import annotations

import cmath
import contextlib
import math

import mujoco
import numpy as np
import pytest
import torch

from conftest import make_env
from kouros.envs.commands import PoseCommands, VelocityCommands
from kouros.envs.config import HumanoidEnvConfig, RandomizationConfig
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.envs.observations import OBSERVATIONS
from kouros.envs.rewards import REWARDS
from kouros.envs.scene import make_model
from kouros.physics.rotations import quat_from_yaw, yaw_of
from kouros.robots.robot import Robot
from test_warp import NoHost

STATE = ("command", "ordered", "heading", "turning")


def make_commands(n: int = 64, seed: int = 0, **config: object) -> VelocityCommands:
    return VelocityCommands(
        HumanoidEnvConfig(num_envs=n, **config),  # type: ignore[arg-type]
        torch.Generator().manual_seed(seed),
    )


def yaws(n: int, seed: int = 1) -> torch.Tensor:
    return (2.0 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 1.0) * math.pi


def everyone(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


def turn_rate(config: HumanoidEnvConfig, heading: float, yaw: float, speed: float = 1.0) -> float:
    """By complex numbers: the angle between two directions is the shorter way round."""
    left = cmath.phase(cmath.exp(1j * heading) / cmath.exp(1j * yaw))
    low, high = config.command_yaw
    return min(max(config.heading_stiffness * left, low * speed), high * speed)


@pytest.mark.parametrize("heading_fraction", [0.0, 0.4])
@pytest.mark.parametrize("speed", [1.0, 0.3, 0.0])
def test_a_draw_is_what_a_loop_makes_of_the_same_numbers(heading_fraction: float, speed: float) -> None:
    n = 300
    commands = make_commands(n, heading_fraction=heading_fraction, standing_command=0.2)
    commands.speed.fill_(speed)
    config, yaw = commands.config, yaws(n)
    commands.resample(everyone(n), quat_from_yaw(yaw))
    numbers = torch.rand(n, 6 if heading_fraction else 4, generator=torch.Generator().manual_seed(0)).tolist()
    bounds = (config.command_vx, config.command_vy, config.command_yaw)
    for world, row in enumerate(numbers):
        expected = [speed * (low + (high - low) * x) for (low, high), x in zip(bounds, row[:3], strict=True)]
        standing = row[3] < config.standing_fraction
        turning = not standing and heading_fraction > 0 and row[4] < heading_fraction
        if turning:
            heading = (2.0 * row[5] - 1.0) * math.pi
            expected[2] = turn_rate(config, heading, yaw[world].item(), speed)
        if standing or math.hypot(*expected) <= config.standing_command:
            expected = [0.0, 0.0, 0.0]
        np.testing.assert_allclose(commands.command[world], expected, atol=2e-6)
        assert commands.turning[world] == turning
        assert commands.ordered[world] == any(expected)


def test_shares_bounds_and_the_deadband() -> None:
    n = 20_000
    commands = make_commands(n, heading_fraction=0.5, standing_fraction=0.3, standing_command=0.25)
    config = commands.config
    commands.resample(everyone(n), quat_from_yaw(yaws(n)))
    size = commands.command.norm(dim=-1)
    assert ((size == 0) | (size > config.standing_command)).all()
    assert torch.equal(size > 0, commands.ordered)
    assert commands.turning.float().mean().item() == pytest.approx(0.7 * 0.5, abs=0.01)
    low, high = torch.tensor([config.command_vx, config.command_vy, config.command_yaw]).unbind(-1)
    assert ((commands.command >= low) & (commands.command <= high)).all()
    assert (commands.heading.abs() <= math.pi).all() and commands.heading.std() > 1.7
    still = make_commands(n, standing_fraction=0.3, standing_command=0.0)
    still.resample(everyone(n), quat_from_yaw(yaws(n)))
    assert (~still.ordered).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_a_mask_touches_only_its_rows_and_everybody_draws(seed: int) -> None:
    n = 50
    commands, other = (make_commands(n, seed, heading_fraction=0.5) for _ in range(2))
    quat = quat_from_yaw(yaws(n))
    for c in (commands, other):
        c.resample(everyone(n), quat)
    places = {name: getattr(commands, name).data_ptr() for name in (*STATE, "speed")}
    before = {name: getattr(commands, name).clone() for name in STATE}
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3
    quat = quat_from_yaw(yaws(n, 2))
    commands.resample(mask, quat)
    for name, value in before.items():
        assert torch.equal(getattr(commands, name)[~mask], value[~mask]), name
    assert (commands.heading[mask] != before["heading"][mask]).all()
    other.resample(everyone(n), quat)
    for name in STATE:
        assert torch.equal(getattr(commands, name)[mask], getattr(other, name)[mask]), name
    assert places == {name: getattr(commands, name).data_ptr() for name in places}


def test_a_heading_is_reached_the_shorter_way_round() -> None:
    """A robot that obeys: its yaw is the integral of the command. Also across the seam at pi."""
    n = 500
    commands = make_commands(n, heading_fraction=1.0, standing_fraction=0.0, heading_stiffness=2.0)
    start = yaws(n)
    commands.resample(everyone(n), quat_from_yaw(start))
    commands.heading[0], start[0] = -3.0, 3.0  # 0.28 rad to the left, not 6 to the right
    yaw, turned = start.clone(), torch.zeros(n)
    for step in range(400):
        commands.follow_heading(quat_from_yaw(yaw))
        if step == 0:
            for world in range(n):
                expected = turn_rate(commands.config, commands.heading[world].item(), yaw[world].item())
                assert commands.command[world, 2].item() == pytest.approx(expected, abs=1e-5)
        turned += 0.02 * commands.command[:, 2]
        yaw = start + turned
    left = torch.remainder(commands.heading - yaw + math.pi, 2 * math.pi) - math.pi
    assert left.abs().max() < 0.04  # within standing_command / heading_stiffness
    assert turned.abs().max() <= math.pi + 0.01
    assert turned[0].item() == pytest.approx(2 * math.pi - 6.0, abs=0.03)


def test_a_heading_that_is_reached_is_a_command_to_stand() -> None:
    commands = make_commands(2, heading_fraction=1.0, standing_fraction=0.0)
    commands.resample(everyone(2), quat_from_yaw(torch.zeros(2)))
    commands.command[:] = torch.tensor([[0.03, 0.0, 0.0], [0.5, 0.0, 0.0]])
    commands.follow_heading(quat_from_yaw(commands.heading + 0.02))
    assert (commands.command[0] == 0).all() and commands.ordered.tolist() == [False, True]
    torch.testing.assert_close(commands.command[1], torch.tensor([0.5, 0.0, -0.01]), atol=1e-6, rtol=0)
    commands.follow_heading(quat_from_yaw(commands.heading + 1.0))
    assert commands.ordered.all()


def test_a_command_from_outside_knows_no_heading() -> None:
    env = make_env(4, heading_fraction=1.0, resampling_interval=1e6)
    command = torch.tensor([0.3, 0.1, 0.2])
    env.set_command(command)
    for _ in range(3):
        env.step(torch.zeros(4, 29))
        assert torch.equal(env.command, command.expand(4, 3))


@pytest.mark.parametrize("engine", ["c", "warp"])
def test_the_environment_turns_its_commands_with_its_robots(engine: str) -> None:
    """After every step, reset or not, the observed yaw rate points from the robot's yaw to the heading."""
    config = HumanoidEnvConfig(
        num_envs=4,
        engine=engine,  # type: ignore[arg-type]
        heading_fraction=1.0,
        standing_fraction=0.0,
        standing_command=0.0,
        max_episode_length=7,
        resampling_interval=0.06,
    )
    env = HumanoidBaseEnv(config)
    env.reset(seed=0)
    for step in range(10):
        if step == 3:
            env.simulation.qpos[:, 3:7] = quat_from_yaw(torch.tensor([3.1, -3.1, 0.0, 1.0])).to(
                env.simulation.qpos
            )
        with NoHost() if engine == "warp" else contextlib.nullcontext():
            obs, *_ = env._step(torch.zeros(4, 29))
        assert torch.equal(obs[:, 6:9], env.command)
        for world, yaw in enumerate(yaw_of(env.simulation.qpos[:, 3:7]).tolist()):
            expected = turn_rate(config, env.heading[world].item(), yaw)
            assert env.command[world, 2].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heading_fraction": 1.5}, r"heading_fraction=1.5: must lie in \[0, 1\]"),
        ({"heading_stiffness": 0.0}, "heading_stiffness=0.0: must be greater than 0"),
        (
            {"heading_fraction": 0.5, "command_yaw": (0.1, 0.5)},
            r"command_yaw=\(0.1, 0.5\): must go both ways",
        ),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HumanoidEnvConfig(**changes)


RANGE = {"shoulder": 0.6, "left_elbow": 0.5, "elbow": 0.4, "wrist": 0.0, "waist_yaw": 0.3}


def make_poses(robot: Robot, n: int = 64, seed: int = 0, **config: object) -> PoseCommands:
    changes = {"pose_range": RANGE, "crouch": (0.1, 0.7), **config}
    return PoseCommands(
        HumanoidEnvConfig(num_envs=n, **changes),  # type: ignore[arg-type]
        robot,
        torch.Generator().manual_seed(seed),
    )


class TestPoses:
    @pytest.mark.parametrize("far", [1.0, 20.0])
    def test_a_draw_is_what_a_loop_makes_of_the_same_numbers(self, robot: Robot, far: float) -> None:
        """Within the joints' limits, however far the range goes."""
        n, widths = 50, {part: far * width for part, width in RANGE.items()}
        poses = make_poses(robot, n, pose_range=widths)
        poses.resample(everyone(n))
        numbers = torch.rand(n, 30, generator=torch.Generator().manual_seed(0)).tolist()
        clipped = 0
        for world, row in enumerate(numbers):
            bend = 0.1 + 0.6 * row[29]
            for joint, name in enumerate(robot.joint_names):
                width = next((width for part, width in widths.items() if part in name), 0.0)
                goal = robot.default_joint_pos[joint] + width * (2.0 * row[joint] - 1.0)
                goal += {"knee": bend, "hip_pitch": -bend / 2, "ankle_pitch": -bend / 2}.get(
                    name.split("_", 1)[1].removesuffix("_joint"), 0.0
                )
                low, high = robot.joint_range[joint]
                clipped += not low <= goal <= high
                assert poses.goal[world, joint].item() == pytest.approx(min(max(goal, low), high), abs=1e-5)
        assert bool(clipped) == (far > 1.0)

    def test_a_crouch_keeps_the_soles_flat(self, robot: Robot) -> None:
        """By MuJoCo's kinematics: feet turned as in the default pose, nearer to the base, at one height."""
        poses = make_poses(robot, 20, crouch=(0.0, 0.7))
        poses.resample(everyone(20), at_once=True)
        model = make_model(robot, poses.config)
        data = mujoco.MjData(model)

        def feet(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            data.qpos[3:7], data.qpos[7:] = [1.0, 0.0, 0.0, 0.0], pose
            mujoco.mj_kinematics(model, data)
            frames = np.array([data.body(name).xmat for name in robot.foot_bodies])
            return frames, np.array([data.site(name).xpos for name in robot.feet])

        flat, places = feet(robot.default_joint_pos)
        legs = [
            [robot.joint_names.index(f"{side}_{part}_joint") for part in ("hip_pitch", "knee", "ankle_pitch")]
            for side in ("left", "right")
        ]
        rises = []
        for pose in poses.pose.numpy():
            for leg in legs:
                assert pose[leg].sum() == pytest.approx(robot.default_joint_pos[leg].sum(), abs=1e-6)
            frames, now = feet(pose)
            np.testing.assert_allclose(frames, flat, atol=1e-6)
            moved = now - places
            assert abs(moved[0, 2] - moved[1, 2]) < 1e-3 and np.abs(moved[:, :2]).max() < 0.02
            rises.append(moved[:, 2].max())
        assert min(rises) > 0.0 and 0.05 < max(rises) < 0.15

    def test_without_a_range_or_a_crouch_it_is_the_default_pose(self, robot: Robot) -> None:
        for config in ({"pose_range": {}}, {"crouch": (0.0, 0.0)}, {"pose_range": {}, "crouch": (0.0, 0.0)}):
            poses = make_poses(robot, **config)
            poses.resample(everyone(64), at_once=True)
            moved = (poses.pose - torch.tensor(robot.default_joint_pos).float()).abs().amax(0) > 1e-6
            parts = (
                *(["hip_pitch", "knee", "ankle_pitch"] if "crouch" not in config else []),
                *(["shoulder", "elbow", "waist_yaw"] if "pose_range" not in config else []),
            )
            for name, found in zip(robot.joint_names, moved, strict=True):
                assert found == any(part in name for part in parts), name
        straighter = make_poses(robot, pose_range={}, crouch=(-0.3, 0.0))
        straighter.resample(everyone(64))
        knee = robot.joint_names.index("left_knee_joint")
        assert (straighter.goal[:, knee] < robot.default_joint_pos[knee]).all()
        assert make_env(1, crouch=(-0.3, 0.0)).poses and not make_env(1).poses

    @pytest.mark.parametrize("speed", [0.5, 3.0])
    def test_a_pose_goes_straight_to_its_goal_at_its_speed(self, robot: Robot, speed: float) -> None:
        """As a clip in NumPy; there it stays."""
        poses = make_poses(robot, pose_speed=speed)
        poses.resample(everyone(64))
        most = speed * poses.config.control_dt
        start, goal = poses.pose.numpy().astype(float), poses.goal.numpy().astype(float)
        needed = int(np.ceil(np.abs(goal - start).max() / most))
        for step in range(1, needed + 3):
            before = poses.pose.clone()
            poses.advance()
            assert ((poses.pose - before).abs() <= most + 1e-6).all()
            assert torch.equal(poses.pose, poses.goal) or step <= needed
            expected = np.clip(goal, start - step * most, start + step * most)
            np.testing.assert_allclose(poses.pose, expected, atol=1e-5)
        assert np.array_equal(poses.goal, goal.astype(np.float32))

    @pytest.mark.parametrize("at_once", [False, True])
    def test_a_mask_touches_only_its_rows_and_everybody_draws(self, robot: Robot, at_once: bool) -> None:
        poses, other = (make_poses(robot) for _ in range(2))
        for p in (poses, other):
            p.resample(everyone(64), at_once=True)
        before = {name: tensor.clone() for name, tensor in poses.tensors().items()}
        places = {name: tensor.data_ptr() for name, tensor in poses.tensors().items()}
        mask = torch.rand(64, generator=torch.Generator().manual_seed(1)) < 0.3
        poses.resample(mask, at_once)
        other.resample(everyone(64), at_once)
        for name, value in before.items():
            found = getattr(poses, name)
            changed = name == "goal" or at_once
            assert torch.equal(found[~mask], value[~mask])
            assert torch.equal(found[mask], getattr(other, name)[mask])
            assert (found[mask] != value[mask]).any(-1).all() == changed
        for p in (poses, other):
            p.resample(everyone(64))
        assert torch.equal(poses.goal, other.goal)  # nobody's next numbers depend on a mask
        poses.advance()
        assert {name: tensor.data_ptr() for name, tensor in poses.tensors().items()} == places

    def test_mirrored_numbers_are_mirrored_poses(self, robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that the poses of a task are as many as their mirror images."""
        poses = make_poses(robot, 2, pose_range={"shoulder": 4.0, "elbow": 0.5, "waist_yaw": 0.3, "hip": 2.0})
        index, sign = torch.tensor(robot.mirror_joint), torch.tensor(robot.mirror_sign).float()
        draw = torch.rand(1, 30, generator=torch.Generator().manual_seed(0))
        image = draw.clone()
        image[:, :-1] = 0.5 + sign * (draw[:, index] - 0.5)
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.cat((draw, image)))
        poses.resample(everyone(2))
        torch.testing.assert_close(poses.goal[1], sign * poses.goal[0, index], atol=1e-5, rtol=0)
        assert (poses.goal[0] - poses.goal[1]).abs().max() > 0.1

    def test_targets_are_about_the_commanded_pose(self) -> None:
        """And that is observed about the default pose, and what the pose terms count from."""
        env = make_env(4, task="stand", resampling_interval=0.1)
        generator, steps = torch.Generator().manual_seed(0), 0
        start = list(env.config.actor_observations).index("pose_command") * 3
        for _ in range(20):
            pose = env.pose_command.clone()
            action = 30.0 * torch.randn(4, 29, generator=generator)
            obs, _, terminated, *_ = env.step(action)
            limit = env.config.action_limit
            expected = pose + env.action_scale * action.clamp(-limit, limit)
            going_on = ~terminated
            torch.testing.assert_close(
                env.simulation.ctrl.float()[going_on], expected[going_on], atol=1e-5, rtol=0
            )
            steps += int(going_on.sum())
            seen = env.pose_command - env.default_joint_pos
            assert torch.equal(obs[:, start : start + 29], seen)
            assert torch.equal(OBSERVATIONS["pose_command"].compute(env), seen)
        assert steps > 40
        env.joint_pos = env.pose_command.clone()
        env.coast.zero_()
        assert (REWARDS["pose"](env) == 0).all() and (REWARDS["standing_pose"](env) == 0).all()
        env.joint_pos = env.default_joint_pos.expand(4, -1)
        assert (REWARDS["pose"](env) > 0).all() and (REWARDS["standing_pose"](env) > 0).all()

    def test_in_an_episode_a_pose_moves_steadily_and_a_reset_obeys_at_once(self) -> None:
        env = make_env(6, task="stand", resampling_interval=0.3, max_episode_length=37, harness=1.0)
        poses, most = env.poses, env.config.pose_speed * env.config.control_dt
        assert poses and torch.equal(poses.pose, poses.goal) and env.pose_command is poses.pose
        assert (poses.pose[0] != poses.pose[1]).any()
        generator, ends, moved = torch.Generator().manual_seed(0), 0, 0
        for _ in range(120):
            before, goal = poses.pose.clone(), poses.goal.clone()
            _, _, terminated, truncated, _ = env.step(torch.randn(6, 29, generator=generator))
            done = terminated | truncated
            new = (poses.goal != goal).any(-1)
            assert torch.equal(new, done | (env.episode_length % 15 == 0))
            assert torch.equal(poses.pose[done], poses.goal[done])
            assert ((poses.pose - before)[~done].abs() <= most + 1e-6).all()
            ends += int(done.sum())
            moved += int((poses.pose != before)[~done].any(-1).sum())
        assert ends > 12 and moved > 300
        env.reset(options={"reset_mask": torch.arange(6) < 3})
        assert torch.equal(poses.pose[:3], poses.goal[:3])

    def test_an_action_that_is_late_finds_the_servos_at_the_pose(self) -> None:
        """Of the new episode: what they were given before its first action."""
        late = RandomizationConfig(action_delay=(0.02, 0.02))
        env = make_env(4, task="stand", randomization=late, max_episode_length=3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            given = env.pose_command.clone()
            for _ in range(2):
                sent, action = env.pose_command.clone(), torch.randn(4, 29, generator=generator)
                env.step(action)
                torch.testing.assert_close(env.simulation.ctrl.float(), given, atol=1e-6, rtol=0)
                given = sent + env.action_scale * action
            *_, truncated, _ = env.step(action)
            assert truncated.all()
