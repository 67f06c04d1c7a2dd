"""The simulated robot against a dozen lines of ``mj_step``, rotation matrices, and more exact twins."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from kouros.deploy.simulator import AS_TRAINED, NOISE, SimulatedRobot, World
from kouros.robots.robot import Robot

EXACT = World(sensor_delay=0.0, action_delay=0.0, noise=0.0)
VECTORS, JOINTS = ("base_ang_vel", "projected_gravity"), ("joint_pos", "joint_vel")


def gains(robot: Robot) -> tuple[dict[str, float], dict[str, float]]:
    stiffness, damping = (
        dict(zip(robot.joint_names, values.tolist(), strict=True))
        for values in (robot.stiffness, robot.damping)
    )
    return stiffness, damping


def commands(robot: Robot, count: int, scale: float = 0.3) -> Iterator[dict[str, float]]:
    """Targets somewhere about the default pose."""
    random = np.random.default_rng(0)
    for _ in range(count):
        pose = robot.default_joint_pos + scale * random.standard_normal(robot.num_joints)
        yield dict(zip(robot.joint_names, pose.tolist(), strict=True))


def begun(world: World, robot: Robot, seed: int = 0) -> SimulatedRobot:
    """A robot off the gantry, on its feet and in motion."""
    sim = SimulatedRobot("g1", world, seed)
    qvel = np.random.default_rng(1).normal(0.0, 0.3, sim.model.nv)
    sim.reset(sim.data.qpos.copy(), qvel)
    return sim


@pytest.mark.parametrize("world", [EXACT, AS_TRAINED], ids=["other", "as trained"])
def test_bit_equal_to_a_loop_over_mj_step(robot: Robot, world: World) -> None:
    """Servos at every physics step, torques limited, through falls and contacts."""
    spec = robot.spec("effort", world.collisions)
    ground = {"friction": [world.friction, 0.005, 0.0001], "priority": 1, "contype": 1, "conaffinity": 0}
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 1], **ground)
    spec.option.timestep = world.timestep
    cones = mujoco.mjtCone
    spec.option.cone = cones.mjCONE_ELLIPTIC if world.elliptic else cones.mjCONE_PYRAMIDAL
    model = spec.compile()
    sim, data = begun(world, robot), mujoco.MjData(model)
    limited = touching = 0
    data.qpos[:], data.qvel[:] = sim.data.qpos, sim.data.qvel
    mujoco.mj_forward(model, data)
    for targets in commands(robot, 50, scale=1.0):
        sim.write(targets, gains(robot))
        sim.advance(0.02)
        for _ in range(round(0.02 / world.timestep)):
            torque = robot.stiffness * (np.array([*targets.values()]) - data.qpos[7:])
            torque -= robot.damping * data.qvel[6:]
            data.ctrl[:] = np.clip(torque, -robot.effort_limit, robot.effort_limit)
            limited += int((data.ctrl != torque).sum())
            mujoco.mj_step(model, data)
            touching = max(touching, data.ncon)
        np.testing.assert_array_equal(sim.data.qpos, data.qpos)
        np.testing.assert_array_equal(sim.data.qvel, data.qvel)
    assert limited > 0 and touching > 2


class TestSensors:
    def test_are_rotation_matrices_and_differences(self, robot: Robot) -> None:
        """Of one moment all: what the gyroscope and the joints' speeds say is how the last step moved."""
        sim, tilted = begun(EXACT, robot), 0.0
        for targets in commands(robot, 60, scale=1.0):
            sim.write(targets, gains(robot))
            sim.advance(0.019)
            turn, joints = Rotation.from_quat(sim.data.qpos[3:7], scalar_first=True), sim.joint_positions
            sim.advance(0.001)
            now, sensors = Rotation.from_quat(sim.data.qpos[3:7], scalar_first=True), sim.read()
            rate = (turn.inv() * now).as_rotvec() / 0.001
            np.testing.assert_allclose(sensors["base_ang_vel"], rate, atol=1e-9)
            down = now.as_matrix().T @ [0.0, 0.0, -1.0]
            np.testing.assert_allclose(sensors["projected_gravity"], down, atol=1e-12)
            assert sim.tilt == pytest.approx(math.acos(-down[2]), abs=1e-6)
            for name, before in joints.items():
                assert sensors["joint_pos"][name] == sim.joint_positions[name]
                assert sensors["joint_vel"][name] == pytest.approx(
                    (sensors["joint_pos"][name] - before) / 1e-3
                )
            tilted = max(tilted, sim.tilt)
        assert tilted > 1.0

    def test_equal_mujocos(self, robot: Robot) -> None:
        sim = begun(EXACT, robot)
        sensors = sim.read()
        np.testing.assert_allclose(sensors["base_ang_vel"], sim.data.sensor("imu_gyro").data, atol=1e-12)

    def test_the_truth_about_the_base(self, robot: Robot) -> None:
        """Its velocity is along its heading, whichever that is."""
        sim = begun(EXACT, robot)
        qpos, qvel = sim.data.qpos.copy(), np.zeros(sim.model.nv)
        turned = Rotation.from_euler("ZX", [0.5 * math.pi, 0.3])
        qpos[3:7], qvel[5] = turned.as_quat(scalar_first=True), 0.4
        sim.reset(qpos, qvel)
        sim.push((1.0, 0.2))
        np.testing.assert_allclose(sim.velocity, [0.2, -1.0, 0.4], atol=1e-12)
        assert sim.tilt == pytest.approx(0.3)
        assert sim.height == qpos[2]

    def test_noise_has_the_stated_deviation_and_no_bias(self, robot: Robot) -> None:
        """Of each reading anew; the time has none."""
        for noise in (0.5, 1.0):
            world = dataclasses.replace(EXACT, noise=noise)
            sim, twin = begun(world, robot), begun(EXACT, robot)
            readings, true = [sim.read() for _ in range(2000)], twin.read()
            assert {reading["time"] for reading in readings} == {true["time"]}
            for name, std in NOISE.items():
                errors = np.array([as_array(r[name]) for r in readings]) - as_array(true[name])
                count = errors.size
                assert abs(errors.mean()) < 4.0 * noise * std / math.sqrt(count)
                assert errors.std() == pytest.approx(noise * std, rel=4.0 / math.sqrt(2 * count))
                after = (errors[1:] * errors[:-1]).mean() / (noise * std) ** 2
                assert abs(after) < 4.0 / math.sqrt(count)

    def test_repeat_with_the_seed(self, robot: Robot) -> None:
        a, b, c = (begun(World(), robot, seed) for seed in (3, 3, 4))
        assert a.read() == b.read() != c.read()
        assert a.joint_names == b.joint_names != c.joint_names


def as_array(values: Any) -> np.ndarray:
    return np.array(list(values.values()) if isinstance(values, dict) else values)


class TestDelays:
    @pytest.mark.parametrize("delay", [0.001, 0.004, 0.02])
    def test_a_reading_is_what_was_true(self, robot: Robot, delay: float) -> None:
        """Of its own time, too; before there is anything so old, of the beginning."""
        late, twin = (begun(dataclasses.replace(EXACT, sensor_delay=d), robot) for d in (delay, 0.0))
        steps, truth = round(delay / EXACT.timestep), [twin.read()]
        for targets in commands(robot, 10):
            for sim in (late, twin):
                sim.write(targets, gains(robot))
            for _ in range(7):
                late.advance(EXACT.timestep)
                twin.advance(EXACT.timestep)
                truth.append(twin.read())
                assert late.read() == truth[max(0, len(truth) - 1 - steps)]

    @pytest.mark.parametrize(("delay", "steps"), [(0.0, 0), (0.001, 1), (0.0015, 2), (0.002, 2), (0.02, 20)])
    def test_a_command_acts_later(self, robot: Robot, delay: float, steps: int) -> None:
        """As if it had been given so much later, in whole steps; those on their way keep their order."""
        late, twin = (begun(dataclasses.replace(EXACT, action_delay=d), robot) for d in (delay, 0.0))
        given = [command if i % 3 == 0 else None for i, command in enumerate(commands(robot, 60))]
        for now, then in zip(given, [*steps * [None], *given], strict=False):
            for sim, command in ((late, now), (twin, then)):
                if command is not None:
                    sim.write(command, gains(robot))
                sim.advance(EXACT.timestep)
            np.testing.assert_array_equal(late.data.qpos, twin.data.qpos)


def test_joints_are_shuffled_by_name_and_not_by_value(robot: Robot) -> None:
    """Moved by the same commands, joint by joint the same comes back, in another order."""
    shuffled, twin = (begun(dataclasses.replace(EXACT, shuffled=s), robot) for s in (True, False))
    assert twin.joint_names == robot.joint_names != shuffled.joint_names
    assert sorted(shuffled.joint_names) == sorted(robot.joint_names)
    for targets in commands(robot, 20):
        for sim in (shuffled, twin):
            sim.write(targets, gains(robot))
            sim.advance(0.02)
        assert shuffled.read() == twin.read()
        assert shuffled.joint_positions == twin.joint_positions
    for name in JOINTS:
        assert tuple(shuffled.read()[name]) == shuffled.joint_names


class TestGantry:
    def test_holds_a_limp_robot_and_lets_go(self, robot: Robot) -> None:
        sim = SimulatedRobot()
        sim.push((0.5, -0.3))
        sim.advance(2.0)
        assert sim.gantry
        assert sim.tilt < 0.1
        assert abs(sim.height - robot.base_height) < 0.1
        assert np.linalg.norm(sim.data.qpos[:2]) < 0.1
        sim.release()
        sim.advance(1.5)
        assert not sim.gantry
        assert sim.height < 0.5 * robot.base_height

    def test_pulls_at_nothing_that_was_let_go(self, robot: Robot) -> None:
        """From the same state a robot that was on it falls as one that never was."""
        sim = SimulatedRobot(world=EXACT)
        sim.advance(0.1)
        sim.release()
        twin = SimulatedRobot(world=EXACT)
        twin.reset(sim.data.qpos.copy(), sim.data.qvel.copy())
        for one in (sim, twin):
            one.write(next(commands(robot, 1)), gains(robot))
            one.advance(0.05)
        np.testing.assert_allclose(sim.data.qpos, twin.data.qpos, atol=1e-5)

    def test_a_reset_hangs_it_up_again(self, robot: Robot) -> None:
        sim, new = (SimulatedRobot(world=EXACT) for _ in range(2))
        sim.write(next(commands(robot, 1)), gains(robot))
        sim.release()
        sim.advance(0.3)
        for one in (sim, new):
            one.reset()
            one.advance(0.1)
        assert sim.gantry
        assert sim.read() == new.read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timestep": 0.0}, r"timestep=0\.0: must lie in \(0, 0\.01\] s"),
        ({"timestep": 0.02}, r"timestep=0\.02: must lie in"),
        ({"timestep": math.nan}, "timestep=nan: must be finite"),
        ({"friction": -0.1}, r"friction=-0\.1: must not be negative"),
        ({"sensor_delay": -0.001}, r"sensor_delay=-0\.001: must not be negative"),
        ({"action_delay": math.inf}, "action_delay=inf: must be finite"),
        ({"noise": -1.0}, r"noise=-1\.0: must not be negative"),
        ({"collisions": "soles"}, "collisions='soles': choose from feet, full"),
    ],
)
def test_bad_worlds(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World(**fields)


def test_an_unknown_robot() -> None:
    with pytest.raises(ValueError, match="robot='h1': choose from g1"):
        SimulatedRobot("h1")


def test_the_default_world_differs_in_everything() -> None:
    for field in dataclasses.fields(World):
        assert getattr(World(), field.name) != getattr(AS_TRAINED, field.name), field.name


def test_shares_no_code_with_the_training() -> None:
    code = (
        "import sys, kouros.deploy.simulator as s\n"
        "robot = s.SimulatedRobot(); robot.advance(0.01); robot.read()\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'torch' "
        "or m.startswith(('kouros.envs', 'kouros.learning', 'kouros.physics'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_served_robot_ends_with_who_started_it() -> None:
    """Here with somebody else: at once."""
    command = [sys.executable, "-m", "kouros.deploy.simulator", "--parent", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 65536
