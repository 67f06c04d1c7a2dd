"""See a policy: as a video, or live in MuJoCo's viewer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mujoco
import numpy as np
import torch
from rich.progress import track

from kouros.envs.config import CALM, HumanoidEnvConfig, from_plain
from kouros.envs.humanoid import SICK
from kouros.envs.replay import Replay
from kouros.envs.scene import VIEW, Camera, has_display, make_model
from kouros.envs.wrappers import make_policy_env
from kouros.files import replacing
from kouros.robots import get_robot

Policy = Callable[[torch.Tensor], torch.Tensor]
Command = tuple[float, float, float]

# vx, vy (m/s) and yaw rate (rad/s), equal parts of the video.
TOUR: tuple[Command, ...] = (
    (0.0, 0.0, 0.0),
    (0.5, 0.0, 0.0),
    (1.0, 0.0, 0.0),
    (0.6, 0.0, 0.6),
    (0.0, 0.3, 0.0),
    (-0.4, 0.0, 0.0),
    (0.0, 0.0, -0.6),
    (0.0, 0.0, 0.0),
)


def write_video(
    policy: Policy,
    config: HumanoidEnvConfig,
    path: Path,
    command: Command | None = None,
    seconds: float = 20.0,
    size: tuple[int, int] = (640, 480),
    fps: int = 25,
    seed: int = 0,
    statistics: dict[str, list[float]] | None = None,
    draft: bool = False,
) -> None:
    """Write an H.264 mp4 of one robot under the policy.

    Args:
      policy: observations to actions.
      config: of its environment.
      path: of the video.
      command: held throughout; :data:`TOUR` if None.
      seconds: length of the video.
      size: width and height, pixels.
      fps: pictures per second, rounded to a whole number of control steps.
      seed: of the initial state.
      statistics: ``contract["statistics"]`` of a policy that sees normalized observations.
      draft: edges not smoothed, shadows coarser: half the time, where a processor does the drawing.

    Raises:
      RuntimeError: this machine can draw nothing; the message says what to install.
      ValueError: the size is more than the renderer has, or not even; no time, or no finite command.
    """
    _check_size(size)
    if not (0 < seconds < math.inf and fps > 0):
        raise ValueError(f"seconds={seconds}, fps={fps}: must be greater than 0")
    if command and not all(map(math.isfinite, command)):
        raise ValueError(f"command={command}: must be finite")
    robot = _Single(policy, config, seed, statistics)
    quality = robot.env.simulation.model.vis.quality
    if draft:
        quality.offsamples, quality.shadowsize = 0, 1024
    dt = config.control_dt
    every = max(1, round(1.0 / (fps * dt)))
    steps = math.ceil(seconds / dt)
    camera = Camera(robot.env.simulation.model, robot.env.robot.base_body, *size)
    with _film(camera, path, size, 1.0 / (every * dt)) as add:
        for step in track(range(steps), f"writing {path}", transient=True):
            robot.step(command or TOUR[step * len(TOUR) // steps])
            if step % every == 0:
                add(robot.env.simulation.data(0))


def _check_size(size: tuple[int, int]) -> None:
    if size[0] % 2 or size[1] % 2 or not (0 < size[0] <= 1280 and 0 < size[1] <= 720):
        raise ValueError(f"width x height = {size}: even numbers up to 1280 x 720")


@contextlib.contextmanager
def _film(
    camera: Camera, path: Path, size: tuple[int, int], fps: float, times: int = 1
) -> Iterator[Callable[[mujoco.MjData], None]]:
    """An H.264 mp4 under way; gives what adds a picture of a world, ``times`` over. Closes the camera."""
    import imageio_ffmpeg

    with contextlib.closing(camera), replacing(path) as temporary:
        video = imageio_ffmpeg.write_frames(str(temporary), size, fps=fps, macro_block_size=2, quality=7)
        with contextlib.closing(video):
            video.send(None)  # starts the encoder

            def add(data: mujoco.MjData) -> None:
                picture = camera.picture(data)
                for _ in range(times):
                    video.send(picture)

            yield add


def write_replay(replay: Replay, path: Path, size: tuple[int, int] = (640, 480), slower: int = 5) -> str:
    """Write an H.264 mp4 of what a world did before it turned sick.

    Args:
      replay: of the world.
      path: of the video.
      size: width and height, pixels.
      slower: how many times slower than real time.

    Returns:
      What was wrong in the last step, a sentence.

    Raises:
      RuntimeError: this machine can draw nothing; the message says what to install.
      ValueError: the size is more than the renderer has, or not even; the replay is of another version of
        Kouros.
    """
    _check_size(size)
    config = from_plain(HumanoidEnvConfig, replay.environment)
    robot = get_robot(config.robot)
    model = make_model(robot, config)
    if replay.qpos.shape[1] != model.nq or replay.qvel.shape[1] != model.nv:
        raise ValueError(
            f"replay: of a robot with {replay.qpos.shape[1]} positions, {robot.name} has {model.nq}"
        )
    data = mujoco.MjData(model)
    camera = Camera(model, robot.base_body, *size)
    fps = 25
    pictures = max(1, round(slower * config.control_dt * fps))
    with _film(camera, path, size, fps, pictures) as add:
        for qpos, qvel in zip(replay.qpos, replay.qvel, strict=True):
            if np.isfinite(qpos).all() and np.isfinite(qvel).all() and np.abs(qpos).max() < SICK:
                data.qpos[:], data.qvel[:] = qpos, qvel
                mujoco.mj_forward(model, data)
            add(data)
    return _diagnosis(replay, model)


def _diagnosis(replay: Replay, model: mujoco.MjModel) -> str:
    """How much of the last state was no number, and what was fastest before: a NaN spreads within a step."""
    sound = (np.abs(replay.qpos) < SICK).all(1) & (np.abs(replay.qvel) < SICK).all(1)
    last = f"world {replay.world}, step {replay.first + len(sound) - 1} of its episode: "
    if sound[-1]:
        return last + f"the state is sound; a sensor or a reward was not finite, or beyond {SICK:g}"
    state = np.concatenate((replay.qpos[-1], replay.qvel[-1]))
    wrong = (~(np.abs(state) < SICK)).sum()
    last += f"{wrong} of {len(state)} numbers of its state are not finite, or beyond {SICK:g}"
    if not sound.any():
        return last
    speeds = np.abs(replay.qvel[sound][-1])
    dof = int(speeds.argmax())
    joint = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, int(model.dof_jntid[dof]))
    return f"{last}; in the last sound step {joint} was the fastest, with {speeds[dof]:.3g} rad/s or m/s"


def open_viewer(
    policy: Policy,
    config: HumanoidEnvConfig,
    command: Command | None = None,
    seed: int = 0,
    statistics: dict[str, list[float]] | None = None,
) -> None:
    """Show one robot under the policy in MuJoCo's viewer, in real time, until the window closes.

    Arguments as :func:`write_video`.

    Raises:
      RuntimeError: there is no display.
    """
    if not has_display():
        raise RuntimeError("viewer: there is no display here; leave --viewer out to write a video")
    import mujoco.viewer

    robot = _Single(policy, config, seed, statistics)
    sim = robot.env.simulation
    data = sim.data(0)
    with mujoco.viewer.launch_passive(sim.model, data, show_left_ui=False, show_right_ui=False) as viewer:
        viewer.cam.type = mujoco.mjtCamera.mjCAMERA_TRACKING
        viewer.cam.trackbodyid = sim.model.body(robot.env.robot.base_body).id
        viewer.cam.distance, viewer.cam.azimuth, viewer.cam.elevation = VIEW
        step = 0
        start = time.monotonic()
        while viewer.is_running():
            robot.step(command or TOUR[int(step * config.control_dt / 3.0) % len(TOUR)])
            step += 1
            mujoco.mj_copyData(data, sim.model, sim.data(0))
            viewer.sync()
            time.sleep(max(0.0, start + step * config.control_dt - time.monotonic()))


class _Single:
    """One robot that obeys a command."""

    def __init__(
        self,
        policy: Policy,
        config: HumanoidEnvConfig,
        seed: int,
        statistics: dict[str, list[float]] | None,
    ) -> None:
        config = dataclasses.replace(
            config,
            num_envs=1,
            num_threads=1,
            harness=0.0,
            max_episode_length=10**9,
            resampling_interval=1e6,
            **CALM,
        )
        self.env = make_policy_env(config, statistics)
        self._policy = policy
        self.env.reset(seed=seed)

    @torch.no_grad()
    def step(self, command: Command) -> None:
        self.env.set_command(torch.tensor([command]))
        self.env.step(self._policy(self.env.observe()))
