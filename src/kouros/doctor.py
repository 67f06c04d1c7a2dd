"""What this machine can do, and what to install for the rest."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from kouros import __version__


def _physics() -> str:
    import mujoco

    from kouros.envs.config import HumanoidEnvConfig
    from kouros.envs.humanoid import HumanoidBaseEnv

    env = HumanoidBaseEnv(HumanoidEnvConfig(num_envs=2))
    return f"MuJoCo {mujoco.__version__}, {env.simulation.num_threads} threads"  # type: ignore[attr-defined]


def _torch() -> str:
    import torch

    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    from kouros.devices import has_gpu, require_cuda

    if not has_gpu():
        return "no NVIDIA GPU here: training uses the CPU"
    require_cuda("cuda")
    import torch

    import kouros.physics.warp as engine

    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {engine.VERSION}"


def _picture() -> str:
    from kouros.envs.config import HumanoidEnvConfig
    from kouros.envs.humanoid import HumanoidBaseEnv

    env = HumanoidBaseEnv(HumanoidEnvConfig(num_envs=1))
    picture = env.render()
    env.close()
    if picture.std() < 1:
        raise RuntimeError("the picture is blank: update the graphics driver")
    return f"drawn with {os.environ.get('MUJOCO_GL') or os.environ.get('PYOPENGL_PLATFORM', 'a display')}"


def _video() -> str:
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        video = imageio_ffmpeg.write_frames(f"{folder}/v.mp4", (64, 64), fps=25)
        video.send(None)
        video.send(bytes(64 * 64 * 3))
        video.close()
    return f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}"


def _viewer() -> str:
    from kouros.envs.scene import has_display

    return "kouros play --viewer" if has_display() else "no display here: kouros play writes a video"


def _onnx() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}"


def _disk() -> str:
    import shutil

    free = shutil.disk_usage(".").free / 1e9
    if free < 1:
        raise RuntimeError(f"{free:.2f} GB free here: a run needs about 0.1, make room")
    return f"{free:.0f} GB free here"


CHECKS: dict[str, Callable[[], str]] = {
    "physics": _physics,
    "learning": _torch,
    "GPU": _gpu,
    "pictures": _picture,
    "video": _video,
    "viewer": _viewer,
    "policy file": _onnx,
    "disk": _disk,
}


def diagnose() -> bool:
    """Try everything a user may want, print a table, and return whether all of it works."""
    table = Table("what", "", "found, or what to do", title=_title())
    good = True
    for name, check in CHECKS.items():
        try:
            table.add_row(name, "[green]ok[/green]", check())
        except Exception as error:  # whatever is broken here is the answer
            table.add_row(name, "[yellow]no[/yellow]", str(error))
            good = good and name == "GPU"  # nothing that training needs: the CPU does too
    Console().print(table)
    return good


def _title() -> str:
    return f"kouros {__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
