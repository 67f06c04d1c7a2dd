"""Pushed while it walks, a robot stands until it is upright again, and walks on.

What tells it of a push is a skin on its torso, a sensor of its own: a condition may be any function. Its
gyroscope cannot: a push of 0.8 m/s turns it less than its own steps do (docs/several-policies.md).

python examples/push_recovery.py                    a minute of it
python examples/push_recovery.py 20 push.mp4        20 s, and the film of them
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from kouros import MultiPolicyManager
from kouros.cli import Export, export
from kouros.deploy.simulator import SimulatedRobot
from kouros.envs.scene import Camera

PUSH = 0.8  # m/s, from the left or the right
EVERY = 4.0  # s between pushes
COMMAND = (0.5, 0.0, 0.0)


def make_manager(touched: Callable[[], bool]) -> MultiPolicyManager:
    """Both policies that come with the package, and when to go from one to the other."""

    def pushed(sensors: Any) -> bool:
        return touched()

    manager = MultiPolicyManager()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("walk", "stand"):
            file = Path(folder) / f"{name}.onnx"
            export(Export(Path(name), file))
            manager.add_policy(name, file)
    manager.add_transition("walk", "stand", pushed)
    manager.add_transition("stand", "walk", "upright", after=1.0)
    return manager


def push_from_the_side(robot: SimulatedRobot, velocity: float) -> None:
    forward_x, forward_y = robot.data.body(robot.robot.base_body).xmat.reshape(3, 3)[:2, 0]
    length = math.hypot(forward_x, forward_y)
    robot.push((-velocity * forward_y / length, velocity * forward_x / length))


@contextlib.contextmanager
def film(robot: SimulatedRobot, path: str) -> Iterator[Callable[[], None]]:
    """Gives what takes one picture, of 25 a second; one that takes none where there is no path."""
    if not path:
        yield lambda: None
        return
    robot.model.vis.global_.offwidth, robot.model.vis.global_.offheight = 640, 480
    camera = Camera(robot.model, robot.robot.base_body)
    video = imageio_ffmpeg.write_frames(path, (640, 480), fps=25.0, quality=7)
    video.send(None)  # starts the encoder
    with contextlib.closing(camera), contextlib.closing(video):
        yield lambda: video.send(camera.picture(robot.data))


def main(seconds: float = 60.0, video: str = "", seed: int = 0) -> None:
    touched = False
    manager, robot = make_manager(lambda: touched), SimulatedRobot(seed=seed)
    robot.reset(robot.data.qpos.copy())  # off the gantry
    contract = manager.policies["stand"].contract
    pose = dict(zip(contract["joint_names"], contract["default_joint_pos"], strict=True))
    random, pushes, fallen = np.random.default_rng(seed), 0, False
    with film(robot, video) as take_picture:
        for step in range(round(seconds / manager.control_dt)):
            time = step * manager.control_dt
            touched = time >= EVERY * (pushes + 1)
            if touched:
                push_from_the_side(robot, PUSH * random.choice((-1, 1)))
                pushes += 1
            sensors = {**robot.read(), "command": COMMAND, "pose_command": pose}
            robot.write(manager.step(sensors), manager.gains)
            robot.advance(manager.control_dt)
            if step % 2 == 0:
                take_picture()
            if fallen := robot.tilt > math.radians(60.0):
                break
    for when, source, target, why in manager.history:
        print(f"{when:5.2f} s  {source} -> {target}  ({why})")
    walked = math.hypot(*robot.data.qpos[:2])
    end = "fallen" if fallen else "no fall"
    print(f"{pushes} pushes, {len(manager.history)} switches, {walked:.1f} m, {end}")


if __name__ == "__main__":
    main(*(kind(argument) for kind, argument in zip((float, str, int), sys.argv[1:], strict=False)))
