"""The commands' laws: what is drawn, what a mask touches, where a heading turns the robot."""

from __future__ import annotations

import cmath
import contextlib
import math

import numpy as np
import pytest
import torch

from conftest import make_env
from kouros.envs.commands import VelocityCommands
from kouros.envs.config import HumanoidEnvConfig
from kouros.envs.humanoid import HumanoidBaseEnv
from kouros.physics.rotations import quat_from_yaw, yaw_of
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
