"""Unitree G1, 29 degrees of freedom: published figures (``g1.json``) and primitive shapes.

The JSON holds masses, inertias, joint frames, ranges, gains, limits and the capsules of the foot
sole, with their source. The shapes below are ours: they give the robot a look and, with
``collisions="full"``, a body to bump into; they carry no mass.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
from typing import Any

import mujoco
import numpy as np

from kouros.robots.robot import Collisions, Robot, mirror_from_names

# Collision bits. Ground geoms have contype GROUND: they touch whatever has it in conaffinity.
GROUND, BODY = 1, 2

SHELL, JOINT, ACCENT, SOLE = "shell", "joint", "accent", "sole"
COLOURS = {
    SHELL: (0.86, 0.87, 0.89, 1.0),
    JOINT: (0.16, 0.17, 0.19, 1.0),
    ACCENT: (0.10, 0.45, 0.85, 1.0),
    SOLE: (0.08, 0.08, 0.09, 1.0),
}

# Shapes by body, of the left side; the right side is their mirror image. Metres, body frame:
# ("capsule", colour, radius, from, to) or ("box" | "ellipsoid", colour, half sizes, centre).
SHAPES: dict[str, list[tuple]] = {
    "pelvis": [
        ("capsule", JOINT, 0.055, (0, -0.05, -0.095), (0, 0.05, -0.095)),
        ("capsule", SHELL, 0.06, (-0.005, -0.03, -0.03), (-0.005, 0.03, -0.03)),
    ],
    "left_hip_pitch_link": [("capsule", JOINT, 0.048, (0, 0.005, 0), (0, 0.045, -0.025))],
    "left_hip_roll_link": [("capsule", SHELL, 0.05, (0.005, 0, -0.01), (0.025, 0, -0.10))],
    "left_hip_yaw_link": [("capsule", SHELL, 0.052, (-0.01, 0, -0.02), (-0.07, 0, -0.15))],
    "left_knee_link": [
        ("capsule", JOINT, 0.046, (0, -0.025, 0), (0, 0.025, 0)),
        ("capsule", SHELL, 0.040, (0.006, 0, -0.05), (0.004, 0, -0.20)),
        ("capsule", JOINT, 0.026, (0.004, 0, -0.20), (0, 0, -0.29)),
    ],
    "left_ankle_roll_link": [
        ("capsule", JOINT, 0.022, (-0.01, 0, -0.005), (0.07, 0, -0.015)),
        ("box", SHELL, (0.088, 0.027, 0.007), (0.039, 0, -0.019)),
        ("box", SOLE, (0.094, 0.030, 0.005), (0.039, 0, -0.030)),
    ],
    "torso_link": [
        ("capsule", JOINT, 0.055, (0, 0, 0.03), (0, 0, 0.08)),
        ("capsule", SHELL, 0.085, (0.005, -0.03, 0.14), (0.005, 0.03, 0.14)),
        ("capsule", SHELL, 0.085, (0, -0.045, 0.235), (0, 0.045, 0.235)),
        ("capsule", JOINT, 0.032, (0, 0, 0.32), (0.005, 0, 0.36)),
        ("ellipsoid", SHELL, (0.072, 0.062, 0.090), (0.012, 0, 0.43)),
        ("ellipsoid", SOLE, (0.050, 0.052, 0.062), (0.040, 0, 0.43)),
        ("ellipsoid", ACCENT, (0.012, 0.030, 0.030), (0.085, 0, 0.22)),
    ],
    "left_shoulder_pitch_link": [("capsule", JOINT, 0.040, (0, 0, 0), (0, 0.04, -0.01))],
    "left_shoulder_roll_link": [("capsule", SHELL, 0.038, (0, 0.004, -0.01), (0, 0.006, -0.08))],
    "left_shoulder_yaw_link": [("capsule", SHELL, 0.035, (0, 0, -0.01), (0.012, 0, -0.075))],
    "left_elbow_link": [
        ("capsule", JOINT, 0.034, (0, -0.012, 0), (0, 0.012, 0)),
        ("capsule", SHELL, 0.032, (0.02, 0, -0.004), (0.08, 0, -0.010)),
    ],
    "left_wrist_roll_link": [("capsule", JOINT, 0.027, (0.005, 0, 0), (0.028, 0, 0))],
    "left_wrist_pitch_link": [("capsule", SHELL, 0.027, (0.005, 0, 0), (0.035, 0, 0))],
    "left_wrist_yaw_link": [
        ("capsule", JOINT, 0.024, (0.005, 0, 0), (0.045, 0, 0)),
        ("box", SHELL, (0.026, 0.030, 0.013), (0.065, 0, 0)),
        ("capsule", JOINT, 0.010, (0.08, 0.022, 0), (0.125, 0.018, -0.012)),
        ("capsule", JOINT, 0.010, (0.08, 0, 0), (0.135, 0, -0.012)),
        ("capsule", JOINT, 0.010, (0.08, -0.022, 0), (0.125, -0.018, -0.012)),
        ("capsule", JOINT, 0.010, (0.06, -0.028, 0.008), (0.085, -0.044, 0)),
    ],
}

# With collisions="feet" each sole touches the ground through the two capsules at this distance from
# its middle (m): four contact points a foot, inscribed in the outline that all seven make. They hold
# the robot as well and save a good third of a physics step (docs/performance.md).
SOLE_RAILS = 0.018


# Speeds (rad/s) of full torque and of none, by the torque limit (N m) that tells the G1's motors apart:
# X1 and X2 of N7520-14.3, N7520-22.5, N5020-16 (one, and two on a linkage) and W4010-25 in Unitree's
# unitree_rl_lab, source/unitree_rl_lab/unitree_rl_lab/assets/robots/unitree_actuators.py (Apache-2.0).
MOTOR_SPEEDS = {
    88.0: (22.63, 35.52),
    139.0: (14.5, 22.7),
    50.0: (30.86, 40.13),
    25.0: (30.86, 40.13),
    5.0: (15.3, 24.76),
}


@functools.cache
def g1() -> Robot:
    """The Unitree G1, read from ``g1.json`` (its ``source`` field says where the figures come from)."""
    facts = _facts()
    joints = [body["joint"] for body in facts["bodies"] if "joint" in body]

    def column(key: str) -> np.ndarray:
        return np.array([joint[key] for joint in joints])

    names = tuple(joint["name"] for joint in joints)
    speeds = np.array([MOTOR_SPEEDS[joint["effort_limit"]] for joint in joints])
    mirror_joint, mirror_sign = mirror_from_names(names, column("axis"))
    return Robot(
        name="g1",
        joint_names=names,
        joint_range=column("range"),
        default_joint_pos=column("default"),
        stiffness=column("kp"),
        damping=column("kd"),
        effort_limit=column("effort_limit"),
        armature=column("armature"),
        full_torque_speed=speeds[:, 0],
        no_load_speed=speeds[:, 1],
        # One unit of action asks for a quarter of the joint's torque (g1.json, notes).
        action_scale=0.25 * column("effort_limit") / column("kp"),
        base_body="pelvis",
        base_height=facts["base_height_default"],
        torso="imu_in_torso",
        feet=("left_foot", "right_foot"),
        hands=("left_palm", "right_palm"),
        foot_bodies=("left_ankle_roll_link", "right_ankle_roll_link"),
        imu="imu_in_pelvis",
        mirror_joint=mirror_joint,
        mirror_sign=mirror_sign,
        build=_build,
    )


def _facts() -> dict[str, Any]:
    text = importlib.resources.files("kouros.robots").joinpath("g1.json").read_text("utf-8")
    return json.loads(text)


def _build(collisions: Collisions) -> mujoco.MjSpec:
    facts = _facts()
    spec = mujoco.MjSpec()
    spec.modelname = "g1"
    spec.compiler.degree = False
    for name, rgba in COLOURS.items():
        spec.add_material(name=name, rgba=rgba, specular=0.3, shininess=0.4)

    bodies = {"world": spec.worldbody}
    for figures in facts["bodies"]:
        body = bodies[figures["parent"]].add_body(
            name=figures["name"],
            pos=figures["pos"],
            quat=figures["quat"],
            mass=figures["mass"],
            ipos=figures["com"],
            iquat=figures["inertia_quat"],
            inertia=figures["inertia_diag"],
            explicitinertial=True,
        )
        bodies[figures["name"]] = body
        if "joint" not in figures:
            body.add_freejoint(name="root")
            continue
        joint = figures["joint"]
        body.add_joint(
            name=joint["name"],
            axis=joint["axis"],
            limited=True,
            range=joint["range"],
            armature=joint["armature"],
            frictionloss=joint["frictionloss"],
        )
    for name, site in facts["sites"].items():
        bodies[site["body"]].add_site(name=name, pos=site["pos"], group=4)

    _add_soles(bodies, facts["foot_contacts"], collisions)
    _add_shapes(bodies, collisions)
    if collisions == "full":
        _exclude_neighbours(spec)
    return spec


def _add_soles(bodies: dict, capsules: list[dict], collisions: Collisions) -> None:
    count: dict[str, int] = {}
    for figures in capsules:
        if collisions == "feet" and abs(figures["pos"][1]) != SOLE_RAILS:
            continue
        name = figures["body"]
        index = count.setdefault(name, 0)
        count[name] += 1
        bodies[name].add_geom(
            name=f"{name.split('_')[0]}_sole_{index}",
            type=mujoco.mjtGeom.mjGEOM_CAPSULE,
            size=figures["size"],
            pos=figures["pos"],
            quat=[np.sqrt(0.5), 0, np.sqrt(0.5), 0],  # along the foot's x axis
            mass=0,
            friction=[1.0, 0.005, 0.0001],
            group=3,
            contype=0,
            conaffinity=GROUND,
            rgba=COLOURS[SOLE],
        )


def _add_shapes(bodies: dict, collisions: Collisions) -> None:
    kinds = {
        "capsule": mujoco.mjtGeom.mjGEOM_CAPSULE,
        "box": mujoco.mjtGeom.mjGEOM_BOX,
        "ellipsoid": mujoco.mjtGeom.mjGEOM_ELLIPSOID,
    }
    for name, shapes in SHAPES.items():
        bits = {"contype": 0, "conaffinity": 0}
        if collisions == "full":
            # The soles' capsules carry a foot: its shapes touch the other bodies only.
            ground = 0 if "ankle" in name else GROUND
            bits = {"contype": BODY, "conaffinity": BODY | ground}
        sides = [(name, np.ones(3))]
        if name.startswith("left_"):
            sides.append((name.replace("left_", "right_", 1), np.array([1.0, -1.0, 1.0])))
        for (side, flip), (kind, colour, size, *points) in itertools.product(sides, shapes):
            if kind == "capsule":
                frame = {"size": [size, 0, 0], "fromto": [*(flip * points[0]), *(flip * points[1])]}
            else:
                frame = {"size": size, "pos": flip * points[0]}
            bodies[side].add_geom(type=kinds[kind], material=colour, mass=0, group=2, **frame, **bits)


def _exclude_neighbours(spec: mujoco.MjSpec) -> None:
    """No collision between bodies one or two links apart: their shapes overlap by design.

    Bodies without shapes (the waist's, the ankle's) do not count as links.
    """

    def link_above(body: mujoco.MjsBody) -> mujoco.MjsBody | None:
        body = body.parent
        while body is not None and not body.geoms:
            body = body.parent
        return body

    links = [body for body in spec.bodies if body.geoms]
    for one, two in itertools.combinations(links, 2):
        above, other = link_above(one), link_above(two)
        near = [other] if other is None else [other, link_above(other)]
        if one in near or (above is not None and above is other):
            spec.add_exclude(bodyname1=one.name, bodyname2=two.name)
