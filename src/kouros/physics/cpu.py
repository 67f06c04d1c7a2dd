"""The CPU engine: MuJoCo C through ``mujoco.batch.Batch``, a thread pool over state rows."""

from __future__ import annotations

import copy
import operator
import time
import warnings
from collections.abc import Callable

import mujoco
import numpy as np
import torch
from mujoco.batch import DATA_FIELDS, MODEL_FIELDS, Batch

from kouros.checks import check_choice
from kouros.physics.simulation import Simulation


class CpuSimulation(Simulation):
    """Worlds stepped by MuJoCo C, bit-equal to a loop over ``mj_step`` at any thread count.

    State tensors are views of the batch's float64 rows: nothing is copied.

    Args:
      model: copied; ``simulation.model`` is the copy.
      num_worlds: number of worlds, at least 1.
      num_threads: worker threads, 0 for one a core.

    Raises:
      ValueError: ``num_worlds`` or ``num_threads`` out of range.
    """

    derived = (
        "body_subtreemass",
        "body_invweight0",
        "dof_invweight0",
        "dof_M0",
        "dof_length",
        "actuator_acc0",
    )

    def __init__(self, model: mujoco.MjModel, num_worlds: int, num_threads: int = 0) -> None:
        if num_worlds < 1:
            raise ValueError(f"num_worlds={num_worlds}: must be at least 1")
        if num_threads < 0:
            raise ValueError(f"num_threads={num_threads}: use 0 for one thread a core, or more")
        self.model = copy.copy(model)
        # A sick world must show (NaN), not silently restart; whoever owns the worlds resets it.
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.num_worlds = num_worlds
        self.device = torch.device("cpu")
        self.dtype = torch.float64
        self._batch = Batch(self.model, num_worlds, num_threads)
        self._state = _tensor(self._batch.state)
        self.qpos, self.qvel, self.ctrl = (self.field(name) for name in ("qpos", "qvel", "ctrl"))
        self.sensordata = self.field("sensordata")
        last_stage = self.model.sensor_needstage == mujoco.mjtStage.mjSTAGE_ACC
        self._force_columns = torch.from_numpy(np.repeat(last_stage, self.model.sensor_dim))
        self.seconds = 0.0

    @property
    def num_threads(self) -> int:
        return self._batch.nthread

    def field(self, name: str) -> torch.Tensor:
        check_choice("field", name, sorted(DATA_FIELDS))
        return _tensor(self._batch.bind(name))

    def model_field(self, name: str) -> torch.Tensor:
        check_choice("model_field", name, sorted(MODEL_FIELDS))
        return _tensor(self._batch.expand(name))

    def set_const(self, mask: torch.Tensor | None = None) -> None:
        self._batch.set_const(_ids(mask))

    def step(self, n: int = 1, before: Callable[[int], None] | None = None) -> None:
        start = time.perf_counter()
        if before is None:
            self._batch.step(nstep=n)
        else:
            for i in range(n):
                before(i)
                self._batch.step()
        self.seconds += time.perf_counter() - start

    def forward(self, mask: torch.Tensor | None = None) -> None:
        ids = _ids(mask)
        if ids is None or len(ids):
            self._batch.forward(ids)

    def kinematics(self, mask: torch.Tensor | None = None) -> None:
        ids = _ids(mask)
        if ids is None or len(ids):
            self._batch.forward(ids, stage=mujoco.mjtStage.mjSTAGE_VEL)
            rows = torch.tensor(True) if mask is None else mask.unsqueeze(-1)
            self.sensordata.masked_fill_(rows & self._force_columns, 0.0)

    def reset(self, mask: torch.Tensor | None = None) -> None:
        ids = _ids(mask)
        if ids is None or len(ids):
            self._batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE)

    def may_have(self, mask: torch.Tensor) -> bool:
        return bool(mask.any())

    def overflow(self) -> torch.Tensor:
        return torch.zeros(self.num_worlds, dtype=torch.bool)  # MuJoCo C has room for all

    def state_dict(self) -> dict[str, torch.Tensor]:
        fields = {
            f"model.{name}": _tensor(values).clone()
            for name in MODEL_FIELDS
            if (values := self._batch.expanded(name)) is not None
        }
        return {"state": self._state.clone(), "sensordata": self.sensordata.clone(), **fields}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if "state" not in state:
            raise ValueError("simulation state: not of MuJoCo C; go on with the device that the run began on")
        expected, found = tuple(self._state.shape), tuple(state["state"].shape)
        if expected != found:
            raise ValueError(
                f"simulation state: (worlds, state size) is {found} in the file and {expected} here; "
                "use the run's own num_envs, robot and collisions"
            )
        for name in MODEL_FIELDS:
            if (values := state.get(f"model.{name}")) is not None:
                self.model_field(name).copy_(values)
            elif self._batch.expanded(name) is not None:
                self.model_field(name).copy_(_tensor(np.asarray(operator.attrgetter(name)(self.model))))
        self._state.copy_(state["state"])
        self.sensordata.copy_(state["sensordata"])

    def data(self, world: int) -> mujoco.MjData:
        data = self._batch.get_data(world)
        mujoco.mj_forward(self._batch.get_model(world), data)
        return data


def _ids(mask: torch.Tensor | None) -> np.ndarray | None:
    return None if mask is None else np.flatnonzero(mask.numpy())


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory."""
    with warnings.catch_warnings():
        # Derived fields are read-only arrays, and torch has no read-only tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
