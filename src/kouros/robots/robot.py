"""What a robot is: names, figures and a MuJoCo model, with nothing of any task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import mujoco
import numpy as np

from kouros.checks import check_choice

ControlMode = Literal["position", "velocity", "effort"]
Collisions = Literal["feet", "full"]

BASE_SENSORS = {
    "imu_gyro": mujoco.mjtSensor.mjSENS_GYRO,
    "imu_accelerometer": mujoco.mjtSensor.mjSENS_ACCELEROMETER,
    "imu_orientation": mujoco.mjtSensor.mjSENS_FRAMEQUAT,
    "imu_linear_velocity": mujoco.mjtSensor.mjSENS_VELOCIMETER,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Robot:
    """A humanoid: every joint vector below is ``(num_joints,)`` in ``joint_names`` order, SI units.

    Attributes:
      name: the name a policy file is checked against.
      joint_names: actuated joints, in the order of every public joint vector.
      joint_range: lower and upper position limits, ``(num_joints, 2)``, rad.
      default_joint_pos: standing pose, rad. Position targets are offsets from it.
      stiffness: position gain of the joint's PD servo, N m/rad.
      damping: velocity gain of the joint's PD servo, N m s/rad.
      effort_limit: largest joint torque, N m.
      armature: rotor inertia reflected to the joint, kg m^2.
      full_torque_speed: joint speed up to which a motor gives all its torque, rad/s.
      no_load_speed: joint speed at which it gives none in the direction it turns, rad/s.
      action_scale: change of position target per unit of action, rad.
      base_body: the floating body (its free joint carries the root state).
      base_height: height of the base above flat ground in the default pose, m.
      torso: site on the torso, which must stay upright; its z axis is up in the default pose.
      feet, hands: site names, left then right.
      foot_bodies: bodies whose geoms carry the robot, left then right.
      imu: site of the inertial measurement unit; its axes are the base's axes.
      mirror_joint: index of each joint's mirror image, ``(num_joints,)`` int.
      mirror_sign: ``q_mirrored = mirror_sign * q[mirror_joint]``, ``(num_joints,)``, each 1 or -1.
      build: makes the bare model specification; use :meth:`spec`, which adds servos and sensors.
    """

    name: str
    joint_names: tuple[str, ...]
    joint_range: np.ndarray
    default_joint_pos: np.ndarray
    stiffness: np.ndarray
    damping: np.ndarray
    effort_limit: np.ndarray
    armature: np.ndarray
    full_torque_speed: np.ndarray
    no_load_speed: np.ndarray
    action_scale: np.ndarray
    base_body: str
    base_height: float
    torso: str
    feet: tuple[str, str]
    hands: tuple[str, str]
    foot_bodies: tuple[str, str]
    imu: str
    mirror_joint: np.ndarray
    mirror_sign: np.ndarray
    build: Callable[[Collisions], mujoco.MjSpec]

    @property
    def num_joints(self) -> int:
        return len(self.joint_names)

    def spec(self, control_mode: ControlMode = "position", collisions: Collisions = "feet") -> mujoco.MjSpec:
        """The robot alone (no ground, no light) with servos and sensors, ready for a scene.

        Each joint has one actuator of its own name, whose force is
        ``clip(gain * ctrl - kp * q - kd * qvel, +-effort_limit)``:

        ========== ================= =========== =========
        mode       ctrl              gain        kp, kd
        ========== ================= =========== =========
        position   target, rad       stiffness   stiffness, damping
        velocity   target, rad/s     damping     0, damping
        effort     torque, N m       1           0, 0
        ========== ================= =========== =========

        Sensors: ``imu_gyro`` (rad/s), ``imu_accelerometer`` (m/s^2), ``imu_orientation``
        (quaternion, world frame) and ``imu_linear_velocity`` (m/s, IMU frame, not measurable on a
        real robot); ``torso_up`` (the torso's z axis, world frame); for each site of ``feet`` and
        ``hands``, ``<site>_position`` (m, world frame); for each of ``feet``, left then right, also
        ``<site>_velocity`` (m/s, world frame) and ``<site>_contact`` (number of contacts, then the
        net force of the ground on the foot, N, world frame).

        Raises:
          ValueError: unknown ``control_mode`` or ``collisions``.
        """
        check_choice("control_mode", control_mode, get_args(ControlMode))
        check_choice("collisions", collisions, get_args(Collisions))
        spec = self.build(collisions)
        for i, joint in enumerate(self.joint_names):
            actuator = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            kp, kd = float(self.stiffness[i]), float(self.damping[i])
            if control_mode == "position":
                actuator.set_to_position(kp=kp, kv=kd)
            elif control_mode == "velocity":
                actuator.set_to_velocity(kv=kd)
            else:
                actuator.set_to_motor()
            limit = float(self.effort_limit[i])
            actuator.forcelimited, actuator.forcerange = True, [-limit, limit]
        self._add_sensors(spec)
        return spec

    def _add_sensors(self, spec: mujoco.MjSpec) -> None:
        sensor, obj = mujoco.mjtSensor, mujoco.mjtObj

        def at_site(name: str, kind: mujoco.mjtSensor, site: str) -> None:
            spec.add_sensor(name=name, type=kind, objtype=obj.mjOBJ_SITE, objname=site)

        for name, kind in BASE_SENSORS.items():
            at_site(name, kind, self.imu)
        at_site("torso_up", sensor.mjSENS_FRAMEZAXIS, self.torso)
        for site in (*self.feet, *self.hands):
            at_site(f"{site}_position", sensor.mjSENS_FRAMEPOS, site)
        for site in self.feet:
            at_site(f"{site}_velocity", sensor.mjSENS_FRAMELINVEL, site)
        found, force = (
            mujoco.mjtConDataField.mjCONDATA_FOUND,
            mujoco.mjtConDataField.mjCONDATA_FORCE,
        )
        for site, body in zip(self.feet, self.foot_bodies, strict=True):
            contact = spec.add_sensor(
                name=f"{site}_contact",
                type=sensor.mjSENS_CONTACT,
                # The first object feels the reaction, so the ground comes first: force on the foot.
                objtype=obj.mjOBJ_BODY,
                objname="world",
                reftype=obj.mjOBJ_BODY,
                refname=body,
            )
            contact.intprm[:3] = [1 << int(found) | 1 << int(force), NET_FORCE, 1]


NET_FORCE = 3  # mjSENS_CONTACT, intprm[1]: reduce="netforce" (XMLreference, sensor-contact-reduce)


def mirror_from_names(joint_names: tuple[str, ...], axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror image of each joint across the sagittal (x-z) plane, from names and axes.

    ``left_*`` and ``right_*`` exchange places; a rotation about y keeps its sign, one about x or z
    changes it (a rotation vector is a pseudovector).

    Args:
      joint_names: the joints.
      axes: joint axes in the body frames, ``(num_joints, 3)``, each along one coordinate axis.

    Returns:
      ``mirror_joint`` (int) and ``mirror_sign``, each ``(num_joints,)``.
    """
    return mirror_pairs(joint_names), np.where(np.abs(axes[:, 1]) > 0.5, 1.0, -1.0)


def mirror_pairs(names: Sequence[str]) -> np.ndarray:
    """Index of each name's mirror image: ``left_*`` and ``right_*`` exchange places, others stay."""
    swap = {"left": "right", "right": "left"}

    def image(name: str) -> str:
        side, _, rest = name.partition("_")
        return f"{swap[side]}_{rest}" if side in swap else name

    return np.array([list(names).index(image(name)) for name in names])
