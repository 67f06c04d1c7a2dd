"""What a policy must be told to move the robot it was trained on, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from kouros import CONTRACT_VERSION
from kouros.envs.config import CALM, HumanoidEnvConfig
from kouros.envs.observations import OBSERVATIONS
from kouros.envs.wrappers import Env, make_policy_env

# In these entries two contracts may differ: what was learnt, where and how.
LEARNT = ("statistics", "environment", "training")


def policy_contract(env: Env) -> dict[str, Any]:
    """Robot, joints, gains, scales, observation terms, wrappers and clocks of an environment, JSON-able.

    Joint vectors are in ``joint_names`` order; SI units. What ``wrappers`` need to be computed elsewhere is
    beside them: ``kinematics``, both hands' chains (:func:`kouros.physics.kinematics.read_chains`), and
    ``statistics``, the mean and variance that ``normalize`` goes by now. ``environment`` is the
    configuration.

    Raises:
      TypeError: the environment, or a wrapper around it, is of another kind.
    """
    if not isinstance(env, Env):
        raise TypeError(f"{type(env).__name__}: no HumanoidBaseEnv, bare or in ObservationWrappers")
    config, robot = env.config, env.robot
    base: Any = env.unwrapped
    posed = env.action_offset is env.pose_command
    contract = {
        "contract_version": CONTRACT_VERSION,
        "robot": robot.name,
        "control_mode": config.control_mode,
        "control_dt": config.control_dt,
        "joint_names": list(robot.joint_names),
        "default_joint_pos": robot.default_joint_pos.tolist(),
        "joint_range": robot.joint_range.tolist(),
        "stiffness": robot.stiffness.tolist(),
        "damping": robot.damping.tolist(),
        "effort_limit": robot.effort_limit.tolist(),
        "velocity_limit": robot.no_load_speed.tolist(),
        "fall_tilt": config.fall_tilt,
        "command_range": [list(config.command_vx), list(config.command_vy), list(config.command_yaw)],
        "action_about": "pose_command" if posed else "action_offset",
        "action_offset": (env.default_joint_pos if posed else env.action_offset).tolist(),
        "action_scale": env.action_scale.tolist(),
        "action_limit": config.action_limit,
        "gait_period": config.gait_period,
        "standing_command": config.standing_command,
        "observations": [
            {"name": name, "size": OBSERVATIONS[name].compute(base).shape[1]}
            for name in config.actor_observations
        ],
        "wrappers": list(config.wrappers),
        "environment": dataclasses.asdict(config),
    }
    figures = {"kinematics": getattr(env, "chains", None), "statistics": getattr(env, "statistics", None)}
    return contract | {name: value for name, value in figures.items() if value is not None}


def check_contract(saved: object, env: Env, where: str) -> None:
    """Raise ``ValueError``, naming the first difference, unless ``saved`` is the contract of ``env``,
    :data:`LEARNT` left aside."""
    saved = require_version(saved, where)
    if name := first_difference(saved, env):
        ours = policy_contract(env)[name]
        raise ValueError(
            f"{where}: of another contract: {name}={saved.get(name)!r} there, {ours!r} here; "
            "install the version of Kouros that wrote it"
        )


def first_difference(saved: dict[str, Any], env: Env) -> str:
    """The first entry of a contract that is not as in ``env``, :data:`LEARNT` left aside; empty if none."""
    ours = policy_contract(env)
    return next((name for name in ours if name not in LEARNT and saved.get(name) != ours[name]), "")


def require_version(saved: object, where: str) -> dict[str, Any]:
    """A contract, if it is one of this version; else ``ValueError``."""
    if not isinstance(saved, dict) or "contract_version" not in saved:
        raise ValueError(f"{where}: has no contract; it was not written by kouros train")
    if saved["contract_version"] != CONTRACT_VERSION:
        raise ValueError(
            f"{where}: contract version {saved['contract_version']}, this version reads {CONTRACT_VERSION}; "
            "install the version of Kouros that wrote it"
        )
    return saved


def policy_state(env: Env) -> torch.Tensor:
    """What the policy carries from step to step, ``(n, state_size)``: last action, phase and coast if it
    observes the gait, and the memory of a history."""
    clock = torch.stack((env.phase, env.coast), dim=-1)
    clock = clock if "gait_phase" in env.config.actor_observations else clock[:, :0]
    return torch.cat((env.action, clock, getattr(env, "memory", clock[:, :0])), dim=-1)


def policy_sensors(env: Env) -> dict[str, torch.Tensor]:
    """What the robot's computer feeds the policy, by the names of the policy file's inputs."""
    return {
        "base_ang_vel": env.base_ang_vel_b,
        "projected_gravity": env.projected_gravity,
        "command": env.command,
        "joint_pos": env.joint_pos,
        "joint_vel": env.joint_vel,
        "pose_command": env.pose_command.expand_as(env.joint_pos),
    }


@torch.no_grad()
def record_policy(
    policy: Callable[[torch.Tensor], torch.Tensor],
    config: HumanoidEnvConfig,
    steps: int = 1000,
    statistics: dict[str, list[float]] | None = None,
) -> dict[str, torch.Tensor]:
    """Steps of a policy in its environment, as the policy file sees them.

    Args:
      policy: observations to actions.
      config: of its environment.
      steps: number of recorded steps, of ten robots side by side.
      statistics: ``contract["statistics"]`` of a policy that sees normalized observations.

    Returns:
      The sensors, ``state`` and ``observation`` before each step, ``joint_targets`` and ``next_state`` that
      came of it, ``(steps, ...)``. Steps that end an episode are left out: their ``next_state`` is of the
      next.

    Raises:
      RuntimeError: nearly every step ends an episode.
    """
    config = dataclasses.replace(config, num_envs=10, resampling_interval=1.0, **CALM)
    env = make_policy_env(config, statistics)
    obs, _ = env.reset(seed=0)
    rows: list[dict[str, torch.Tensor]] = []
    while sum(len(row["state"]) for row in rows) < steps:
        if len(rows) > steps:
            raise RuntimeError("the robot falls in nearly every step: look at fall_height and fall_tilt")
        row = {name: value.clone() for name, value in policy_sensors(env).items()}
        row |= {"state": policy_state(env), "observation": obs}
        about = env.action_offset.clone()
        obs, _, terminated, truncated, _ = env.step(policy(obs))
        row["joint_targets"] = about + env.action_scale * env.action
        row["next_state"] = policy_state(env)
        going_on = ~(terminated | truncated)
        rows.append({name: value[going_on] for name, value in row.items()})
    return {name: torch.cat([row[name] for row in rows])[:steps] for name in rows[0]}
