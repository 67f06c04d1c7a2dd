"""The GPU engine: MuJoCo Warp. Runs on Warp's ``cpu`` device too, slowly: that is how it is tested."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import mujoco
import numpy as np
import torch

from kouros.checks import check_choice
from kouros.graphs import is_recording, warp_stream
from kouros.physics.simulation import Simulation

try:
    import warp as wp

    wp.config.log_level = wp.LOG_WARNING
    import mujoco_warp as mjw
except ImportError as error:
    raise ImportError(f"the GPU engine needs MuJoCo Warp ({error}): pip install 'kouros[gpu]'") from error

VERSION = f"MuJoCo Warp {mjw.__version__}"

# What the future of a world depends on, as Data names it.
STATE = ("time", "qpos", "qvel", "act", "qacc_warmstart", "ctrl", "qfrc_applied", "xfrc_applied")
OVERFLOWS = (
    mjw.OverflowType.NEFC,
    mjw.OverflowType.NJMAX_NNZ,
    mjw.OverflowType.BROADPHASE,
    mjw.OverflowType.NARROWPHASE,
    mjw.OverflowType.CONTACT_MATCH,
)
# A world's share of the memory over what MuJoCo Warp allocates for its data: 1.5 was measured with the
# step recorded (docs/gpu.md), the rest is for the learner.
MEMORY_FACTOR = 2.0


class WarpSimulation(Simulation):
    """Worlds stepped by MuJoCo Warp in float32; tensors share its memory.

    Nothing here waits for the device or has a shape that depends on data, so that every call may be
    recorded in a CUDA graph. MuJoCo Warp works on all worlds at once: a masked call computes them all
    and keeps state and sensors of the others; their other derived fields come to the present state.
    ``seconds`` stays 0: nothing waits for the device.

    Args:
      model: copied; ``simulation.model`` is the copy.
      num_worlds: number of worlds, at least 1.
      device: ``cuda``, ``cuda:1``..., or ``cpu``.
      contacts: room for so many contacts a world, on average over the worlds; see :meth:`overflow`.
      dry_friction: room for a dry friction of every joint.

    Raises:
      ImportError: MuJoCo Warp is not installed.
      RuntimeError: no such device, or a driver too old for it.
      ValueError: ``num_worlds`` is out of range, or more than the device has memory for.
    """

    derived = ("body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_acc0")

    def __init__(
        self,
        model: mujoco.MjModel,
        num_worlds: int,
        device: str | torch.device,
        contacts: int = 48,
        dry_friction: bool = False,
    ) -> None:
        if num_worlds < 1:
            raise ValueError(f"num_worlds={num_worlds}: must be at least 1")
        self.model = copy.copy(model)
        # MuJoCo C's switch for sick worlds, which MuJoCo Warp does not restart anyway.
        self.model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.num_worlds = num_worlds
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = torch.float32
        self.seconds = 0.0
        # A contact of three dimensions is four rows of a pyramid; each joint may be at a limit.
        rubbing = (model.dof_frictionloss > 0) | dry_friction
        rows = {
            "nconmax": contacts,
            "njmax": 4 * contacts + int(model.jnt_limited.sum() + rubbing.sum()),
        }
        with wp.ScopedDevice(str(self.device)):
            self._model = mjw.put_model(self.model)
            # Overflows are read from the device by whoever asks; printing from a graph is slow and endless.
            self._model.opt.warn_overflow = 0
            self._require_memory(mjw.make_data(self.model, 1, **rows))
            self._data = mjw.make_data(self.model, num_worlds, **rows)
        self._expanded: dict[str, torch.Tensor] = {}
        self._recorded = False
        self._state = {name: self.field(name) for name in STATE}
        self.qpos, self.qvel, self.ctrl = (self._state[name] for name in ("qpos", "qvel", "ctrl"))
        self.sensordata = self.field("sensordata")
        self._saved = {**self._state, "sensordata": self.sensordata}
        self._qpos0 = torch.as_tensor(model.qpos0, dtype=self.dtype, device=self.device)
        self._overflow = self.field("overflow")
        self._overflow_bits = int(sum(OVERFLOWS))

    def _require_memory(self, one: mjw.Data) -> None:
        if self.device.type != "cuda":
            return
        self.bytes_per_world = int(MEMORY_FACTOR * sum(a.capacity for a in _arrays(one)))
        free, _ = torch.cuda.mem_get_info(self.device)
        if self.num_worlds * self.bytes_per_world > free:
            raise ValueError(
                f"num_envs={self.num_worlds}: a world takes {self.bytes_per_world / 1e6:.2f} MB and "
                f"{free / 1e9:.1f} GB are free on {torch.cuda.get_device_name(self.device)}; "
                f"use at most {free // self.bytes_per_world}"
            )

    def field(self, name: str) -> torch.Tensor:
        check_choice("field", name, sorted(n for n, a in vars(self._data).items() if _per_world(a, self)))
        return _tensor(getattr(self._data, name))

    def model_field(self, name: str) -> torch.Tensor:
        if name not in self._expanded:
            fields = [n for n, a in vars(self._model).items() if _shared(a)]
            fields += [f"opt.{n}" for n, a in vars(self._model.opt).items() if _shared(a)]
            check_choice("model_field", name, sorted(fields))
            if self._recorded:
                raise RuntimeError(f"model_field={name!r}: ask for it before a graph of the step is recorded")
            owner, _, leaf = name.rpartition(".")
            holder = operator.attrgetter(owner)(self._model) if owner else self._model
            shared = getattr(holder, leaf)
            values = _tensor(shared, flatten=False)[:1]
            values = values.repeat(self.num_worlds, *[1] * (values.dim() - 1)).contiguous()
            array: Any = wp.from_torch(values, dtype=shared.dtype)
            array._is_batched = True  # MuJoCo Warp's own mark on such arrays
            setattr(holder, leaf, array)
            self._expanded[name] = values
        return self._expanded[name]

    def set_const(self, mask: torch.Tensor | None = None) -> None:
        # The constants of worlds outside the mask come out as they were.
        for name in self.derived:
            self.model_field(name)  # a value per world
        with self._device():
            mjw.set_const(self._model, self._data)

    def step(self, n: int = 1, before: Callable[[int], None] | None = None) -> None:
        self._recorded |= is_recording()
        flags, sensors = self._model.opt.disableflags, int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        with self._device():
            # Nobody can see the sensors of all but the last timestep.
            for i in range(n):
                if before:
                    before(i)
                self._model.opt.disableflags = flags if i == n - 1 else flags | sensors
                mjw.step(self._model, self._data)

    def forward(self, mask: torch.Tensor | None = None) -> None:
        with _only(mask, self.sensordata, self._state["qacc_warmstart"]), self._device():
            mjw.forward(self._model, self._data)

    def kinematics(self, mask: torch.Tensor | None = None) -> None:
        with _only(mask, self.sensordata), self._device():
            self.sensordata.zero_()
            mjw.fwd_kinematics(self._model, self._data)
            mjw.sensor_pos(self._model, self._data)
            mjw.com_vel(self._model, self._data)
            mjw.sensor_vel(self._model, self._data)

    def reset(self, mask: torch.Tensor | None = None) -> None:
        if mask is None:
            mask = torch.ones(self.num_worlds, dtype=torch.bool, device=self.device)
        for tensor in self._state.values():
            tensor.masked_fill_(mask.view(-1, *[1] * (tensor.dim() - 1)), 0.0)
        self.qpos.copy_(torch.where(mask.unsqueeze(-1), self._qpos0, self.qpos))

    def may_have(self, mask: torch.Tensor) -> bool:
        return True

    def overflow(self) -> torch.Tensor:
        return (self._overflow & self._overflow_bits) != 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        fields = {f"model.{name}": values for name, values in self._expanded.items()}
        return {name: tensor.clone() for name, tensor in (self._saved | fields).items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._saved.items():
            found = tuple(state[name].shape) if name in state else "nothing"
            if found != tuple(tensor.shape):
                raise ValueError(
                    f"simulation state: {name} is {found} in the file and {tuple(tensor.shape)} here; "
                    "use the run's own num_envs, robot, collisions and device"
                )
        for name, tensor in self._saved.items():
            tensor.copy_(state[name])
        fields = {name.removeprefix("model.") for name in state if name.startswith("model.")}
        for name in fields | set(self._expanded):
            values = self.model_field(name)
            nominal = torch.from_numpy(np.asarray(operator.attrgetter(name)(self.model)))
            values.copy_(state.get(f"model.{name}", nominal))

    def data(self, world: int) -> mujoco.MjData:
        model = copy.copy(self.model)
        for name, values in self._expanded.items():
            target = operator.attrgetter(name)(model)
            target[...] = values[world].double().cpu().numpy().reshape(np.shape(target))
        data = mujoco.MjData(model)
        for name, tensor in self._state.items():
            if name != "time":
                getattr(data, name)[...] = tensor[world].double().cpu().numpy()
        mujoco.mj_forward(model, data)
        return data

    def _device(self) -> wp.ScopedStream | wp.ScopedDevice:
        """Where Warp launches: torch's own stream, so that the two libraries keep their order."""
        if self.device.type == "cuda":
            stream = warp_stream(torch.cuda.current_stream(self.device))
            return wp.ScopedStream(stream, sync_enter=False)
        return wp.ScopedDevice("cpu")


@contextlib.contextmanager
def _only(mask: torch.Tensor | None, *tensors: torch.Tensor) -> Iterator[None]:
    """Of what is written to the tensors inside, only the rows of the mask stay."""
    if mask is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(mask.unsqueeze(-1), tensor, old))


def _per_world(array: object, simulation: WarpSimulation) -> bool:
    return isinstance(array, wp.array) and array.ndim > 0 and array.shape[0] == simulation.num_worlds


def _shared(array: object) -> bool:
    """Whether a model's array has a leading dimension for the worlds."""
    return isinstance(array, wp.array) and getattr(array, "_is_batched", False)


def _arrays(value: object) -> list[wp.array]:
    """All arrays in a dataclass and the dataclasses in it."""
    if isinstance(value, wp.array):
        return [value]
    if not dataclasses.is_dataclass(value):
        return []
    return [a for field in dataclasses.fields(value) for a in _arrays(getattr(value, field.name))]


def _tensor(array: wp.array, flatten: bool = True) -> torch.Tensor:
    """A tensor over the same memory; matrices are rows of numbers, as in MuJoCo C."""
    tensor = wp.to_torch(array)
    matrix = flatten and len(getattr(array.dtype, "_shape_", ())) == 2
    return tensor.flatten(-2) if matrix else tensor
