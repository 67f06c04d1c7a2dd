"""The servos of every world's joints: PD gains, torque limits, a motor's speed limit, the way to them."""

from __future__ import annotations

from typing import Any

import torch

from kouros.envs.config import HumanoidEnvConfig
from kouros.physics.articulation import ArticulationView

# Terms of the randomization that change a servo's parameters.
MOTOR_TERMS = ("motor_strength", "stiffness", "damping", "encoder_bias")


class Actuators:
    """Turns joint targets into what the engine's actuators are given, before each physics step.

    The torque of a joint is ``clip(gain target - kp (q + bias) - kd v, low, high)``, with the gains of
    ``Robot.spec``. ``actuator="implicit"`` leaves it to the engine, which integrates ``kd v`` implicitly;
    ``"explicit"`` computes it here from the joint's state and gives it to plain motors. With
    ``torque_speed`` a motor gives its full torque against its motion, and along it up to
    ``robot.full_torque_speed``; from there the limit falls linearly to none at ``robot.no_load_speed`` (a DC
    motor's line at constant voltage).

    Attributes:
      simulation, robot: whose they are.
      dofs: columns of the joints in the simulation's ``qvel``.
      delay: ``(num_envs, 1)`` int, physics steps from a target to the servo.

    Args:
      view: the robot in every world.
      config: of the environment.
    """

    def __init__(self, view: ArticulationView, config: HumanoidEnvConfig) -> None:
        self.simulation, self.robot = sim, robot = view.simulation, view.robot
        self.dofs = view.joint_qvel
        self._explicit, self._torque_speed = config.actuator == "explicit", config.torque_speed
        self._substeps, self._timestep = config.frame_skip, config.timestep
        self._ctrl = sim.ctrl[:, view.joint_ctrl]
        self._position, self._velocity = sim.qpos[:, view.joint_qpos], sim.qvel[:, view.joint_qvel]

        def constant(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=sim.dtype, device=sim.device)

        self._mode = config.control_mode
        kp, kd, none = robot.stiffness, robot.damping, 0.0 * robot.damping
        servos = {
            "position": (kp, kp, kd),
            "velocity": (kd, none, kd),
            "effort": (none + 1.0, none, none),
        }
        self._servo = servos[config.control_mode]  # gain of the target, kp, kd; see Robot.spec
        self._full_speed = constant(robot.full_torque_speed)
        self._no_load_speed = constant(robot.no_load_speed)
        # What a servo is made of: the engine's own figures where the engine is the servo.
        nominal = self.population({})
        self._parameters = {
            name: constant(table).repeat(sim.num_worlds, *[1] * (table.dim() - 1))
            for name, table in nominal.items()
            if self._explicit or (name == "range" and self._torque_speed)
        }
        self._motor_range: torch.Tensor | None = None
        if not self._explicit:
            columns = view.joint_ctrl
            if any(term in config.randomization.enabled() for term in MOTOR_TERMS):
                self._parameters["gain"] = sim.model_field("actuator_gainprm")[:, columns, 0]
                self._parameters["bias"] = sim.model_field("actuator_biasprm")[:, columns, :3]
                if not self._torque_speed:
                    self._parameters["range"] = sim.model_field("actuator_forcerange")[:, columns]
            if self._torque_speed:
                self._motor_range = sim.model_field("actuator_forcerange")[:, columns]
        # The last targets, the newest first.
        longest = round(config.randomization.action_delay[1] / config.timestep)
        ages = -(-longest // self._substeps)
        shape = (ages + 1, *self._ctrl.shape)
        self._targets = torch.zeros(shape, device=sim.device)
        self.delay = torch.zeros(sim.num_worlds, 1, dtype=torch.int64, device=sim.device)
        self._each_substep = bool(ages or self._explicit or self._torque_speed)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Of each world, live: ``gain`` ``(n, num_joints)``, ``bias`` ``(n, num_joints, 3)`` (constant, of
        position, of velocity) and ``range`` ``(n, num_joints, 2)`` (N m)."""
        return self._parameters

    def population(self, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters of robots that differ by terms of the randomization, ``(k, num_joints)`` each."""
        gain, kp, kd = (torch.from_numpy(part).unsqueeze(0) for part in self._servo)
        one = torch.ones_like(kp)
        strength = terms.get("motor_strength", one)
        stiffness, damping = (terms.get(name, one) for name in ("stiffness", "damping"))
        along = {"position": stiffness, "velocity": damping}.get(self._mode, one)
        kp, kd = kp * strength * stiffness, kd * strength * damping
        error = terms.get("encoder_bias", 0.0 * one)
        limit = torch.from_numpy(self.robot.effort_limit) * strength
        return {
            "gain": gain * strength * along,
            "bias": torch.stack(torch.broadcast_tensors(-kp * error, -kp, -kd), dim=-1),
            "range": torch.stack((-limit, limit), dim=-1),
        }

    def step(self, targets: torch.Tensor) -> None:
        """One control step of every world towards targets ``(num_envs, num_joints)``."""
        if len(self._targets) > 1:
            self._targets[1:] = self._targets[:-1].clone()
        self._targets[0] = targets
        if self._each_substep:
            self.simulation.step(self._substeps, self._drive)
        else:
            self._ctrl.copy_(targets)
            self.simulation.step(self._substeps)

    def _drive(self, substep: int) -> None:
        """Before a physics step: what the actuators are given in it."""
        target = self._targets[0]
        for age in range(1, len(self._targets)):
            since = substep + (age - 1) * self._substeps  # physics steps since the target after this one
            target = torch.where(self.delay > since, self._targets[age], target)
        if not (self._explicit or self._torque_speed):
            self._ctrl.copy_(target)
            return
        low, high = self._parameters["range"].unbind(-1)
        if self._torque_speed:
            span = self._no_load_speed - self._full_speed
            low = low * ((self._no_load_speed + self._velocity) / span).clamp(0.0, 1.0)
            high = high * ((self._no_load_speed - self._velocity) / span).clamp(0.0, 1.0)
        if self._motor_range is not None:
            self._motor_range.copy_(torch.stack((low, high), dim=-1))
        if self._explicit:
            constant, kp, kd = self._parameters["bias"].unbind(-1)
            torque = self._parameters["gain"] * target + constant
            target = (torque + kp * self._position + kd * self._velocity).clamp(low, high)
        self._ctrl.copy_(target)

    def begin(self, mask: torch.Tensor, target: torch.Tensor, delay: torch.Tensor | None) -> None:
        """Start episodes in the worlds of the mask.

        Args:
          mask: of the worlds.
          target: what the servos were given before the episode, ``(num_joints,)`` or of each world.
          delay: of each world, s, ``(num_envs, 1)``; None for none.
        """
        if len(self._targets) > 1:
            self._targets.copy_(torch.where(mask.view(1, -1, 1), target, self._targets))
        if delay is not None:
            self.delay.copy_((delay / self._timestep).round())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What one step leaves for the next."""
        return {"targets": self._targets, "delay": self.delay, **self._parameters}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
