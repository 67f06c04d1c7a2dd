"""Which device to use, and what to do where the one asked for is not there. Imports torch when asked."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from kouros.checks import check_choice


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver, usable or not."""
    return any(Path(place).exists() for place in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"))


def pick_device(device: str = "auto") -> str:
    """``auto`` is a GPU where one can be used, with MuJoCo Warp installed, and else the CPU.

    Raises:
      ValueError: no such kind of device.
    """
    check_choice("device", device.partition(":")[0], ["auto", "cpu", "cuda"])
    if device != "auto":
        return device
    # Cheap questions first: importing torch takes seconds.
    if not has_gpu() or importlib.util.find_spec("mujoco_warp") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_device(device: str) -> str:
    """The device by name: ``cpu, 2 cores``, ``cuda, NVIDIA H100``."""
    if device == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    import torch

    return f"{device}, {torch.cuda.get_device_name(device)}"


def require_cuda(device: str) -> None:
    """Make that GPU torch's current one, or raise ``RuntimeError`` with the reason and the remedy."""
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(
            f"device={device!r}: torch {torch.__version__} is built for the CPU; "
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130, "
            "or use --device cpu"
        )
    try:
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.zeros(1, device=device)
    except Exception as error:  # no driver, an old one, no such device: torch says which
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device={device!r}: {reason}; update the driver, or use --device cpu") from error
