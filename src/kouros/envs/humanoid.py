"""The humanoid environment: thousands of worlds behind one Gymnasium ``VectorEnv`` of tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from kouros.checks import check_choice, require, require_state
from kouros.envs.actuators import Actuators
from kouros.envs.commands import PoseCommands, VelocityCommands
from kouros.envs.config import HumanoidEnvConfig, by_part
from kouros.envs.curriculum import Everywhere, RunningCurriculum
from kouros.envs.observations import OBSERVATIONS, SCAN_X, SCAN_Y, reflection
from kouros.envs.randomization import DomainRandomizer
from kouros.envs.replay import Recorder
from kouros.envs.rewards import REWARDS
from kouros.envs.scene import Camera, make_model, room_for_contacts
from kouros.envs.terrain import Ground, TerrainLevels, make_terrain
from kouros.graphs import Recorded, is_recording
from kouros.physics.articulation import ArticulationView
from kouros.physics.rotations import quat_from_yaw, rotate, rotate_inverse, up_in_body
from kouros.physics.simulation import make_simulation
from kouros.robots import get_robot
from kouros.threads import torch_threads

# A number read from a world, or a reward, beyond this (SI units), or NaN, is a sick world, not a robot.
SICK = 1e6

# The base of a robot this near to the end of a terrain (m) is taken as leaving it.
EDGE = 0.5

# The harness at full strength: torque per sine of the tilt (N m), its damping (N m s) and force per
# height missing (N/m). A fall strengthens it by HARNESS_STEP.
HARNESS_TORQUE = 200.0
HARNESS_FORCE = 2000.0
HARNESS_DAMPING = 4.0
HARNESS_STEP = 0.05


class HumanoidBaseEnv(VectorEnv):
    """``num_envs`` humanoids that follow velocity commands.

    **Step.** ``step(actions)`` takes ``(num_envs, num_joints)`` float32 and returns the five-tuple
    ``(observations, rewards, terminations, truncations, infos)`` of tensors: actor observations
    ``(num_envs, obs_dim)`` float32, rewards ``(num_envs,)`` float32, two ``(num_envs,)`` bool. A
    termination is a fall (or a sick world: a state or a reward that is not finite, or beyond all sense); a
    truncation is the end of time, or of the terrain.

    **Reset.** Autoreset is same-step: where an episode ends, the returned observation is the first
    of the next episode and ``infos["final_obs"]`` (``infos["final_critic_obs"]``) holds the last of
    the ended one; their other rows repeat the returned ones. ``reset(options={"reset_mask": mask})``
    resets only the rows of a bool mask; every other world, its clock and its command stay as they
    are, bit for bit.

    **Info**, all tensors: ``critic_obs`` ``(num_envs, critic_dim)``, the actor's observation followed
    by what only a simulation knows; ``height`` (of the base above the ground, m); ``forward_velocity``
    (m/s, base frame); ``episode`` with ``r`` (sum of rewards), ``l`` (steps) and ``t`` (simulated seconds)
    where ``_episode`` is true, zero elsewhere; ``metrics`` ``(len(metric_names), num_envs)``: reward terms
    times their weights, tracking errors (m/s, rad/s), harness, 1 where the world was sick, and where the
    engine ever lacked room for its contacts, and the terrain's levels.

    **Observations** are concatenated terms of ``config.actor_observations``, see
    :mod:`kouros.envs.observations`; rewards are weighted terms of ``config.rewards``, see
    :mod:`kouros.envs.rewards`. The public tensors below are what terms are made of; they describe
    the state after the last control step.

    Attributes:
      config, robot, simulation, articulation: what the environment is made of.
      command, ordered, heading, turning, command_speed: what is asked of the worlds, see
        :class:`kouros.envs.commands.VelocityCommands`.
      poses, pose_command: the pose to hold, rad, ``(num_envs, num_joints)``, see
        :class:`kouros.envs.commands.PoseCommands`; the default pose, ``(num_joints,)``, where none is drawn.
      action_offset: what actions are about: the pose to hold, of position control.
      velocity, mean_velocity: ``(num_envs, 3)``, what follows the command: vx, vy and yaw rate, now and
        averaged over ``tracking_time``.
      coast: ``(num_envs,)`` in [0, 1], from 1 down to 0 in the gait cycle after a reset or the last
        ordered command.
      moving: ``(num_envs,)`` bool, whether the gait clock counts: ordered, or coasting to a halt.
      phase: ``(num_envs,)`` in [0, 1), the left foot's place in the gait cycle; the right foot is half
        a cycle apart. A foot swings in the first ``swing_fraction`` of its cycle.
      swing, swing_height: ``(num_envs, 2)``, whether each foot should have been in the air at the end of
        the last step, and how high (m).
      curriculum: the stages of the training, None if switched off.
      harness: ``(num_envs,)`` in [0, 1], how much each world's training harness still holds.
      until_push: ``(num_envs,)`` time until the next push, s (with ``push_velocity``).
      randomization: what was drawn for each world; the observations below are true, the policy's are not.
      base_height, foot_height: ``(num_envs,)`` and ``(num_envs, 2)``, heights above the ground under the
        base and under each foot, m, with holes in the ground taken as filled.
      ground: heights of the terrain, None on a flat plane; :meth:`height_at` asks either.
      terrain_type, terrain_level, max_terrain_level, spawn_xy: on which tile each world's episodes begin, see
        :class:`kouros.envs.terrain.TerrainLevels`.
      action, previous_action, action_before: ``(num_envs, num_joints)``, the last three actions.
      episode_length: ``(num_envs,)`` int, control steps since the reset.
      recorder: what the worlds did lately, kept for the first that turns sick.
      measured_joint_pos: ``(num_envs, num_joints)``, what the policy knows of ``joint_pos``, rad: its bias,
        noise and delay included.
      final_joint_pos, final_measured_joint_pos, final_base_lin_vel_b: what those without ``final`` were
        before the last step reset any world.

    Args:
      config: the task's figures; the task ``walk`` if None.
      device: where the worlds live.

    Raises:
      ValueError: a name in the config (robot, reward, observation, joint) is unknown, or no engine
        for the device.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own declaration)
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": ["rgb_array"],
    }

    def __init__(self, config: HumanoidEnvConfig | None = None, device: str | torch.device = "cpu") -> None:
        self.config = config = config or HumanoidEnvConfig()
        if config.wrappers:
            raise ValueError(f"wrappers={config.wrappers!r}: use make_env(config), which puts them on")
        self.robot = robot = get_robot(config.robot)
        for field in ("rewards", "actor_observations", "critic_observations"):
            for name in getattr(config, field):
                check_choice(field, name, REWARDS if field == "rewards" else OBSERVATIONS)
        too_high = f"must be below the {robot.base_height:g} m that {robot.name} starts at"
        require(config, "fall_height", config.fall_height < robot.base_height, too_high)
        pose_weights = by_part("pose_weights", config.pose_weights, robot.joint_names)
        self.simulation = make_simulation(
            make_model(robot, config),
            config.num_envs,
            device,
            config.engine,
            config.num_threads,
            room_for_contacts(config),
            dry_friction="friction_loss" in config.randomization.enabled(),
        )
        self.device = self.simulation.device
        self.ground: Ground | None = None
        if config.terrain.types:
            self.ground = Ground(make_terrain(config.terrain), self.device)
        self.pose_weights = torch.tensor(pose_weights, device=self.device)
        self.articulation = ArticulationView(self.simulation, robot)
        self.num_envs = config.num_envs
        self.render_mode = "rgb_array"
        self._camera: Camera | None = None
        self._generator = torch.Generator(self.device)
        self._generator.seed()
        self._recorded: Recorded | None = None
        self._allocate()
        self._refresh()

        actor, critic = config.actor_observations, config.critic_observations
        sizes = [OBSERVATIONS[name].compute(self).shape[1] for name in actor]
        ends = np.cumsum([0, *sizes]).tolist()
        self._actor_dim = ends[-1]
        parts = {name: slice(*ends[i : i + 2]) for i, name in enumerate(actor)}
        self.actuators = Actuators(self.articulation, config)
        self.randomization = DomainRandomizer(config, self.actuators, parts, self._generator)
        self.curriculum: RunningCurriculum | None = None
        if config.curriculum.enabled:
            targets = self._curriculum_targets()
            self.curriculum = RunningCurriculum(config.curriculum, self.num_envs, self.device, targets)
        sizes += [OBSERVATIONS[name].compute(self).shape[1] for name in critic]
        kinds = [OBSERVATIONS[name].mirror for name in actor + critic]
        rules = {"randomization": self.randomization.mirror}
        self.mirror = {
            "obs": reflection(kinds[: len(actor)], sizes[: len(actor)], robot, rules),
            "critic_obs": reflection(kinds, sizes, robot, rules),
            "action": (torch.tensor(robot.mirror_joint), torch.tensor(robot.mirror_sign).float()),
        }
        # The step waits for nothing and has fixed shapes: whoever has a graph may record it.
        self.graph_safe = config.graph and self.device.type == "cuda"
        self.generators = [self._generator]
        self.single_observation_space = make_box(np.inf, self._actor_dim)
        self.critic_observation_space = make_box(np.inf, sum(sizes))
        self.single_action_space = make_box(config.action_limit, robot.num_joints)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.reset()

    def _allocate(self) -> None:
        config, robot, view, sim = self.config, self.robot, self.articulation, self.simulation
        n, model = self.num_envs, sim.model

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(n, *shape, dtype=dtype, device=self.device)

        def constant(values: Any) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=self.device)

        # One float32 copy of what is read in every step; the public tensors are views of it.
        self._read = zeros(model.nq + model.nv + model.nsensordata)
        parts = self._read.split([model.nq, model.nv, model.nsensordata], dim=1)
        qpos, qvel, sensors = parts

        def sensor(first: str, count: int, size: int) -> torch.Tensor:
            start = int(model.sensor(first).adr[0])
            return sensors[:, start : start + count * size].unflatten(1, (count, size))

        left = robot.feet[0]  # the right foot's sensor follows, see Robot.spec
        self.base_pos_w, self.base_quat_w = qpos[:, 0:3], qpos[:, 3:7]
        self.base_lin_vel_w, self.base_ang_vel_b = qvel[:, 0:3], qvel[:, 3:6]
        self.joint_pos, self.joint_vel = qpos[:, view.joint_qpos], qvel[:, view.joint_qvel]
        self.torso_up_w = sensor("torso_up", 1, 3)[:, 0]
        self.foot_pos_w = sensor(f"{left}_position", 2, 3)
        self.foot_vel_w = sensor(f"{left}_velocity", 2, 3)
        self.foot_force_w = sensor(f"{left}_contact", 2, 4)[:, :, 1:]
        self._foot_contacts = sensor(f"{left}_contact", 2, 4)[:, :, 0]
        self.base_height, self.foot_height = self.base_pos_w[:, 2], self.foot_pos_w[:, :, 2]
        if self.ground is not None:
            self._heights = zeros(3)
            self.base_height, self.foot_height = self._heights[:, 0], self._heights[:, 1:]

        tilted = "gravity" in config.randomization.enabled()
        self._gravity = sim.model_field("opt.gravity") if tilted else None
        self.default_joint_pos = constant(robot.default_joint_pos)
        self.weight = float(model.body_mass.sum() * np.linalg.norm(model.opt.gravity))
        self.commands = VelocityCommands(config, self._generator)
        self.command, self.ordered = self.commands.command, self.commands.ordered
        self.heading, self.turning = self.commands.heading, self.commands.turning
        self.command_speed = self.commands.speed
        self.poses: PoseCommands | None = None
        self.pose_command = self.default_joint_pos
        if config.pose_range or any(config.crouch):
            self.poses = PoseCommands(config, robot, self._generator)
            self.pose_command = self.poses.pose
        self.velocity, self.mean_velocity = zeros(3), zeros(3)
        self.phase, self.coast = zeros(), zeros()
        self.action, self.previous_action, self.action_before = (zeros(robot.num_joints) for _ in range(3))
        self.recorder = Recorder(sim, self.action)
        self.episode_length = zeros(dtype=torch.int64)
        self._episode_return = zeros()
        self.harness = torch.full_like(self.phase, config.harness)
        self.until_push = zeros()
        self._harness_wrench = sim.field("xfrc_applied")[:, model.body(robot.base_body).id, 2:5]

        self.resampling_steps = max(1, round(config.resampling_interval / config.control_dt))
        # A reset draws every component of the state evenly between two bounds.
        low, high = np.zeros(model.nq + model.nv), np.zeros(model.nq + model.nv)
        low[2] = high[2] = robot.base_height
        joints = np.arange(model.nq)[view.joint_qpos]
        around = np.array(config.randomization.initial_joint_pos)
        limits = robot.joint_range.T
        low[joints], high[joints] = np.clip(robot.default_joint_pos + around[:, None], *limits)
        moving = model.nq + np.array([0, 1, 5])  # base velocity: x, y, yaw
        low[moving], high[moving] = config.randomization.initial_velocity
        self._initial_low, self._initial_range = constant(low), constant(high - low)

        self.levels = TerrainLevels(config.terrain, n, self._generator)
        self.terrain_type, self.terrain_level = self.levels.type, self.levels.level
        self.max_terrain_level, self.spawn_xy = self.levels.highest, self.levels.spawn_xy
        self.scan_points = constant(np.stack(np.meshgrid(SCAN_X, SCAN_Y, indexing="ij"))).flatten(1)
        offset, scale = {
            "position": (robot.default_joint_pos, robot.action_scale),  # about the pose to hold, see below
            "velocity": (np.zeros(robot.num_joints), np.ones(robot.num_joints)),
            "effort": (np.zeros(robot.num_joints), 0.25 * robot.effort_limit),
        }[config.control_mode]
        self.action_offset, self.action_scale = (
            constant(offset),
            constant(scale * config.action_scale),
        )
        if self.poses and config.control_mode == "position":
            self.action_offset = self.pose_command
        if not all(isinstance(i, slice) for i in (view.joint_qpos, view.joint_qvel, view.joint_ctrl)):
            raise ValueError(f"robot={robot.name!r}: joint_names must be in the order of the model's joints")

        rewards = config.rewards
        others = 5 + len(self.levels.metric_names)
        self._metric_scale = constant([*rewards.values(), *[1.0] * others]).unsqueeze(-1)
        self.metric_names = (
            *(f"reward/{name}" for name in rewards),
            "task/velocity_error",
            "task/yaw_rate_error",
            "task/harness",
            "task/sick_worlds",
            "task/overflown_worlds",
            *self.levels.metric_names,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Start episodes anew, in all worlds or where ``options["reset_mask"]`` is true.

        Args:
          seed: restarts the random generator, the harness, the curriculum and the terrain levels: the same
            seed gives the same episodes. Until the first seed the generator starts anywhere.
          options: ``{"reset_mask": bool (num_envs,)}`` or None.

        Raises:
          ValueError: an unknown option, or a mask of another shape or type.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
            self.randomization.seed(seed)
        mask = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        for name, value in (options or {}).items():
            check_choice("options", name, ["reset_mask"])
            mask = torch.as_tensor(value, device=self.device)
            if mask.dtype != torch.bool or mask.shape != (self.num_envs,):
                raise ValueError(
                    f"options['reset_mask'] of shape {tuple(mask.shape)} and type {mask.dtype}: "
                    f"use a bool mask of shape ({self.num_envs},)"
                )
        if seed is not None:
            self.harness.masked_fill_(mask, self.config.harness)
            if self.curriculum:
                self.curriculum.restart()
            self.terrain_level.masked_fill_(mask, 0)
        self._begin_episodes(mask)
        self.randomization.begin(mask)
        self._refresh()
        self.commands.resample(mask, self.base_quat_w)
        obs, critic_obs = self._observations(mask)
        return obs, self._info(critic_obs)

    def step(
        self, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """One control step of every world; see the class.

        Raises:
          TypeError: ``actions`` is not a float32 tensor.
          ValueError: its shape or device is wrong, or, on the CPU, a value is not finite (on a GPU such
            a world turns sick, and is reset and counted).
        """
        shape = (self.num_envs, self.robot.num_joints)
        if not isinstance(actions, torch.Tensor) or actions.dtype != torch.float32:
            kind = actions.dtype if isinstance(actions, torch.Tensor) else type(actions).__name__
            raise TypeError(f"actions: got {kind}, expected a float32 tensor of shape {shape}")
        if actions.shape != shape:
            raise ValueError(f"actions: got shape {tuple(actions.shape)}, expected {shape}")
        if actions.device != self.device:
            raise ValueError(f"actions: on {actions.device}, the environment is on {self.device}")
        if self.device.type == "cpu" and not bool(torch.isfinite(actions).all()):
            bad = int((~torch.isfinite(actions)).any(-1).nonzero()[0])
            raise ValueError(f"actions: not finite in world {bad}; the policy has diverged")
        with torch_threads(1):
            if self.graph_safe and not is_recording():
                return self._replay(actions.detach())
            return self._step(actions.detach())

    def _replay(self, actions: torch.Tensor):
        """:meth:`_step` as a CUDA graph, recorded at its first call."""
        if self._recorded is None:
            self._actions = torch.zeros_like(actions)
            self._recorded = Recorded(lambda: self._step(self._actions), self.device, self.generators, self)
        self._actions.copy_(actions)
        return torch.utils._pytree.tree_map(torch.clone, self._recorded.replay())

    def _step(self, actions: torch.Tensor):
        """The tensor program: no host synchronization, no shape that depends on data."""
        config, sim = self.config, self.simulation
        self.action_before.copy_(self.previous_action)
        self.previous_action.copy_(self.action)
        torch.clamp(actions, -config.action_limit, config.action_limit, out=self.action)
        sent = self.randomization.apply_dynamics_adaptation(self.action)
        targets = torch.addcmul(self.action_offset, self.action_scale, sent)
        if config.harness:
            self._pull_harness()
        self.actuators.step(targets)
        self.randomization.advance()
        cycles = config.control_dt / config.gait_period
        self.episode_length += 1
        self.phase.add_(cycles).remainder_(1.0)
        self.coast.masked_fill_(self.ordered, 1.0).sub_(cycles).clamp_(min=0.0)
        self._refresh()
        self.velocity = torch.cat((self.base_lin_vel_b[:, :2], self.base_ang_vel_b[:, 2:]), dim=1)
        self.mean_velocity.lerp_(self.velocity, min(1.0, config.control_dt / config.tracking_time))
        self.swing, self.swing_height = self._gait()

        self.fallen = (
            self.sick
            | (self.base_up_b[:, 2] < math.cos(config.fall_tilt))
            | (self.base_height < config.fall_height)
        )
        if config.harness:
            # Up with a fall and down with time: steady where falls are harness_fall_time apart.
            self.harness.add_(self.fallen, alpha=HARNESS_STEP)
            self.harness -= HARNESS_STEP * config.control_dt / config.harness_fall_time
            self.harness.clamp_(0.0, config.harness)
        over = self.episode_length >= config.max_episode_length
        if self.ground is not None:
            over = over | (self.base_pos_w[:, :2].abs() > self.ground.edge - EDGE).any(-1)
            self.levels.follow(self.velocity[:, :2], self.command[:, :2], config.control_dt)
        rewards, metrics = self._rewards()
        self.recorder.record(self.episode_length, self.sick)
        terminations = self.fallen | self.sick
        truncations = over & ~terminations
        done = terminations | truncations
        self._episode_return += rewards
        if self.curriculum:
            good = truncations & (self.harness == 0.0)
            self.curriculum.count(self.velocity, self.command, self.episode_length, done, good)
        self.commands.follow_heading(self.base_quat_w)
        if self.poses:
            self.poses.advance()
        length = self.episode_length * done
        final_obs, final_critic_obs = obs, critic_obs = self._observations()
        self.final_joint_pos, self.final_base_lin_vel_b = self.joint_pos.clone(), self.base_lin_vel_b
        exact = self.measured_joint_pos is self.joint_pos
        self.final_measured_joint_pos = self.final_joint_pos if exact else self.measured_joint_pos
        info = {
            "_episode": done,
            "episode": {
                "r": self._episode_return * done,
                "l": length,
                "t": length * config.control_dt,
            },
            "metrics": metrics,
        }

        new_command = done | (self.episode_length % self.resampling_steps == 0)
        changed = new_command
        if config.randomization.push_velocity[1]:
            self.until_push -= config.control_dt
            pushed = (self.until_push <= 0.0) & ~done
            changed = changed | pushed
            if sim.may_have(pushed):
                self._push(pushed)
        if sim.may_have(done):
            if config.terrain.curriculum:
                left = config.control_dt * (config.max_episode_length - self.episode_length)
                left = self.command[:, :2].norm(dim=-1) * left
                self.levels.change(done & ~self.sick, self.base_pos_w[:, :2], left)
            self._begin_episodes(done)
        if sim.may_have(changed):
            self._refresh()
            self.commands.resample(new_command, self.base_quat_w)
            if self.poses:
                self.poses.resample(new_command & ~done)
            obs, critic_obs = self._observations(done)
            final_obs = torch.where(done.unsqueeze(-1), final_obs, obs)
            final_critic_obs = torch.where(done.unsqueeze(-1), final_critic_obs, critic_obs)
        info |= {"final_obs": final_obs, "final_critic_obs": final_critic_obs}
        info |= self._info(critic_obs)
        return obs, rewards, terminations, truncations, info

    def _info(self, critic_obs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "critic_obs": critic_obs,
            "height": self.base_height.clone(),
            "forward_velocity": self.base_lin_vel_b[:, 0].clone(),
        }

    def _refresh(self) -> None:
        """Bring the public tensors to the simulation's present state, float32 and finite."""
        sim = self.simulation
        torch.cat((sim.qpos, sim.qvel, sim.sensordata), dim=1, out=self._read)
        self.sick = ~(self._read.abs().amax(-1) < SICK)
        self._read.masked_fill_(self.sick.unsqueeze(-1), 0.0)
        self.base_up_b = up_in_body(self.base_quat_w)
        self.projected_gravity = -self.base_up_b
        if self._gravity is not None:
            down = torch.nn.functional.normalize(self._gravity.float(), dim=-1)
            self.projected_gravity = rotate_inverse(self.base_quat_w, down)
        self.base_lin_vel_b = rotate_inverse(self.base_quat_w, self.base_lin_vel_w)
        self.foot_contact = (self._foot_contacts > 0).float()
        if self.ground is not None:
            points = torch.cat((self.base_pos_w.unsqueeze(1), self.foot_pos_w), dim=1)
            torch.sub(points[..., 2], self.ground.support_at(points[..., :2]), out=self._heights)

    def height_at(self, xy: torch.Tensor) -> torch.Tensor:
        """Height of the ground, m, ``(...)``, at points ``(..., 2)`` of the world frame: what a ray hits."""
        return torch.zeros_like(xy[..., 0]) if self.ground is None else self.ground.height_at(xy)

    def support_at(self, xy: torch.Tensor) -> torch.Tensor:
        """The same with holes in the ground filled up: what :attr:`base_height` counts from."""
        return torch.zeros_like(xy[..., 0]) if self.ground is None else self.ground.support_at(xy)

    def _gait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each foot should be in the air now, and how high (m), ``(num_envs, 2)`` each."""
        fraction, height = self.config.swing_fraction, self.config.swing_height
        cycle = torch.stack((self.phase, (self.phase + 0.5) % 1.0), dim=-1)
        swing = (cycle < fraction) & self.moving.unsqueeze(-1)
        return swing, torch.sin(cycle * (torch.pi / fraction)) * height * swing

    @property
    def moving(self) -> torch.Tensor:
        return self.ordered | (self.coast > 0.0)

    def observe(self) -> torch.Tensor:
        """The actor's observation of the present state, ``(num_envs, obs_dim)``."""
        return self._observations()[0]

    def _observations(self, fresh: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The actor's observation, as measured, and the critic's: the same terms as they are, and its own."""
        names = self.config.actor_observations + self.config.critic_observations
        true = torch.cat([OBSERVATIONS[name].compute(self) for name in names], dim=-1)
        seen = self.randomization.observe(true[:, : self._actor_dim], fresh)
        self.measured_joint_pos = self.randomization.joint_positions(self.joint_pos, seen)
        return seen, true

    def _rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards ``(num_envs,)`` and the metrics ``(len(metric_names), num_envs)``."""
        terms = torch.stack([REWARDS[name](self) for name in self.config.rewards])
        self.sick = self.sick | ~(terms.abs().amax(0) < SICK)
        # What a sick world did is nobody's merit or fault.
        terms = terms.masked_fill(self.sick, 0.0)
        error = (self.command - self.velocity).square()
        speed_error, yaw_error = error[:, :2].sum(-1).sqrt(), error[:, 2].sqrt()
        wrong = (self.sick.float(), self.simulation.overflow().float())
        levels = self.levels.metrics()
        others = torch.stack([speed_error, yaw_error, self.harness, *wrong, *levels])
        metrics = torch.cat((terms, others)) * self._metric_scale
        return metrics[: len(terms)].sum(0) * self.config.control_dt, metrics

    def _pull_harness(self) -> None:
        """A wrench on the base, world frame: a torque towards upright, a force up where it is low.

        Assistance that fades with success: Yu, Turk & Liu 2018 (arXiv 1801.08093).
        """
        # cross(body's z axis, world's z axis), the axis and sine of the tilt, is (y, -x) of the body's
        # z axis in the world: up_in_body of the inverse rotation.
        w, x, y, z = self.base_quat_w.unbind(-1)
        sine = 2.0 * torch.stack((y * z - w * x, -x * z - w * y), dim=-1)
        rate = rotate(self.base_quat_w, self.base_ang_vel_b)[:, :2]
        torque = HARNESS_TORQUE * sine - HARNESS_DAMPING * rate
        low = (self.config.target_height - self.base_height.unsqueeze(-1)).clamp(min=0.0)
        pull = torch.cat((HARNESS_FORCE * low, torque), dim=-1)
        self._harness_wrench.copy_(pull * self.harness.unsqueeze(-1))

    def _uniform(self, columns: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), ``(num_envs, columns)``: every world draws, masked or not."""
        return torch.rand(self.num_envs, columns, generator=self._generator, device=self.device)

    def set_command(self, command: torch.Tensor) -> None:
        """Command every world from outside, until the next resampling.

        Args:
          command: vx, vy (m/s, base frame) and yaw rate (rad/s), ``(num_envs, 3)`` or what
            broadcasts to it. Observe anew afterwards.
        """
        self.commands.set(command)

    def _push(self, mask: torch.Tensor) -> None:
        """Add ``push_velocity`` to the base's velocity, horizontally in a random direction."""
        draw = self._uniform(2)
        angle = (2.0 * torch.pi) * draw[:, :1]
        low, high = self.config.randomization.push_velocity
        speed = low + (high - low) * draw[:, 1:]
        push = torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1) * speed
        self.simulation.qvel[:, :2] += push * mask.unsqueeze(-1)
        self._await_push(mask)

    def _await_push(self, mask: torch.Tensor) -> None:
        """Draw the time until the next push in the worlds of the mask."""
        low, high = self.config.randomization.push_interval
        wait = (low + (high - low) * self._uniform(1)[:, 0]) / self.randomization.push_frequency
        self.until_push.copy_(torch.where(mask, wait, self.until_push))

    def _begin_episodes(self, mask: torch.Tensor) -> None:
        sim, rows = self.simulation, mask.unsqueeze(-1)
        draw = self._uniform(2 + len(self._initial_low))
        state = torch.addcmul(self._initial_low, self._initial_range, draw[:, 2:])
        state[:, 3:7] = quat_from_yaw((2.0 * torch.pi) * draw[:, 0])
        if self.ground is not None:
            state[:, :3] += self.levels.begin(mask, self.ground)
        qpos, qvel = state.to(sim.dtype).split([sim.model.nq, sim.model.nv], dim=1)
        sim.reset(mask)
        if self.poses:
            self.poses.resample(mask, at_once=True)
        self._randomize(mask)
        sim.qpos.copy_(torch.where(rows, qpos, sim.qpos))
        sim.qvel.copy_(torch.where(rows, qvel, sim.qvel))
        sim.kinematics(mask)
        if self.config.randomization.push_velocity[1]:
            self._await_push(mask)
        for buffer in (self.action, self.previous_action, self.action_before, self.mean_velocity):
            buffer.masked_fill_(rows, 0.0)
        self.phase.copy_(torch.where(mask, draw[:, 1], self.phase))
        self.coast.masked_fill_(mask, 1.0)
        self.episode_length.masked_fill_(mask, 0)
        self._episode_return.masked_fill_(mask, 0.0)
        if self.curriculum:
            self.curriculum.begin(mask)

    def _curriculum_targets(self) -> dict[str, Callable[[float], object]]:
        """What brings each figure of a stage into force; what is switched off is missing."""
        randomization = self.randomization
        targets: dict[str, Callable[[float], object]] = {"command_speed": self.command_speed.fill_}
        for name in ("mass", "friction"):
            if name in randomization.names:
                targets[f"{name}_variance"] = functools.partial(randomization.set_scale, name)
        if self.config.randomization.push_velocity[1]:
            targets["push_frequency"] = functools.partial(randomization.set_scale, "push_frequency")
        if self.config.terrain.levels > 1 and self.ground is not None:
            highest = self.config.terrain.levels - 1
            targets["terrain_difficulty"] = lambda share: self.max_terrain_level.fill_(share * highest)
        return targets

    def advance_curriculum(self, everywhere: Everywhere = lambda counts: [counts]) -> dict[str, float]:
        """Judge the training, see :meth:`RunningCurriculum.advance`; nothing without a curriculum.

        To be called between steps, as :class:`PPOAgent` does for each row of its log.
        """
        return self.curriculum.advance(everywhere) if self.curriculum else {}

    def _randomize(self, mask: torch.Tensor) -> None:
        delay = None
        if self.randomization.names:
            drawn = self.randomization.randomize(mask)
            self.randomization.apply_to_robot(mask)
            delay = drawn.get("action_delay")
        self.actuators.begin(mask, self.action_offset, delay)

    def render(self, world: int = 0) -> np.ndarray:  # type: ignore[override]
        """A picture of one world, RGB ``(480, 640, 3)`` uint8.

        Raises:
          RuntimeError: this machine can draw nothing; the message says what to install.
        """
        if self._camera is None:
            self._camera = Camera(self.simulation.model, self.robot.base_body)
        return self._camera.picture(self.simulation.data(world))

    def close_extras(self, **kwargs: Any) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def state_dict(self) -> dict[str, Any]:
        """All that the future of the environment depends on, its random generator included."""
        return {
            "simulation": self.simulation.state_dict(),
            "generator": self._generator.get_state(),
            "randomization": self.randomization.state_dict(),
            "actuators": self.actuators.state_dict(),
            **{name: getattr(self, name).clone() for name in _STATE},
            "levels": {name: tensor.clone() for name, tensor in self.levels.tensors().items()},
            "poses": {name: tensor.clone() for name, tensor in self._pose_tensors().items()},
            **({"curriculum": self.curriculum.state_dict()} if self.curriculum else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, bit for bit.

        Raises:
          ValueError: the state is of another number of worlds, another model, other randomization,
            actuators or poses, or one of both has no curriculum.
        """
        if ("curriculum" in state) != (self.curriculum is not None):
            raise ValueError("curriculum: switched on in the state or in this environment, not in both")
        require_state("randomization", state["randomization"], self.randomization.tensors())
        require_state("actuators", state["actuators"], self.actuators.tensors())
        require_state("poses", state["poses"], self._pose_tensors())
        self.simulation.load_state_dict(state["simulation"])
        self.recorder.clear()
        self._generator.set_state(state["generator"].cpu())
        self.randomization.load_state_dict(state["randomization"])
        self.actuators.load_state_dict(state["actuators"])
        for name in _STATE:
            getattr(self, name).copy_(state[name])
        for name, tensor in self.levels.tensors().items():
            tensor.copy_(state["levels"][name])
        if self.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])
        for name, tensor in self._pose_tensors().items():
            tensor.copy_(state["poses"][name])
        self._refresh()

    def _pose_tensors(self) -> dict[str, torch.Tensor]:
        return self.poses.tensors() if self.poses else {}


_STATE = (
    "command",
    "mean_velocity",
    "ordered",
    "heading",
    "turning",
    "command_speed",
    "phase",
    "coast",
    "action",
    "previous_action",
    "action_before",
    "episode_length",
    "_episode_return",
    "harness",
    "until_push",
)


def make_box(limit: float, size: int) -> gymnasium.spaces.Box:
    """Vectors of a length, float32, each component within +- ``limit``."""
    return gymnasium.spaces.Box(-limit, limit, (size,), np.float32)
