"""Isaac Sim's ``ArticulationView`` over a :class:`Simulation`: the same names, batched by world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kouros.checks import check_choice
from kouros.physics.rotations import rotate, rotate_inverse
from kouros.physics.simulation import Simulation
from kouros.robots import Robot

Index = slice | torch.Tensor
EnvIds = torch.Tensor | Sequence[int] | None


class ArticulationView:
    """One robot in every world of a simulation, addressed by joint and body names.

    Joint vectors are in ``dof_names`` order, which is ``robot.joint_names``. ``env_ids`` selects
    worlds by index, ``(n,)`` int; None is all of them. Getters return copies. Setters take
    ``(n, ...)`` or anything that broadcasts to it, touch no other world, and change the state
    only: derived fields follow at the simulation's next ``step`` or ``forward``.

    Attributes:
      joint_qpos, joint_qvel, joint_ctrl: columns of the robot's joints in the simulation's ``qpos``,
        ``qvel`` and ``ctrl`` (a slice where they lie in a row, so that indexing gives a live view).

    Raises:
      ValueError: the model lacks one of the robot's joints.
    """

    def __init__(self, simulation: Simulation, robot: Robot) -> None:
        model = simulation.model
        joints = [model.joint(i).name for i in range(model.njnt)]
        for name in robot.joint_names:
            check_choice("joint", name, joints)
        self.simulation, self.robot = simulation, robot
        self.joint_qpos = _index(model.joint(n).qposadr[0] for n in robot.joint_names)
        self.joint_qvel = _index(model.joint(n).dofadr[0] for n in robot.joint_names)
        self.joint_ctrl = _index(model.actuator(n).id for n in robot.joint_names)
        actuators = torch.tensor([model.actuator(n).id for n in robot.joint_names])

        def constant(values: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(values, dtype=simulation.dtype, device=simulation.device)

        self._gain = constant(model.actuator_gainprm[actuators, 0])
        self._stiffness = constant(-model.actuator_biasprm[actuators, 1])
        self._damping = constant(-model.actuator_biasprm[actuators, 2])
        default = constant(robot.default_joint_pos)
        self._position_target = default.repeat(simulation.num_worlds, 1)
        self._velocity_target = torch.zeros_like(self._position_target)
        self._effort_target = torch.zeros_like(self._position_target)

    @property
    def count(self) -> int:
        """Number of worlds."""
        return self.simulation.num_worlds

    @property
    def num_dof(self) -> int:
        return len(self.dof_names)

    @property
    def dof_names(self) -> tuple[str, ...]:
        return self.robot.joint_names

    @property
    def num_bodies(self) -> int:
        return len(self.body_names)

    @property
    def body_names(self) -> tuple[str, ...]:
        """The model's bodies without the world."""
        model = self.simulation.model
        return tuple(model.body(i).name for i in range(1, model.nbody))

    def get_joint_positions(self, env_ids: EnvIds = None) -> torch.Tensor:
        """Joint positions, rad, ``(n, num_dof)``."""
        return self._get(self.simulation.qpos, env_ids, self.joint_qpos)

    def set_joint_positions(self, positions: torch.Tensor, env_ids: EnvIds = None) -> None:
        """Set joint positions, rad."""
        self._set(self.simulation.qpos, positions, env_ids, self.joint_qpos)

    def get_joint_velocities(self, env_ids: EnvIds = None) -> torch.Tensor:
        """Joint velocities, rad/s, ``(n, num_dof)``."""
        return self._get(self.simulation.qvel, env_ids, self.joint_qvel)

    def set_joint_velocities(self, velocities: torch.Tensor, env_ids: EnvIds = None) -> None:
        """Set joint velocities, rad/s."""
        self._set(self.simulation.qvel, velocities, env_ids, self.joint_qvel)

    def get_joint_position_targets(self, env_ids: EnvIds = None) -> torch.Tensor:
        """Last position targets set here, rad, ``(n, num_dof)``; the default pose at first."""
        return self._get(self._position_target, env_ids)

    def set_joint_position_targets(self, targets: torch.Tensor, env_ids: EnvIds = None) -> None:
        """Set position targets ``q*``, rad: the servo gives ``kp (q* - q) + kd (v* - v) + effort``.

        Raises:
          ValueError: the actuators have no position gain (``control_mode``).
        """
        self._require(self._stiffness, "position targets", "'position'")
        self._set(self._position_target, targets, env_ids)
        self._write_ctrl(env_ids)

    def get_joint_velocity_targets(self, env_ids: EnvIds = None) -> torch.Tensor:
        """Last velocity targets set here, rad/s, ``(n, num_dof)``; zero at first."""
        return self._get(self._velocity_target, env_ids)

    def set_joint_velocity_targets(self, targets: torch.Tensor, env_ids: EnvIds = None) -> None:
        """Set velocity targets ``v*``, rad/s.

        Raises:
          ValueError: the actuators have no velocity gain (``control_mode``).
        """
        self._require(self._damping, "velocity targets", "'position' or 'velocity'")
        self._set(self._velocity_target, targets, env_ids)
        self._write_ctrl(env_ids)

    def get_joint_efforts(self, env_ids: EnvIds = None) -> torch.Tensor:
        """Last efforts set here, N m, ``(n, num_dof)``; zero at first."""
        return self._get(self._effort_target, env_ids)

    def set_joint_efforts(self, efforts: torch.Tensor, env_ids: EnvIds = None) -> None:
        """Set joint torques added to the servo's, N m."""
        self._set(self._effort_target, efforts, env_ids)
        self._write_ctrl(env_ids)

    def get_world_poses(self, env_ids: EnvIds = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Root position (m) and orientation (w, x, y, z), world frame, ``(n, 3)`` and ``(n, 4)``."""
        root = self._get(self.simulation.qpos, env_ids, slice(0, 7))
        return root[:, :3], root[:, 3:]

    def set_world_poses(
        self,
        positions: torch.Tensor | None = None,
        orientations: torch.Tensor | None = None,
        env_ids: EnvIds = None,
    ) -> None:
        """Set root positions (m) and/or unit orientations (w, x, y, z), world frame."""
        if positions is not None:
            self._set(self.simulation.qpos, positions, env_ids, slice(0, 3))
        if orientations is not None:
            self._set(self.simulation.qpos, orientations, env_ids, slice(3, 7))

    def get_velocities(self, env_ids: EnvIds = None) -> torch.Tensor:
        """Root linear (m/s) and angular (rad/s) velocity, both in the world frame, ``(n, 6)``."""
        velocity = self._get(self.simulation.qvel, env_ids, slice(0, 6))
        _, quat = self.get_world_poses(env_ids)
        return torch.cat((velocity[:, :3], rotate(quat, velocity[:, 3:])), dim=-1)

    def set_velocities(self, velocities: torch.Tensor, env_ids: EnvIds = None) -> None:
        """Set root linear (m/s) and angular (rad/s) velocity, both in the world frame."""
        _, quat = self.get_world_poses(env_ids)
        velocities = torch.as_tensor(
            velocities, dtype=self.simulation.dtype, device=self.simulation.device
        ).expand(len(quat), 6)
        angular_b = rotate_inverse(quat, velocities[:, 3:])
        value = torch.cat((velocities[:, :3], angular_b), dim=-1)
        self._set(self.simulation.qvel, value, env_ids, slice(0, 6))

    def get_body_masses(self, env_ids: EnvIds = None) -> torch.Tensor:
        """Masses in ``body_names`` order, kg, ``(n, num_bodies)``."""
        return self._get(self.simulation.model_field("body_mass"), env_ids, slice(1, None))

    def set_body_masses(self, masses: torch.Tensor, env_ids: EnvIds = None) -> None:
        """Set masses in ``body_names`` order, kg; inertias stay, derived constants follow."""
        self._set(self.simulation.model_field("body_mass"), masses, env_ids, slice(1, None))
        mask = None
        if env_ids is not None:
            mask = torch.zeros(self.count, dtype=torch.bool, device=self.simulation.device)
            mask[self._rows(env_ids)] = True
        self.simulation.set_const(mask)

    def _rows(self, env_ids: EnvIds) -> Index:
        if env_ids is None:
            return slice(None)
        rows = torch.as_tensor(env_ids, device=self.simulation.device)
        if rows.dtype == torch.bool or rows.is_floating_point() or rows.dim() != 1:
            raise ValueError(
                f"env_ids of shape {tuple(rows.shape)} and type {rows.dtype}: use world indices, (n,) int"
            )
        return rows

    def _get(self, values: torch.Tensor, env_ids: EnvIds, columns: Index = slice(None)) -> torch.Tensor:
        return values[self._rows(env_ids)][:, columns].clone()

    def _set(
        self,
        target: torch.Tensor,
        value: torch.Tensor,
        env_ids: EnvIds,
        columns: Index = slice(None),
    ) -> None:
        rows = self._rows(env_ids)
        value = torch.as_tensor(value, dtype=target.dtype, device=target.device)
        if isinstance(rows, torch.Tensor) and isinstance(columns, torch.Tensor):
            target[rows[:, None], columns] = value
        else:
            target[rows, columns] = value

    def _write_ctrl(self, env_ids: EnvIds) -> None:
        force = (
            self._stiffness * self._position_target
            + self._damping * self._velocity_target
            + self._effort_target
        )
        self._set(
            self.simulation.ctrl,
            (force / self._gain)[self._rows(env_ids)],
            env_ids,
            self.joint_ctrl,
        )

    def _require(self, gain: torch.Tensor, what: str, modes: str) -> None:
        if not bool((gain != 0).all()):
            raise ValueError(f"{what} have no effect with these actuators: use control_mode={modes}")


def _index(addresses) -> Index:
    """A slice where the addresses lie in a row, else a tensor."""
    addresses = [int(a) for a in addresses]
    first, n = addresses[0], len(addresses)
    return slice(first, first + n) if addresses == list(range(first, first + n)) else torch.tensor(addresses)
