"""Observation terms: plain functions of the environment, by name.

A term returns ``(num_envs, size)`` in SI units. Its ``mirror`` says how the values change when the
world is reflected across the robot's sagittal (x-z) plane, which is what symmetric networks need.
Adding one is one function here and its name in the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from kouros.physics.rotations import yaw_of
from kouros.robots import Robot

if TYPE_CHECKING:
    from kouros.envs.humanoid import HumanoidBaseEnv

# scalar: unchanged. vector: y changes sign. pseudovector: x and z change sign (a rotation).
# command: (vx, vy, yaw rate). negate: all change sign. joints: the robot's mirror pairs. joint_pairs: the
# same for what has no direction, such as gains. bodies, feet: left and right exchange.
# scan: rows of the height scan, each from right to left. randomization: by its terms.
Mirror = Literal[
    "scalar",
    "vector",
    "pseudovector",
    "command",
    "negate",
    "joints",
    "joint_pairs",
    "bodies",
    "feet",
    "scan",
    "randomization",
]

# Points of the height scan: forward and to the left of the base, m.
SCAN_X = tuple(round(0.15 * i - 0.45, 2) for i in range(11))
SCAN_Y = (-0.4, -0.2, 0.0, 0.2, 0.4)
SCAN_LIMIT = 1.0


@dataclasses.dataclass(frozen=True)
class ObservationTerm:
    """``measured``: a robot's sensor reads it, with noise and late; the rest its computer knows."""

    compute: Callable[[HumanoidBaseEnv], torch.Tensor]
    mirror: Mirror
    measured: bool = False


OBSERVATIONS: dict[str, ObservationTerm] = {}


def observation(mirror: Mirror, measured: bool = False) -> Callable:
    """Register a function as the observation term of its own name."""

    def register(function: Callable[[HumanoidBaseEnv], torch.Tensor]) -> Callable:
        OBSERVATIONS[function.__name__] = ObservationTerm(function, mirror, measured)
        return function

    return register


@observation(mirror="pseudovector", measured=True)
def base_ang_vel(env: HumanoidBaseEnv) -> torch.Tensor:
    """Angular velocity of the base, base frame, rad/s: a gyroscope."""
    return env.base_ang_vel_b


@observation(mirror="vector", measured=True)
def projected_gravity(env: HumanoidBaseEnv) -> torch.Tensor:
    """Direction of gravity, base frame, unit length: (0, 0, -1) when upright on level ground. Where the
    randomization tilts gravity, this is the tilted one, as an accelerometer has it."""
    return env.projected_gravity


@observation(mirror="command")
def command(env: HumanoidBaseEnv) -> torch.Tensor:
    """Commanded (vx, vy, yaw rate), base frame, m/s and rad/s."""
    return env.command


@observation(mirror="joints")
def pose_command(env: HumanoidBaseEnv) -> torch.Tensor:
    """The pose to hold, about the default pose, rad."""
    return (env.pose_command - env.default_joint_pos).expand_as(env.joint_pos)


@observation(mirror="negate")
def gait_phase(env: HumanoidBaseEnv) -> torch.Tensor:
    """(sin, cos) of the left foot's place in the gait cycle; (0, 0) when told to stand."""
    angle = (2.0 * torch.pi) * env.phase
    return torch.stack((torch.sin(angle), torch.cos(angle)), dim=-1) * env.moving.unsqueeze(-1)


@observation(mirror="joints", measured=True)
def joint_pos(env: HumanoidBaseEnv) -> torch.Tensor:
    """Joint positions about the default pose, rad."""
    return env.joint_pos - env.default_joint_pos


@observation(mirror="joints", measured=True)
def joint_vel(env: HumanoidBaseEnv) -> torch.Tensor:
    """Joint velocities, rad/s."""
    return env.joint_vel


@observation(mirror="joints")
def last_action(env: HumanoidBaseEnv) -> torch.Tensor:
    """The action of the last control step; zero after a reset."""
    return env.action


@observation(mirror="vector")
def base_lin_vel(env: HumanoidBaseEnv) -> torch.Tensor:
    """Linear velocity of the base, base frame, m/s."""
    return env.base_lin_vel_b


@observation(mirror="command")
def mean_velocity(env: HumanoidBaseEnv) -> torch.Tensor:
    """What the tracking rewards look at: (vx, vy, yaw rate) averaged over ``tracking_time``."""
    return env.mean_velocity


@observation(mirror="scalar")
def base_height(env: HumanoidBaseEnv) -> torch.Tensor:
    """Height of the base above the ground, m."""
    return env.base_height.unsqueeze(-1)


@observation(mirror="scalar")
def harness(env: HumanoidBaseEnv) -> torch.Tensor:
    """Strength of the training harness, 0 to 1."""
    return env.harness.unsqueeze(-1)


@observation(mirror="feet")
def foot_height(env: HumanoidBaseEnv) -> torch.Tensor:
    """Height of each foot above the ground, m."""
    return env.foot_height


@observation(mirror="feet")
def foot_contact(env: HumanoidBaseEnv) -> torch.Tensor:
    """Whether each foot touches the ground, 0 or 1."""
    return env.foot_contact


@observation(mirror="feet")
def foot_force(env: HumanoidBaseEnv) -> torch.Tensor:
    """Vertical force of the ground on each foot, in units of the robot's weight."""
    return env.foot_force_w[:, :, 2] / env.weight


@observation(mirror="scan")
def height_scan(env: HumanoidBaseEnv) -> torch.Tensor:
    """Height of the ground at SCAN_X x SCAN_Y about the base, turned with its heading, above where the
    feet of a robot that stands upright would be, m, within +- SCAN_LIMIT: vertical rays from above."""
    yaw = yaw_of(env.base_quat_w).unsqueeze(-1)
    cos, sin, (x, y) = torch.cos(yaw), torch.sin(yaw), env.scan_points
    base = env.base_pos_w.unsqueeze(1)
    points = torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1) + base[..., :2]
    return (env.height_at(points) - base[..., 2] + env.robot.base_height).clamp(-SCAN_LIMIT, SCAN_LIMIT)


@observation(mirror="randomization")
def randomization(env: HumanoidBaseEnv) -> torch.Tensor:
    """What the randomization drew for this episode, term after term; nothing if it is off."""
    return env.randomization.values


Reflection = tuple[torch.Tensor, torch.Tensor]


def reflection(
    kinds: Sequence[str], sizes: Sequence[int], robot: Robot, rules: Mapping[str, tuple] | None = None
) -> Reflection:
    """Reflection of concatenated vectors: ``mirrored = sign * x[..., index]``.

    Args:
      kinds: how each of them reflects, see :data:`Mirror`.
      sizes: their lengths.
      robot: whose mirror pairs ``joints`` follows.
      rules: ``(index, sign)`` of further kinds.

    Returns:
      ``index`` (int64) and ``sign`` (float32), each ``(sum(sizes),)``.
    """
    scan = torch.arange(len(SCAN_X) * len(SCAN_Y)).view(len(SCAN_X), len(SCAN_Y))
    known: dict[str, tuple] = {
        "vector": ([0, 1, 2], [1, -1, 1]),
        "pseudovector": ([0, 1, 2], [-1, 1, -1]),
        "command": ([0, 1, 2], [1, -1, -1]),
        "joints": (robot.mirror_joint, robot.mirror_sign),
        "joint_pairs": (robot.mirror_joint, [1] * robot.num_joints),
        "feet": ([1, 0], [1, 1]),
        "scan": (scan.flip(1).flatten().tolist(), [1] * scan.numel()),
        **(rules or {}),
    }
    index, sign, start = [], [], 0
    for kind, size in zip(kinds, sizes, strict=True):
        same = range(size), [-1 if kind == "negate" else 1] * size
        places, signs = known.get(kind, same)
        index += [start + int(i) for i in places]
        sign += [float(s) for s in signs]
        start += size
    return torch.tensor(index, dtype=torch.int64), torch.tensor(sign)
