"""Commands, velocities and poses: what every world is asked to do, drawn anew from time to time."""

from __future__ import annotations

import torch

from kouros.envs.config import BENDS, HumanoidEnvConfig, by_part
from kouros.physics.rotations import yaw_of
from kouros.robots import Robot


class VelocityCommands:
    """Commands of ``config.num_envs`` worlds, in tensors that stay where they are.

    A draw is even between the bounds of ``command_vx``, ``command_vy`` and ``command_yaw``, times
    ``speed``; a share of ``standing_fraction`` of them, and those no larger than ``standing_command``,
    become zero. In a share of ``heading_fraction`` of the others the yaw rate is not drawn but turns
    the base towards a heading, see :meth:`follow_heading`.

    Attributes:
      command: ``(num_envs, 3)`` vx, vy (m/s, base frame) and yaw rate (rad/s).
      ordered: ``(num_envs,)`` bool, whether the command is more than ``standing_command``.
      heading: ``(num_envs,)`` rad in [-pi, pi), world frame, where ``turning``.
      turning: ``(num_envs,)`` bool, whether the yaw rate follows the heading.
      speed: ``()``, factor on the bounds from the next draw on, on the yaw rate of a heading at once.

    Args:
      config: bounds and shares.
      generator: of the draws; every world draws, masked or not.
    """

    def __init__(self, config: HumanoidEnvConfig, generator: torch.Generator) -> None:
        self.config, self._generator = config, generator
        n, device = config.num_envs, generator.device
        bounds = torch.tensor([config.command_vx, config.command_vy, config.command_yaw], device=device)
        self._low, self._high = bounds.unbind(-1)
        self._range = self._high - self._low
        self.command = torch.zeros(n, 3, device=device)
        self.ordered = torch.zeros(n, dtype=torch.bool, device=device)
        self.heading = torch.zeros(n, device=device)
        self.turning = torch.zeros_like(self.ordered)
        self.speed = torch.ones((), device=device)

    def set(self, command: torch.Tensor) -> None:
        """Command every world from outside, until its next draw.

        Args:
          command: ``(num_envs, 3)`` or what broadcasts to it.
        """
        self.turning.zero_()
        self._write(command)

    def resample(self, mask: torch.Tensor, base_quat_w: torch.Tensor) -> None:
        """Draw the commands of the worlds in the mask.

        Args:
          mask: ``(num_envs,)`` bool.
          base_quat_w: ``(num_envs, 4)``, where the worlds look now.
        """
        config, device = self.config, self.command.device
        size = 6 if config.heading_fraction else 4
        draw = torch.rand(config.num_envs, size, generator=self._generator, device=device)
        walking = draw[:, 3] >= config.standing_fraction
        command = torch.addcmul(self._low, self._range, draw[:, :3]) * self.speed
        if config.heading_fraction:
            turning = walking & (draw[:, 4] < config.heading_fraction)
            heading = (2.0 * torch.pi) * draw[:, 5] - torch.pi
            self.turning.copy_(torch.where(mask, turning, self.turning))
            self.heading.copy_(torch.where(mask, heading, self.heading))
            command = self._turned(command, base_quat_w)
        command = command * (walking & self._more_than_standing(command)).unsqueeze(-1)
        self._write(torch.where(mask.unsqueeze(-1), command, self.command))

    def follow_heading(self, base_quat_w: torch.Tensor) -> None:
        """Bring the yaw rates of turning worlds up to date: ``heading_stiffness`` times the way left to turn.

        Within the bounds of ``command_yaw``, the shorter way round; a command that has become no larger
        than ``standing_command`` is zero.
        """
        if self.config.heading_fraction:
            command = self._turned(self.command, base_quat_w)
            stays = ~self.turning | self._more_than_standing(command)
            self._write(command * stays.unsqueeze(-1))

    def _turned(self, command: torch.Tensor, base_quat_w: torch.Tensor) -> torch.Tensor:
        left = torch.remainder(self.heading - yaw_of(base_quat_w) + torch.pi, 2.0 * torch.pi) - torch.pi
        rate = self.config.heading_stiffness * left
        rate = torch.clamp(rate, self._low[2] * self.speed, self._high[2] * self.speed)
        rate = torch.where(self.turning, rate, command[:, 2])
        return torch.cat((command[:, :2], rate.unsqueeze(-1)), dim=-1)

    def _more_than_standing(self, command: torch.Tensor) -> torch.Tensor:
        return command.square().sum(-1) > self.config.standing_command**2

    def _write(self, command: torch.Tensor) -> None:
        self.command.copy_(command)
        self.ordered.copy_(self._more_than_standing(self.command))


class PoseCommands:
    """Poses to hold of ``config.num_envs`` worlds, in tensors that stay where they are.

    A draw is even within ``pose_range`` about the default pose; its knees are bent further by a draw from
    ``crouch``, of which hips and ankles each take half, so that the soles stay flat. What is commanded goes
    there at ``pose_speed``.

    Attributes:
      pose: ``(num_envs, num_joints)`` rad, what is commanded now.
      goal: where it goes.

    Args:
      config: bounds and speed.
      robot: whose joints they are.
      generator: of the draws; every world draws, masked or not.
    """

    def __init__(self, config: HumanoidEnvConfig, robot: Robot, generator: torch.Generator) -> None:
        self.config, self._generator = config, generator

        def constant(values: object) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=generator.device)

        self._default = constant(robot.default_joint_pos)
        self._range = constant(by_part("pose_range", config.pose_range, robot.joint_names))
        bends = BENDS if any(config.crouch) else {}
        self._bends = constant(by_part("crouch", bends, robot.joint_names))
        self._low, self._high = constant(robot.joint_range).unbind(-1)
        self.pose = self._default.repeat(config.num_envs, 1)
        self.goal = self.pose.clone()

    def resample(self, mask: torch.Tensor, at_once: bool = False) -> None:
        """Draw the goals of the worlds in the mask; with ``at_once`` the pose is there already."""
        rows, joints = self.goal.shape
        draw = torch.rand(rows, joints + 1, generator=self._generator, device=mask.device)
        low, high = self.config.crouch
        bend = low + (high - low) * draw[:, -1:]
        goal = self._default + self._range * (2.0 * draw[:, :-1] - 1.0) + self._bends * bend
        goal = torch.clamp(goal, self._low, self._high)
        for tensor in (self.goal, self.pose) if at_once else (self.goal,):
            tensor.copy_(torch.where(mask.unsqueeze(-1), goal, tensor))

    def advance(self) -> None:
        """Bring the poses a control step nearer to their goals."""
        most = self.config.pose_speed * self.config.control_dt
        self.pose += (self.goal - self.pose).clamp(-most, most)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What one step leaves for the next."""
        return {"pose": self.pose, "goal": self.goal}
