"""A robot of its own: one plain ``mj_step`` loop with servos, sensors and their faults.

It shares nothing with ``kouros.envs`` but the robot's figures: what a policy learnt there is tried here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Mapping
from typing import Any, Literal, get_args

import mujoco
import numpy as np

from kouros.checks import check_choice, require, require_numbers
from kouros.deploy.loop import Gains, realtime_priority
from kouros.deploy.udp import RobotServer
from kouros.robots import get_robot
from kouros.robots.robot import Collisions

# Standard deviations of the sensors' noise, SI units, as in the preset sim2real.
NOISE = {"base_ang_vel": 0.1, "projected_gravity": 0.03, "joint_pos": 0.006, "joint_vel": 0.5}


@dataclasses.dataclass(frozen=True)
class World:
    """In what the simulated robot differs from the one in training. The default differs in everything."""

    timestep: float = 0.001
    """Physics step, and period of the servos' own control loop, s."""
    collisions: Collisions = "full"
    """feet: the soles against the ground. full: every shape, and the robot itself."""
    elliptic: bool = True
    """Elliptic friction cones instead of pyramids."""
    friction: float = 0.8
    """Friction coefficient of the ground."""
    sensor_delay: float = 0.004
    """Age of the sensors when they are read, s."""
    action_delay: float = 0.002
    """Time from a command to the servos, s."""
    noise: float = 0.5
    """Noise of the sensors, as a factor on NOISE."""
    shuffled: bool = True
    """Joints in another order on the wire."""

    def __post_init__(self) -> None:
        require_numbers(self)
        check_choice("collisions", self.collisions, get_args(Collisions))
        require(self, "timestep", 0 < self.timestep <= 0.01, "must lie in (0, 0.01] s")
        for name in ("friction", "sensor_delay", "action_delay", "noise"):
            require(self, name, getattr(self, name) >= 0, "must not be negative")


# As in training: what each field of World is there, physics apart from the engine's own settings.
AS_TRAINED = World(0.005, "feet", False, 1.0, 0.0, 0.0, 0.0, False)


class SimulatedRobot:
    """One robot on flat ground, moved by what is written to it and nothing else.

    A servo's torque is ``kp (target - q) - kd dq``, within the motor's limit, at every physics step. The
    robot hangs on a gantry until :meth:`release`, as a real one does.

    Args:
      robot: its name.
      world: what it is tried in.
      seed: of the noise and of the order of the joints.

    Attributes:
      joint_names: as the wire has them.
      data: MuJoCo's state, the truth.
    """

    def __init__(self, robot: str = "g1", world: World | None = None, seed: int = 0) -> None:
        self.world = world = world or World()
        self.robot = get_robot(robot)
        self.model = self._make_model()
        self.data = mujoco.MjData(self.model)
        self._random = np.random.default_rng(seed)
        names = list(self.robot.joint_names)
        if world.shuffled:
            self._random.shuffle(names)
        self.joint_names = tuple(names)
        index = [self.model.joint(name) for name in names]
        self._q = np.array([int(joint.qposadr[0]) for joint in index])
        self._v = np.array([int(joint.dofadr[0]) for joint in index])
        self._u = np.array([self.model.actuator(name).id for name in names])
        self._base = self.model.body(self.robot.base_body).id
        self.reset()

    def _make_model(self) -> mujoco.MjModel:
        world = self.world
        spec = self.robot.spec("effort", world.collisions)
        spec.worldbody.add_geom(
            type=mujoco.mjtGeom.mjGEOM_PLANE,
            size=[0, 0, 1],
            friction=[world.friction, 0.005, 0.0001],
            priority=1,
            contype=1,
            conaffinity=0,
        )
        spec.option.timestep = world.timestep
        if world.elliptic:
            spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
        return spec.compile()

    def reset(self, qpos: np.ndarray | None = None, qvel: np.ndarray | None = None) -> None:
        """Begin anew at a state in MuJoCo's order, or on the gantry in the default pose, limp."""
        mujoco.mj_resetData(self.model, self.data)
        self.gantry = qpos is None
        if qpos is None:
            qpos = self.data.qpos.copy()
            qpos[2] = self.robot.base_height
            for name, angle in zip(self.robot.joint_names, self.robot.default_joint_pos, strict=True):
                qpos[self.model.joint(name).qposadr[0]] = angle
        self.data.qpos[:] = qpos
        if qvel is not None:
            self.data.qvel[:] = qvel
        mujoco.mj_forward(self.model, self.data)
        joints = np.zeros(len(self.joint_names))
        self._command = (self.data.qpos[self._q].copy(), joints, joints)
        self._commands: collections.deque = collections.deque()
        samples = 1 + round(self.world.sensor_delay / self.world.timestep)
        self._samples: collections.deque = collections.deque([self._measure()] * samples, samples)

    def release(self) -> None:
        """Let go of the gantry."""
        self.gantry = False

    def _measure(self) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        # Of the state, not of MuJoCo's sensors: after a step those are of the state before it.
        data, down = self.data, -self._rotation[2]
        return data.time, data.qvel[3:6].copy(), down, data.qpos[self._q].copy(), data.qvel[self._v].copy()

    @property
    def _rotation(self) -> np.ndarray:
        """From the base's frame to the world's, ``(3, 3)``."""
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, self.data.qpos[3:7])
        return matrix.reshape(3, 3)

    def read(self) -> dict[str, Any]:
        """The sensors as they come over the wire: late, with noise, joints by name."""
        time, gyro, down, position, velocity = self._samples[0]
        values = {
            "base_ang_vel": gyro,
            "projected_gravity": down,
            "joint_pos": position,
            "joint_vel": velocity,
        }
        for name, value in values.items() if self.world.noise else ():
            std = self.world.noise * NOISE[name]
            values[name] = value + std * self._random.standard_normal(len(value))
        sensors: dict[str, Any] = {"time": time}
        for name, value in values.items():
            listed = value.tolist()
            sensors[name] = dict(zip(self.joint_names, listed, strict=True)) if "joint" in name else listed
        return sensors

    def write(self, targets: Mapping[str, float], gains: Gains) -> None:
        """Command the servos: targets (rad) and both gains (N m/rad, N m s/rad), by joint."""
        command = tuple(
            np.array([values[name] for name in self.joint_names], float) for values in (targets, *gains)
        )
        self._commands.append((self.data.time + self.world.action_delay, command))

    def advance(self, seconds: float) -> None:
        """Let time pass, in whole physics steps."""
        model, data = self.model, self.data
        limit = self.model.actuator_forcerange[self._u, 1]
        for _ in range(round(seconds / self.world.timestep)):
            while self._commands and self._commands[0][0] <= data.time + 1e-9:
                self._command = self._commands.popleft()[1]
            target, stiffness, damping = self._command
            torque = stiffness * (target - data.qpos[self._q]) - damping * data.qvel[self._v]
            data.ctrl[self._u] = np.clip(torque, -limit, limit)
            if self.gantry:
                self._hold()
            mujoco.mj_step(model, data)
            self._samples.append(self._measure())
        data.xfrc_applied[self._base] = 0.0

    def _hold(self) -> None:
        """The gantry: springs on the base that keep it upright and where it is."""
        data = self.data
        away = np.array([*data.qpos[:2], data.qpos[2] - self.robot.base_height])
        turn = np.zeros(3)
        mujoco.mju_quat2Vel(turn, data.qpos[3:7], 1.0)  # the axis times the angle, world frame
        spin = np.zeros(3)
        mujoco.mju_rotVecQuat(spin, data.qvel[3:6], data.qpos[3:7])
        data.xfrc_applied[self._base, :3] = -5000.0 * away - 500.0 * data.qvel[:3]
        data.xfrc_applied[self._base, 3:] = -500.0 * turn - 50.0 * spin

    @property
    def joint_positions(self) -> dict[str, float]:
        """True joint positions, rad, by joint."""
        return dict(zip(self.joint_names, self.data.qpos[self._q].tolist(), strict=True))

    def push(self, velocity: tuple[float, float]) -> None:
        """Add to the base's horizontal velocity at once, m/s, world frame."""
        self.data.qvel[:2] += velocity

    @property
    def tilt(self) -> float:
        """True tilt of the base, rad."""
        return math.acos(max(-1.0, min(1.0, self._rotation[2, 2])))

    @property
    def height(self) -> float:
        """True height of the base, m."""
        return float(self.data.qpos[2])

    @property
    def velocity(self) -> np.ndarray:
        """True velocity of the base along its heading, to its left (m/s), and its yaw rate (rad/s)."""
        x, y = self._rotation[:2, 0]
        forward = np.array([x, y]) / max(math.hypot(x, y), 1e-9)
        vx, vy = self.data.qvel[:2]
        return np.array(
            [vx * forward[0] + vy * forward[1], vy * forward[0] - vx * forward[1], self.data.qvel[5]]
        )


Fault = Literal["none", "silent", "frozen", "nan", "garbage", "killed"]


@dataclasses.dataclass
class Served:
    """A simulated robot behind a socket, in real time, with a clock of its own."""

    robot: str = "g1"
    """Robot, by name."""
    port: int = 0
    """UDP port of this machine to listen on; 0: any."""
    rate: float = 500.0
    """Sensor messages per second."""
    seed: int = 0
    """Of the noise and the order of the joints."""
    fault: Fault = "none"
    """What its sensors do wrong: stop, repeat themselves, turn NaN, turn into garbage; or the robot's
    computer is killed."""
    fault_after: float = 5.0
    """Time of the fault, s after the policy's first command."""
    push: float = 0.0
    """Speed that a push from a random side adds to the base every 5 s, m/s."""
    parent: int = 0
    """Number of the process that started this one and that it ends with; 0: none."""
    world: World = dataclasses.field(default_factory=World)


def serve(config: Served) -> None:
    """Run until killed: step in real time, send sensors, obey one controller, brake when it is silent.

    The first line on standard output is the port.
    """
    sim = SimulatedRobot(config.robot, config.world, config.seed)
    server = RobotServer(config.robot, sim.joint_names, port=config.port)
    print(server.address[1], flush=True)
    still = dict.fromkeys(sim.joint_names, 0.0)
    soft = dict(zip(sim.robot.joint_names, sim.robot.damping.tolist(), strict=True))
    random = np.random.default_rng(config.seed)
    period, offset = 1.0 / config.rate, 1e3 * random.random()
    begun, next_push = math.inf, math.inf
    frozen: dict[str, Any] | None = None
    with realtime_priority():
        deadline = time.perf_counter()
        while config.parent in (0, os.getppid()):
            command = server.poll()
            if command is not None:
                mode = command["mode"]
                if mode == "policy" and sim.gantry:
                    sim.release()
                    begun, next_push = sim.data.time, sim.data.time + 5.0
                if mode == "damping" and "targets" not in command:
                    sim.write(still, (still, soft))
                else:
                    sim.write(command["targets"], (command["stiffness"], command["damping"]))
            if config.push and sim.data.time > next_push:
                angle = 2.0 * math.pi * random.random()
                sim.push((config.push * math.cos(angle), config.push * math.sin(angle)))
                next_push += 5.0
            sim.advance(period)
            sensors = sim.read()
            sensors["time"] += offset
            if config.fault != "none" and sim.data.time > begun + config.fault_after:
                frozen = frozen or sensors
                if config.fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if config.fault == "frozen":
                    sensors = {**sensors, "joint_pos": frozen["joint_pos"]}
                if config.fault == "nan":
                    sensors["base_ang_vel"][1] = math.nan
                if config.fault == "garbage" and server.controller:
                    server.send_bytes(random.bytes(200), server.controller)
            if config.fault not in ("silent", "garbage") or frozen is None:
                server.send_sensors(sensors)
            deadline += period
            left = deadline - time.perf_counter()
            if left > 0.0:
                time.sleep(left)
            elif left < -0.1:  # too slow, or asleep: time that is lost is lost
                deadline -= left


if __name__ == "__main__":
    import tyro

    with contextlib.suppress(KeyboardInterrupt):
        serve(tyro.cli(Served))
