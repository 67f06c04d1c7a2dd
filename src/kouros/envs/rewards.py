"""Reward terms: plain functions of the environment, by name.

A term returns ``(num_envs,)``; the config weighs it and the environment multiplies by the control
period, so that weights are per second. Adding one is one function here and one line in the config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kouros.envs.humanoid import HumanoidBaseEnv

Reward = Callable[["HumanoidBaseEnv"], torch.Tensor]
REWARDS: dict[str, Reward] = {}


def reward(function: Reward) -> Reward:
    """Register a function as the reward term of its own name."""
    REWARDS[function.__name__] = function
    return function


@reward
def track_linear_velocity(env: HumanoidBaseEnv) -> torch.Tensor:
    """exp(-|v_xy - command|^2 / sigma^2), mean velocity in the base's frame."""
    error = (env.command[:, :2] - env.mean_velocity[:, :2]).square().sum(-1)
    return torch.exp(-error / env.config.tracking_sigma**2)


@reward
def track_yaw_rate(env: HumanoidBaseEnv) -> torch.Tensor:
    """exp(-(yaw rate - command)^2 / sigma^2), mean yaw rate."""
    error = (env.command[:, 2] - env.mean_velocity[:, 2]).square()
    return torch.exp(-error / env.config.tracking_sigma**2)


@reward
def gait_contact(env: HumanoidBaseEnv) -> torch.Tensor:
    """Share of feet whose contact agrees with the gait clock; both must touch when told to stand."""
    return (env.foot_contact.bool() != env.swing).float().mean(-1)


@reward
def gait_height(env: HumanoidBaseEnv) -> torch.Tensor:
    """exp(-sum over feet of (height - the clock's swing height)^2 / 0.005 m^2)."""
    error = (env.foot_height - env.swing_height).square().sum(-1)
    return torch.exp(-error / 0.005)


@reward
def alive(env: HumanoidBaseEnv) -> torch.Tensor:
    """1 in every step that did not end in a fall."""
    return (~env.fallen).float()


@reward
def tilt(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared sine of the base's tilt and of the torso's, summed."""
    base, torso = env.base_up_b[:, :2], env.torso_up_w[:, :2]
    return base.square().sum(-1) + torso.square().sum(-1)


@reward
def base_height(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared height missing to ``target_height``, m^2."""
    return (env.config.target_height - env.base_height).clamp(min=0.0).square()


@reward
def roll_pitch_rate(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared roll and pitch rate, rad^2/s^2."""
    return env.base_ang_vel_b[:, :2].square().sum(-1)


@reward
def vertical_velocity(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared vertical velocity of the base, m^2/s^2."""
    return env.base_lin_vel_b[:, 2].square()


@reward
def action_rate(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared change of action since the last step."""
    return (env.action - env.previous_action).square().sum(-1)


@reward
def action_acceleration(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared second difference of the action."""
    return (env.action - 2.0 * env.previous_action + env.action_before).square().sum(-1)


@reward
def pose(env: HumanoidBaseEnv) -> torch.Tensor:
    """Weighted squared deviation from the pose to hold, the default pose unless there is another, rad^2."""
    return (env.joint_pos - env.pose_command).square() @ env.pose_weights


@reward
def standing_pose(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared deviation of all joints from the pose to hold while told to stand, rad^2."""
    return (env.joint_pos - env.pose_command).square().sum(-1) * ~env.moving


@reward
def foot_slip(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared horizontal velocity of feet that touch the ground, m^2/s^2."""
    return (env.foot_vel_w[:, :, :2].square().sum(-1) * env.foot_contact).sum(-1)


@reward
def joint_velocity(env: HumanoidBaseEnv) -> torch.Tensor:
    """Squared joint velocities, rad^2/s^2."""
    return env.joint_vel.square().sum(-1)
