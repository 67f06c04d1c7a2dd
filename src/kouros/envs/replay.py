"""What a world did before it turned sick: kept while it runs, saved for whoever looks for the cause."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kouros.files import replacing
from kouros.physics.simulation import Simulation

# Control steps of every world that are kept.
LENGTH = 50


class Recorder:
    """The last :data:`LENGTH` control steps of every world; those of the first sick one are put aside.

    All of it stays on the device and has fixed shapes, so that a CUDA graph may hold it.

    Args:
      simulation: the worlds.
      actions: ``(num_worlds, action_dim)``, the environment's own tensor of the last actions.
    """

    def __init__(self, simulation: Simulation, actions: torch.Tensor) -> None:
        self._simulation, self._actions = simulation, actions
        n, device = simulation.num_worlds, simulation.device
        self._sizes = (1, simulation.model.nq, simulation.model.nv, actions.shape[1])
        # A step: number within its episode, qpos, qvel, action.
        self._steps = torch.zeros(LENGTH, n, sum(self._sizes), device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._order = torch.arange(1, LENGTH + 1, device=device)
        self._kept = torch.zeros(LENGTH, 1, sum(self._sizes), device=device)
        self._world = torch.full((1,), -1, dtype=torch.int64, device=device)

    def record(self, number: torch.Tensor, sick: torch.Tensor) -> None:
        """Take in a step, after the physics and before any reset.

        Args:
          number: ``(num_worlds,)``, the step's within its episode, from 1 on.
          sick: ``(num_worlds,)`` bool.
        """
        sim = self._simulation
        parts = (number.unsqueeze(1), sim.qpos, sim.qvel, self._actions)
        step = torch.cat([part.to(self._steps.dtype) for part in parts], dim=1)
        self._steps.index_copy_(0, self._slot, step.unsqueeze(0))
        if sim.may_have(sick):
            first = sick.float().argmax(keepdim=True)
            new = sick.any() & (self._world < 0)
            past = self._steps.index_select(1, first)[(self._slot + self._order) % LENGTH]
            self._kept.copy_(torch.where(new, past, self._kept))
            self._world.copy_(torch.where(new, first, self._world))
        self._slot.add_(1).remainder_(LENGTH)

    def clear(self) -> None:
        """Forget everything: the worlds are put into another state."""
        self._steps.zero_()  # steps of number 0 were none
        self._world.fill_(-1)

    def take(self) -> Replay | None:
        """What was put aside since the last call, of one episode; None without a sick world. Waits for the
        device."""
        world = int(self._world)
        if world < 0:
            return None
        steps = self._kept[:, 0].cpu().numpy()
        self._world.fill_(-1)
        number = steps[:, 0]
        begins = np.flatnonzero((number == 1) | (number == 0))
        steps = steps[(begins[-1] + (number[begins[-1]] == 0)) if len(begins) else 0 :]
        first, qpos, qvel, action = np.split(steps, np.cumsum(self._sizes)[:-1], axis=1)
        return Replay(world, int(first[0, 0]), qpos, qvel, action)


@dataclasses.dataclass
class Replay:
    """The last control steps of a sick world, the last one sick."""

    world: int
    """Which world it was."""
    first: int
    """Number of the first step within its episode, from 1 on."""
    qpos: np.ndarray
    """``(steps, nq)`` float32, m, quaternion and rad, after each step."""
    qvel: np.ndarray
    """``(steps, nv)`` float32, m/s and rad/s."""
    action: np.ndarray
    """``(steps, action_dim)`` float32, what the policy asked for in each step."""
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Configuration of the environment, as in a policy's contract."""

    def save(self, path: Path) -> None:
        """Write it to an ``.npz`` file, whole or not at all."""
        content: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["environment"] = json.dumps(self.environment, default=str)
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **content)

    @classmethod
    def load(cls, path: Path) -> Replay:
        """Read it; nothing in the file is executed.

        Raises:
          FileNotFoundError, ValueError: no such file; not a replay.
        """
        if not path.is_file():
            raise FileNotFoundError(f"replay {path}: no such file; a run's are called sick-ITERATION.npz")
        try:
            with np.load(path, allow_pickle=False) as file:
                content: dict[str, Any] = {f.name: file[f.name] for f in dataclasses.fields(cls)}
            content["environment"] = json.loads(str(content["environment"]))
            content["world"], content["first"] = int(content["world"]), int(content["first"])
            shapes = [np.shape(content[name]) for name in ("qpos", "qvel", "action")]
            if len({shape[0] for shape in shapes}) != 1 or any(len(shape) != 2 for shape in shapes):
                raise ValueError
        except Exception as error:  # what a stranger's bytes make NumPy raise is no fixed list
            raise ValueError(f"replay {path}: damaged, or not a replay of Kouros") from error
        return cls(**content)
