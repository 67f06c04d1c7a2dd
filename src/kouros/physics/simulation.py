"""N worlds of one MuJoCo model, stepped together: the interface every engine has."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Literal, get_args

import mujoco
import torch

from kouros.checks import check_choice
from kouros.devices import require_cuda

Engine = Literal["auto", "c", "warp"]


class Simulation(abc.ABC):
    """N worlds of one model. Everything is a tensor whose first dimension is the world.

    State tensors are live: a write is the world's state at its next call. Derived fields
    (``sensordata``, ``xpos``, ...) are refreshed by :meth:`step` and :meth:`forward`; after
    ``step`` they describe the state before the last substep, as with ``mj_step``.

    A mask is a bool tensor ``(num_worlds,)``; None means every world. A call with a mask leaves
    state and sensors of every other world untouched, bit for bit (MuJoCo C: all of it).

    Attributes:
      model: the compiled model. Read it; per-world changes go through :meth:`model_field`.
      num_worlds: number of worlds.
      device: where the tensors live.
      dtype: floating type of the engine's tensors (float64 in MuJoCo C, float32 in MuJoCo Warp).
      qpos: ``(num_worlds, nq)``. The free joint first: position (m, world frame) and quaternion.
      qvel: ``(num_worlds, nv)``. The free joint first: linear velocity (world frame) and angular
        velocity (body frame).
      ctrl: ``(num_worlds, nu)``, in the actuators' units.
      sensordata: ``(num_worlds, nsensordata)``; :meth:`sensor` gives one sensor's columns.
      derived: names of the model fields that :meth:`set_const` writes.
      seconds: wall-clock time spent in :meth:`step`, where that can be told; who reads it may reset it.
    """

    model: mujoco.MjModel
    num_worlds: int
    device: torch.device
    dtype: torch.dtype
    qpos: torch.Tensor
    qvel: torch.Tensor
    ctrl: torch.Tensor
    sensordata: torch.Tensor
    derived: tuple[str, ...]
    seconds: float

    @abc.abstractmethod
    def field(self, name: str) -> torch.Tensor:
        """An ``MjData`` field by its MuJoCo name, ``(num_worlds, ...)``, live.

        A derived field is filled from its first request on: at the next :meth:`step` or
        :meth:`forward`.

        Raises:
          ValueError: the engine has no such field.
        """

    @abc.abstractmethod
    def model_field(self, name: str) -> torch.Tensor:
        """An ``MjModel`` field given a value per world, ``(num_worlds, ...)``, live and writable.

        After writing one that MuJoCo derives constants from (masses, inertias, armature...), call
        :meth:`set_const`.

        Raises:
          ValueError: the engine has no such field.
        """

    @abc.abstractmethod
    def set_const(self, mask: torch.Tensor | None = None) -> None:
        """Recompute the constants derived from model fields (``mj_setConst``)."""

    @abc.abstractmethod
    def step(self, n: int = 1, before: Callable[[int], None] | None = None) -> None:
        """Advance every world by ``n`` timesteps with its present ``ctrl``.

        ``before`` is called with 0, 1... ahead of each timestep, to write ``ctrl`` or model fields.
        """

    @abc.abstractmethod
    def forward(self, mask: torch.Tensor | None = None) -> None:
        """Compute derived fields from the present state (``mj_forward``)."""

    @abc.abstractmethod
    def kinematics(self, mask: torch.Tensor | None = None) -> None:
        """Compute poses, velocities and their sensors from the present state; force sensors read zero.

        What a reset needs: a fraction of :meth:`forward`, which solves for the forces too.
        """

    @abc.abstractmethod
    def reset(self, mask: torch.Tensor | None = None) -> None:
        """Put whole state rows back to the model's defaults, solver warm start and forces included.

        Derived fields follow at the next :meth:`forward` or :meth:`step`.
        """

    @abc.abstractmethod
    def may_have(self, mask: torch.Tensor) -> bool:
        """False where it is known without waiting that the mask is empty: work for it can be left out."""

    @abc.abstractmethod
    def overflow(self) -> torch.Tensor:
        """Worlds in which contacts ever found no room in the engine, bool ``(num_worlds,)``.

        Room is shared, so that one world's lack may show in all; contacts left out are not felt.
        """

    @abc.abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of all that the future of the worlds depends on."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state_dict`; the worlds then go on bit for bit as they would have.

        Raises:
          ValueError: the state is of another number of worlds or another model.
        """

    @abc.abstractmethod
    def data(self, world: int) -> mujoco.MjData:
        """One world as a forwarded ``MjData``, to render or to pass to any MuJoCo function."""

    def sensor(self, name: str) -> torch.Tensor:
        """One sensor's columns of ``sensordata``, ``(num_worlds, dim)``, live.

        Raises:
          KeyError: no such sensor; the message lists those there are.
        """
        sensor = self.model.sensor(name)
        start = int(sensor.adr[0])
        return self.sensordata[:, start : start + int(sensor.dim[0])]

    def __repr__(self) -> str:
        names = self.model.names[: self.model.names.index(b"\0")].decode() or "model"
        return f"{type(self).__name__}({names!r}, num_worlds={self.num_worlds}, device={self.device})"


def make_simulation(
    model: mujoco.MjModel,
    num_worlds: int,
    device: str | torch.device = "cpu",
    engine: Engine = "auto",
    num_threads: int = 0,
    contacts: int = 48,
    dry_friction: bool = False,
) -> Simulation:
    """N worlds of a model.

    Args:
      model: copied by the simulation.
      num_worlds: number of worlds.
      device: ``cpu``, ``cuda`` or ``cuda:N``.
      engine: ``c`` (MuJoCo C), ``warp`` (MuJoCo Warp) or ``auto``: C on the CPU, Warp on a GPU.
      num_threads: of MuJoCo C; 0 for one a core.
      contacts: room for so many contacts a world, on average; MuJoCo Warp only.
      dry_friction: room for a ``dof_frictionloss`` of every joint, whatever the model has; MuJoCo Warp only.

    Raises:
      ImportError: MuJoCo Warp is not installed.
      RuntimeError: no such device here.
      ValueError: no engine for the device, or a bad number of worlds.
    """
    check_choice("engine", engine, get_args(Engine))
    kind = str(device).partition(":")[0]
    check_choice("device", kind, ["cpu", "cuda"])
    if kind == "cuda":
        require_cuda(str(device))
    if engine == "warp" or (engine == "auto" and kind == "cuda"):
        from kouros.physics.warp import WarpSimulation

        return WarpSimulation(model, num_worlds, device, contacts, dry_friction)
    if kind == "cuda":
        raise ValueError(f"engine={engine!r}: MuJoCo C simulates on device='cpu' only")
    from kouros.physics.cpu import CpuSimulation

    return CpuSimulation(model, num_worlds, num_threads)
