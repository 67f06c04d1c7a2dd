"""The G1 is what its figures say, and a mirror image moves like one."""

from __future__ import annotations

import importlib.resources
import json

import mujoco
import numpy as np
import pytest

from kouros.robots import get_robot
from kouros.robots.robot import Robot

FACTS = json.loads(importlib.resources.files("kouros.robots").joinpath("g1.json").read_text())
BODIES = {body["name"]: body for body in FACTS["bodies"]}


def quat_matrix(quat: np.ndarray) -> np.ndarray:
    """Rotation matrix of (w, x, y, z), from the definition q v q*."""
    w, x, y, z = np.asarray(quat) / np.linalg.norm(quat)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * k + 2 * k @ k


def chain(site: str, joint_pos: dict[str, float], base: np.ndarray) -> np.ndarray:
    """World position of a site by multiplying the figures' frames, MuJoCo left out."""
    place = FACTS["sites"][site]
    point, name = np.array(place["pos"]), place["body"]
    while name != "pelvis":
        body = BODIES[name]
        joint = body["joint"]
        angle, axis = joint_pos[joint["name"]], np.array(joint["axis"])
        turn = quat_matrix(np.array([np.cos(angle / 2), *(np.sin(angle / 2) * axis)]))
        point = np.array(body["pos"]) + quat_matrix(body["quat"]) @ turn @ point
        name = body["parent"]
    return base[:3] + quat_matrix(base[3:7]) @ point


def random_pose(robot: Robot, rng: np.random.Generator) -> np.ndarray:
    low, high = robot.joint_range.T
    quat = rng.normal(size=4)
    return np.concatenate((rng.normal(size=3), quat / np.linalg.norm(quat), rng.uniform(low, high)))


def test_model_has_the_figures(robot: Robot) -> None:
    model = robot.spec().compile()
    assert model.nv == 6 + 29
    assert model.body_mass.sum() == pytest.approx(FACTS["total_mass"], abs=1e-3)
    for name, figures in BODIES.items():
        body = model.body(name)
        assert body.mass[0] == figures["mass"]
        np.testing.assert_allclose(body.ipos, figures["com"])
        # The same tensor, whatever order MuJoCo gives the principal axes.
        expected, found = (
            quat_matrix(quat) @ np.diag(diag) @ quat_matrix(quat).T
            for quat, diag in (
                (figures["inertia_quat"], figures["inertia_diag"]),
                (body.iquat, body.inertia),
            )
        )
        np.testing.assert_allclose(found, expected, atol=1e-9)
        if "joint" not in figures:
            continue
        joint, actuator = (
            model.joint(figures["joint"]["name"]),
            model.actuator(figures["joint"]["name"]),
        )
        np.testing.assert_allclose(joint.axis, figures["joint"]["axis"])
        np.testing.assert_allclose(joint.range, figures["joint"]["range"])
        assert model.dof_armature[joint.dofadr[0]] == figures["joint"]["armature"]
        assert actuator.gainprm[0] == figures["joint"]["kp"]
        assert actuator.biasprm[2] == -figures["joint"]["kd"]
        np.testing.assert_allclose(actuator.forcerange[1], figures["joint"]["effort_limit"])


def test_joint_order_is_the_figures_and_the_models(robot: Robot) -> None:
    figures = tuple(b["joint"]["name"] for b in FACTS["bodies"] if "joint" in b)
    model = robot.spec().compile()
    assert robot.joint_names == figures
    assert tuple(model.joint(i).name for i in range(1, model.njnt)) == figures
    assert tuple(model.actuator(i).name for i in range(model.nu)) == figures
    assert robot.default_joint_pos[figures.index("left_knee_joint")] == 0.669


def test_forward_kinematics_equal_a_numpy_chain(robot: Robot) -> None:
    model = robot.spec().compile()
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    for _ in range(50):
        data.qpos[:] = random_pose(robot, rng)
        mujoco.mj_forward(model, data)
        angles = dict(zip(robot.joint_names, data.qpos[7:], strict=True))
        for site in (*robot.feet, *robot.hands):
            expected = chain(site, angles, data.qpos[:7])
            np.testing.assert_allclose(data.sensor(f"{site}_position").data, expected, atol=1e-6)


def test_a_mirrored_pose_mirrors_the_kinematics(robot: Robot) -> None:
    model = robot.spec().compile()
    data, image = mujoco.MjData(model), mujoco.MjData(model)
    rng = np.random.default_rng(1)
    flip = np.array([1, -1, 1])
    for _ in range(20):
        data.qpos[:] = random_pose(robot, rng)
        image.qpos[:3] = flip * data.qpos[:3]
        image.qpos[3:7] = np.array([1, -1, 1, -1]) * data.qpos[3:7]
        image.qpos[7:] = robot.mirror_sign * data.qpos[7:][robot.mirror_joint]
        for d in (data, image):
            mujoco.mj_forward(model, d)
        for pair in (robot.feet, robot.hands):
            for site, other in (pair, pair[::-1]):
                found = image.sensor(f"{other}_position").data
                expected = flip * data.sensor(f"{site}_position").data
                # The published shoulders differ by 0.01 mm from side to side.
                np.testing.assert_allclose(found, expected, atol=3e-5)


def test_mirroring_twice_changes_nothing(robot: Robot) -> None:
    index, sign = robot.mirror_joint, robot.mirror_sign
    np.testing.assert_array_equal(index[index], np.arange(29))
    np.testing.assert_array_equal(sign * sign[index], np.ones(29))
    np.testing.assert_allclose(sign * robot.default_joint_pos[index], robot.default_joint_pos)
    np.testing.assert_allclose(robot.stiffness[index], robot.stiffness)


def drop(robot: Robot, collisions: str, joint_pos: np.ndarray, height: float) -> mujoco.MjData:
    spec = robot.spec(collisions=collisions)  # type: ignore[arg-type]
    spec.worldbody.add_geom(
        name="ground", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 1], contype=1, conaffinity=0
    )
    model = spec.compile()
    data = mujoco.MjData(model)
    data.qpos[:] = [0, 0, height, 1, 0, 0, 0, *joint_pos]
    mujoco.mj_forward(model, data)
    return data


def test_collision_switch(robot: Robot) -> None:
    default = robot.default_joint_pos
    # Standing, nothing but soles touches; deep in the ground, everything does or only the soles.
    assert drop(robot, "full", default, 1.0).ncon == 0
    feet_only, full = (drop(robot, c, default, 0.3) for c in ("feet", "full"))
    touching = {
        c: {d.model.body(d.model.geom_bodyid[g]).name for g in d.contact.geom[:, 1]}
        for c, d in (("feet", feet_only), ("full", full))
    }
    assert touching["feet"] == set(robot.foot_bodies)
    assert "left_knee_link" in touching["full"]

    # A forearm folded into the chest is a self-collision, with the switch only.
    folded = default.copy()
    for name, angle in (
        ("left_shoulder_yaw", -1.5),
        ("left_elbow", -0.9),
        ("left_shoulder_roll", -0.3),
    ):
        folded[robot.joint_names.index(f"{name}_joint")] = angle
    assert drop(robot, "feet", folded, 1.0).ncon == 0
    assert drop(robot, "full", folded, 1.0).ncon > 0


def test_foot_forces_obey_newton(robot: Robot) -> None:
    """Change of momentum = sum of (both feet's force sensors + weight) over time, in the world."""
    data = drop(robot, "feet", robot.default_joint_pos, robot.base_height)
    model = data.model
    data.ctrl[:] = robot.default_joint_pos + 0.1
    data.qvel[:3] = [0.3, -0.2, -0.5]
    mass = model.body_mass.sum()

    def momentum() -> np.ndarray:
        mujoco.mj_subtreeVel(model, data)
        return mass * data.subtree_linvel[0]

    mujoco.mj_forward(model, data)
    before, impulse = momentum(), np.zeros(3)
    for _ in range(100):
        mujoco.mj_step(model, data)
        force = sum(data.sensor(f"{site}_contact").data[1:] for site in robot.feet)
        impulse += (force + mass * model.opt.gravity) * model.opt.timestep
    mujoco.mj_forward(model, data)
    assert np.abs(impulse).max() > 1.0
    np.testing.assert_allclose(momentum() - before, impulse, atol=0.02 * np.abs(impulse).max())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"robot='g2': choose from g1"):
        get_robot("g2")
    with pytest.raises(ValueError, match=r"control_mode='torque'.*position, velocity, effort"):
        get_robot("g1").spec("torque")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"collisions='all'.*feet, full"):
        get_robot("g1").spec(collisions="all")  # type: ignore[arg-type]
