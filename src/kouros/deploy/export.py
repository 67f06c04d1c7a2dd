"""Writes the policy file: sensors in, joint targets out, nothing left to guess."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kouros.checks import check_choice
from kouros.files import replacing
from kouros.normalizer import Normalizer
from kouros.physics.kinematics import SitePositions

OPSET = 18
PARITY = 1e-5

SENSORS = {
    "base_ang_vel": "rad/s, base frame",
    "projected_gravity": "direction of gravity, base frame, unit length",
    "command": "vx, vy (m/s) and yaw rate (rad/s), base frame",
    "joint_pos": "rad",
    "joint_vel": "rad/s",
}
STATE_TERMS = ("gait_phase", "last_action")
WRAPPERS = ("kinematic", "history", "normalize")


def check_measured(terms: Iterable[str], wrappers: Iterable[str] = ()) -> None:
    """Raise ``ValueError`` if a policy observes something that is no sensor of a robot, or through a wrapper
    that the file has no room for."""
    for term in terms:
        check_choice("actor_observations", term, (*SENSORS, *STATE_TERMS))
    for entry in wrappers:
        name, _, argument = entry.partition(":")
        check_choice("wrappers", name, WRAPPERS)
        if "velocity" in argument:
            raise ValueError(f"wrappers={entry!r}: no robot measures its base's velocity; use 'kinematic'")


class PolicyGraph(nn.Module):
    """The control law as one function: ``(sensors..., state) -> (joint_targets, next_state)``.

    Everything between the sensors and the servos is inside: default pose, gait clock, last action,
    wrappers, normalizer, network, scaling and clipping. ``state`` is ``(n, state_size)``: last action, gait
    phase in [0, 1), how much of a cycle the gait goes on after a command to stand, and with a history all its
    observations but the newest and a 1 that says that they are there; zeros to begin with.

    Args:
      actor: its ``act`` is the policy: observations to actions.
      contract: what the environment said of itself (``kouros.envs.contract``).

    Raises:
      ValueError: the policy observes something that is no sensor of a robot.
    """

    def __init__(self, actor: Any, contract: dict[str, Any]) -> None:
        super().__init__()
        self.actor, self.contract = actor, contract
        self.wrappers = contract.get("wrappers", [])
        check_measured((term["name"] for term in contract["observations"]), self.wrappers)
        self.default_joint_pos = nn.Buffer(torch.tensor(contract["default_joint_pos"]))
        self.action_offset = nn.Buffer(torch.tensor(contract["action_offset"]))
        self.action_scale = nn.Buffer(torch.tensor(contract["action_scale"]))
        size = sum(term["size"] for term in contract["observations"])
        self.state_size = len(contract["joint_names"]) + 2
        for entry in self.wrappers:
            name, _, argument = entry.partition(":")
            if name == "kinematic":
                self.hands = SitePositions(contract["kinematics"], contract["joint_names"])
                size += 3 * len(contract["kinematics"])
            elif name == "history":
                self.state_size += (int(argument) - 1) * size + 1
                size *= int(argument)
            else:
                self.normalizer = Normalizer(size)
                for figure, values in contract["statistics"].items():
                    getattr(self.normalizer, figure).copy_(torch.tensor(values))

    def _wrapped(
        self, obs: torch.Tensor, joint_pos: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The observation through the stack, and the next memory."""
        for entry in self.wrappers:
            name, _, argument = entry.partition(":")
            if name == "kinematic":
                obs = torch.cat((obs, self.hands(joint_pos).flatten(1)), dim=-1)
            elif name == "history":
                frames = torch.cat((memory[:, :-1], obs), dim=-1)
                frames = torch.where(memory[:, -1:] > 0.0, frames, obs.repeat(1, int(argument)))
                memory = torch.cat((frames[:, obs.shape[1] :], torch.ones_like(memory[:, -1:])), dim=-1)
                obs = frames
            else:
                obs = self.normalizer(obs)
        return obs, memory

    def forward(
        self,
        base_ang_vel: torch.Tensor,
        projected_gravity: torch.Tensor,
        command: torch.Tensor,
        joint_pos: torch.Tensor,
        joint_vel: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        contract = self.contract
        joints = joint_pos.shape[1]
        last_action, phase, coast, memory = state.split([joints, 1, 1, self.state_size - joints - 2], dim=-1)
        ordered = command.norm(dim=-1, keepdim=True) > contract["standing_command"]
        coast = torch.where(ordered, 1.0, coast)
        angle = 2.0 * math.pi * phase
        terms = {
            "base_ang_vel": base_ang_vel,
            "projected_gravity": projected_gravity,
            "command": command,
            "gait_phase": torch.cat((torch.sin(angle), torch.cos(angle)), dim=-1) * (coast > 0.0),
            "joint_pos": joint_pos - self.default_joint_pos,
            "joint_vel": joint_vel,
            "last_action": last_action,
        }
        obs = torch.cat([terms[term["name"]] for term in contract["observations"]], dim=-1)
        obs, memory = self._wrapped(obs, joint_pos, memory)
        limit = contract["action_limit"]
        action = self.actor.act(obs).clamp(-limit, limit)
        cycles = contract["control_dt"] / contract["gait_period"]
        phase, coast = torch.frac(phase + cycles), (coast - cycles).clamp(min=0.0)
        next_state = torch.cat((action, phase, coast, memory), dim=-1)
        return self.action_offset + self.action_scale * action, next_state


class OnnxExporter:
    """Writes a policy as a self-contained ONNX file and proves that it is the same policy.

    Args:
      actor: its ``act`` is the policy, normalizer included.
      contract: what the environment said of itself; goes into the file's metadata.
    """

    def __init__(self, actor: Any, contract: dict[str, Any]) -> None:
        self.graph = PolicyGraph(actor.cpu(), contract).eval()
        self.contract = contract

    def export(self, path: str | Path, recording: dict[str, torch.Tensor]) -> float:
        """Write the file, if it replays the recording.

        Args:
          path: of the ``.onnx`` file.
          recording: n steps of the policy in its environment: the graph's inputs by name,
            ``(n, ...)``, with ``joint_targets`` and ``next_state`` as the environment had them.

        Returns:
          The largest difference between the file's output and the recording.

        Raises:
          RuntimeError: the difference exceeds 1e-5: nothing is written.
          OSError: the file cannot be written.
        """
        import onnx
        import onnxruntime

        n = len(self.contract["joint_names"])
        sizes = {"joint_pos": n, "joint_vel": n}
        example = tuple(torch.zeros(2, sizes.get(name, 3)) for name in SENSORS)
        batch = torch.export.Dim("n")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision; we do not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                self.graph,
                (*example, torch.zeros(2, self.graph.state_size)),
                input_names=[*SENSORS, "state"],
                output_names=["joint_targets", "next_state"],
                dynamic_shapes=tuple({0: batch} for _ in range(len(SENSORS) + 1)),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        with replacing(path) as temporary:
            program.save(temporary, external_data=False)
            model = onnx.load(temporary)
            metadata = {
                "kouros": json.dumps(self.contract),
                "sensors": json.dumps(SENSORS),
                "state": "last action, gait phase in [0, 1), coast in [0, 1], history; zeros at first",
            }
            onnx.helper.set_model_props(model, metadata)
            onnx.checker.check_model(model)
            onnx.save(model, temporary)

            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
            inputs = {name: recording[name].numpy() for name in (*SENSORS, "state")}
            targets, next_state = session.run(["joint_targets", "next_state"], inputs)
            difference = max(
                float((torch.from_numpy(targets) - recording["joint_targets"]).abs().max()),
                float((torch.from_numpy(next_state) - recording["next_state"]).abs().max()),
            )
            if not difference <= PARITY:
                raise RuntimeError(
                    f"{path}: the exported policy differs from the trained one by {difference:.2g} "
                    f"(at most {PARITY:g} is allowed); nothing was written"
                )
        return difference
