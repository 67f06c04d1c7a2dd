"""The robot in a world: ground, light and the picture of it."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import mujoco
import numpy as np

from kouros.envs.config import HumanoidEnvConfig
from kouros.envs.terrain import add_to, make_terrain
from kouros.robots import Robot

# The most contacts of one robot. feet: two ends of four capsules; full: 28 were seen on robots that flail
# on the ground, and the worlds share what they do not use (MuJoCo Warp only). A height field touches a
# capsule in up to four points instead of two: 12 and 36 were seen on robots that flail on rough ground.
CONTACTS = {"feet": 8, "full": 32}
ROUGH_CONTACTS = 16


def room_for_contacts(config: HumanoidEnvConfig) -> int:
    """The most contacts of one robot of that config, on average over many."""
    return CONTACTS[config.collisions] + (ROUGH_CONTACTS if config.terrain.types else 0)


def ground_geoms(model: mujoco.MjModel) -> slice:
    """The world body's shapes, which come first in a model: the ground's plane, then the terrain's."""
    return slice(0, int(model.body_geomnum[0]))


def make_model(robot: Robot, config: HumanoidEnvConfig) -> mujoco.MjModel:
    """The compiled model of one world: the robot on its ground, with the config's physics options."""
    explicit = config.actuator == "explicit"
    spec = robot.spec("effort" if explicit else config.control_mode, config.collisions)
    for motor in spec.actuators if explicit else ():
        motor.forcelimited = False  # kouros.envs.actuators limits the torque, each world by its own strength
    spec.option.timestep = config.timestep
    spec.option.iterations = config.solver_iterations
    spec.option.ls_iterations = config.line_search_iterations
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # One robot is one constraint island, and 35 degrees of freedom in a tree have a sparse Jacobian:
    # little to gain while it walks, a quarter of a step while it flails (docs/performance.md).
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE

    spec.add_texture(
        name="ground",
        type=mujoco.mjtTexture.mjTEXTURE_2D,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER,
        mark=mujoco.mjtMark.mjMARK_EDGE,
        rgb1=[0.30, 0.34, 0.38],
        rgb2=[0.25, 0.29, 0.33],
        markrgb=[0.55, 0.58, 0.62],
        width=256,
        height=256,
    )
    ground = spec.add_material(name="ground", texrepeat=[1, 1], texuniform=True)
    ground.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "ground"
    shared: dict[str, Any] = {
        "material": "ground",
        "contype": 1,
        "conaffinity": 0,
        "friction": [1.0, 0.005, 0.0001],
        "priority": 1,  # the ground's friction counts, not the larger of the two
    }
    terrain = make_terrain(config.terrain) if config.terrain.types else None
    spec.worldbody.add_geom(
        name="ground",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=[0, 0, 0.05],
        pos=[0, 0, terrain.floor if terrain else 0],
        **shared,
    )
    if terrain:
        add_to(spec, terrain, **shared)
        spec.stat.extent = 1.5  # of the robot, not of the field: what shadows and clipping scale with
    light = mujoco.mjtLightType
    spec.worldbody.add_light(
        type=light.mjLIGHT_DIRECTIONAL, dir=[0, 0, -1], diffuse=[0.3] * 3, castshadow=False
    )
    spec.body(robot.base_body).add_light(
        type=light.mjLIGHT_SPOT,
        mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM,
        pos=[1.0, 1.0, 3.2],
        dir=[-1.0, -1.0, -4.0],
        cutoff=45,
        exponent=1,
        diffuse=[0.6] * 3,
        castshadow=True,
    )
    spec.visual.headlight.ambient = [0.3] * 3
    spec.visual.headlight.diffuse = [0.3] * 3
    spec.visual.quality.shadowsize = 2048
    spec.visual.rgba.haze = [0.55, 0.62, 0.70, 1.0]
    spec.visual.map.zfar = 60.0
    spec.visual.global_.offwidth, spec.visual.global_.offheight = 1280, 720
    spec.add_texture(
        name="sky",
        type=mujoco.mjtTexture.mjTEXTURE_SKYBOX,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=[0.75, 0.80, 0.86],
        rgb2=[0.35, 0.42, 0.50],
        width=64,
        height=384,
    )
    return spec.compile()


# Distance (m), azimuth and elevation (degrees) of the camera about the robot.
VIEW = (2.6, 130.0, -12.0)


class Camera:
    """Pictures of a world, from a camera that follows the robot's base.

    Needs no display: on Linux, where ``MUJOCO_GL`` is not set, EGL is tried, then OSMesa.

    Args:
      model: the world's model.
      base: body to follow.
      width, height: size of the picture, pixels, up to 1280 x 720.

    Raises:
      RuntimeError: this machine can draw nothing; the message says what to install.
    """

    def __init__(self, model: mujoco.MjModel, base: str, width: int = 640, height: int = 480) -> None:
        self._renderer = _make_renderer(model, width, height)
        self._base = base
        self._camera = mujoco.MjvCamera()
        self._flat = model.body_geomnum[0] == 1  # the plane alone
        self._camera.distance, self._camera.azimuth, self._camera.elevation = VIEW
        # Reflections cost a second pass, and software renderers have little to give.
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def picture(self, data: mujoco.MjData) -> np.ndarray:
        """RGB, ``(height, width, 3)`` uint8."""
        x, y, z = data.body(self._base).xpos
        self._camera.lookat = [x, y, 0.65 if self._flat else z - 0.1]
        self._renderer.update_scene(data, self._camera)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()


def _make_renderer(model: mujoco.MjModel, width: int, height: int) -> mujoco.Renderer:
    chosen = os.environ.get("MUJOCO_GL")
    ours_to_choose = sys.platform == "linux" and not chosen
    failures = []
    for backend in ("egl", "osmesa") if ours_to_choose else (chosen or "the system's",):
        try:
            if ours_to_choose:
                _use_backend(backend)
            return mujoco.Renderer(model, height, width)
        except Exception as error:  # whatever a missing driver raises
            failures.append(f"{backend}: {error}")
    raise RuntimeError(
        f"cannot draw here ({'; '.join(failures)}). "
        "On Debian or Ubuntu: apt install libegl1 libgl1-mesa-dri, or libosmesa6"
    )


def _use_backend(name: str) -> None:
    # PyOpenGL keeps the platform of its first import.
    os.environ["PYOPENGL_PLATFORM"] = name
    for module in [m for m in sys.modules if m.split(".")[0] == "OpenGL"]:
        del sys.modules[module]
    context = importlib.import_module(f"mujoco.{name}").GLContext
    importlib.import_module("mujoco.rendering.classic.gl_context").GLContext = context  # type: ignore[attr-defined]


def has_display() -> bool:
    """Whether a window can be opened here."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
