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
from kouros.deploy.policy_file import NO_DIGEST, PRODUCER, pack, plain_path, signed
from kouros.deploy.runner import JOINT_SENSORS
from kouros.files import replacing
from kouros.normalizer import Normalizer
from kouros.physics.kinematics import SitePositions

OPSET = 18
PARITY = 1e-5
PROOF_STEPS = 16

# What a robot's computer can feed a policy, in the order of the file's inputs. Joints by their names.
SENSORS = {
    "base_ang_vel": "rad/s, base frame: the gyroscope",
    "projected_gravity": "direction of gravity, base frame, unit length; (0, 0, -1) when upright",
    "command": "vx, vy (m/s) and yaw rate (rad/s), base frame",
    "pose_command": "rad, the pose to hold",
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
    """The control law as one function: ``(sensors..., state) -> (joint_targets, next_state, ...)``.

    Everything between the sensors and the servos is inside: default pose, gait clock, last action,
    wrappers, normalizer, network, scaling and clipping. ``state`` is ``(n, state_size)``: last action; where
    the gait is observed its phase in [0, 1) and how much of a cycle it goes on after a command to stand; with
    a history all its observations but the newest and a 1 that says that they are there; zeros to begin with.

    Args:
      actor: its ``act`` is the policy: observations to actions.
      contract: what the environment said of itself (``kouros.envs.contract``).

    Attributes:
      sensors: names of the inputs but ``state``: those of :data:`SENSORS` that the policy needs.
      sizes: their lengths, by name, and that of ``state``.

    Raises:
      ValueError: the policy observes something that is no sensor of a robot.
    """

    def __init__(self, actor: Any, contract: dict[str, Any]) -> None:
        super().__init__()
        self.actor, self.contract = actor, contract
        self.wrappers = contract.get("wrappers", [])
        terms = [term["name"] for term in contract["observations"]]
        check_measured(terms, self.wrappers)
        needed = {*terms, *(["command"] if "gait_phase" in terms else [])}
        if any(entry.startswith("kinematic") for entry in self.wrappers):
            needed.add("joint_pos")
        if contract["action_about"] == "pose_command":
            needed.add("pose_command")
        joints = len(contract["joint_names"])
        self.sensors = [name for name in SENSORS if name in needed]
        self.sizes = {name: joints if name in JOINT_SENSORS else 3 for name in self.sensors}
        self.turn = nn.Buffer(torch.tensor([[2.0 * math.pi] * 2, [0.0] * 2]))
        self.quarter = nn.Buffer(torch.tensor([0.0, 0.5 * math.pi]))  # (sin, cos)
        cycles = contract["control_dt"] / contract["gait_period"]
        self.advance = nn.Buffer(torch.tensor([cycles, -cycles]))
        self.ordered = nn.Buffer(torch.tensor([math.inf, contract["standing_command"]]))
        self.moving = nn.Buffer(torch.tensor([[0.0] * 2, [1e30] * 2]))
        self.same, self.zero = nn.Buffer(torch.eye(2)), nn.Buffer(torch.zeros(2))
        limit = torch.full((joints,), contract["action_limit"])
        self.clipped = isinstance(getattr(actor, "low", None), torch.Tensor) and not actor.squash
        self.clipped = self.clipped and torch.equal(actor.low, -limit) and torch.equal(actor.high, limit)
        # What an observation is about: joints about the default pose, all else about zero.
        nominal: list[float] = []
        for term in contract["observations"]:
            posed = term["name"] in ("joint_pos", "pose_command")
            nominal += contract["default_joint_pos"] if posed else [0.0] * term["size"]
        self.nominal = nn.Buffer(torch.tensor(nominal))
        self.action_offset = nn.Buffer(torch.tensor(contract["action_offset"]))
        self.action_scale = nn.Buffer(torch.tensor(contract["action_scale"]))
        size = sum(term["size"] for term in contract["observations"])
        self.gait = "gait_phase" in terms
        state_size = joints + 2 * self.gait
        for entry in self.wrappers:
            name, _, argument = entry.partition(":")
            if name == "kinematic":
                self.hands = SitePositions(contract["kinematics"], contract["joint_names"])
                size += 3 * len(contract["kinematics"])
            elif name == "history":
                state_size += (int(argument) - 1) * size + 1
                size *= int(argument)
            else:
                self.normalizer = Normalizer(size)
                for figure, values in contract["statistics"].items():
                    getattr(self.normalizer, figure).copy_(torch.tensor(values))
        self.sizes["state"] = state_size

    def _wrapped(
        self, obs: torch.Tensor, joint_pos: torch.Tensor, memory: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The observation through the stack, and the next memory."""
        for entry in self.wrappers:
            name, _, argument = entry.partition(":")
            if name == "kinematic":
                obs = torch.cat((obs, self.hands(joint_pos).flatten(1)), dim=-1)
            elif name == "history":
                before, there = memory[0][:, :-1], memory[0][:, -1:]
                frames = torch.cat((before, obs), dim=-1)
                frames = torch.where(there > 0.0, frames, obs.repeat(1, int(argument)))
                memory = [frames[:, obs.shape[1] :], torch.ones_like(there)]
                obs = frames
            else:
                obs = self.normalizer(obs)
        return obs, memory

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``joint_targets`` and ``next_state``, and on the way ``observation`` and ``action_mean``.

        Args:
          inputs: the sensors by name and ``state``, ``(n, size)`` each.
        """
        # Of two ways to say it, the faster in onnxruntime: a node costs a microsecond, a slice or where()
        # two, and tanh() or relu() right after addmm() nothing.
        contract, given = self.contract, inputs
        joints = len(contract["joint_names"])
        rest = self.sizes["state"] - joints - 2 * self.gait
        last_action, *carried = given["state"].split([joints, *[2] * self.gait, *[rest] * (rest > 0)], dim=-1)
        clock, memory = carried[: self.gait], carried[self.gait :]
        terms = {**given, "last_action": last_action}
        if self.gait:  # (phase, coast): the phase is never ordered
            ordered = given["command"].norm(dim=-1, keepdim=True) > self.ordered
            now = torch.maximum(clock[0], ordered.float())
            moving = torch.tanh(torch.addmm(self.zero, now, self.moving))  # 0, or of what is large 1
            terms["gait_phase"] = torch.sin(torch.addmm(self.quarter, now, self.turn)) * moving
            # One cycle is one turn of the phase, and all of the coast.
            clock = [torch.fmod(torch.relu(torch.addmm(self.advance, now, self.same)), 1.0)]
        obs = torch.cat([terms[term["name"]] for term in contract["observations"]], dim=-1) - self.nominal
        obs, memory = self._wrapped(obs, given.get("joint_pos", obs), memory)
        limit = contract["action_limit"]
        action = self.actor(obs).clamp(-limit, limit) if self.clipped else self.actor.act(obs)
        about = given["pose_command"] if contract["action_about"] == "pose_command" else self.action_offset
        return {
            "joint_targets": about + self.action_scale * action,
            "next_state": torch.cat((action, *clock, *memory), dim=-1),
            "observation": obs,
            "action_mean": action,
        }


class _Positional(nn.Module):
    """The graph with a list of inputs, as torch.onnx wants it."""

    def __init__(self, graph: PolicyGraph) -> None:
        super().__init__()
        self.law = graph  # "graph" is taken: torch.fx has its own

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.law(dict(zip(self.law.sizes, inputs, strict=True))).values())


class OnnxExporter:
    """Writes a policy as self-contained ONNX files and proves that they are the same policy.

    Args:
      actor: its ``act`` is the policy, normalizer included.
      contract: what the environment said of itself; goes into the file's metadata.
    """

    def __init__(self, actor: Any, contract: dict[str, Any]) -> None:
        self.graph = PolicyGraph(actor.cpu(), contract).eval()
        self.contract = contract

    def export(self, path: str | Path, recording: dict[str, torch.Tensor]) -> float:
        """Write the file, and the plain form beside it, if they replay the recording.

        The plain form, ``NAME.plain.onnx``, is the network alone: ``observation`` to ``action_mean`` and
        ``action_std``, normalizer and clipping included.

        Args:
          path: of the ``.onnx`` file.
          recording: n steps of the policy in its environment: the graph's inputs by name, ``(n, ...)``, with
            ``joint_targets`` and ``next_state`` as the environment had them, and the ``observation`` of the
            policy.

        Returns:
          The largest difference between the files' output and the recording.

        Raises:
          RuntimeError: the difference exceeds 1e-5: nothing is written.
          OSError: the file cannot be written.
        """
        import onnxruntime

        sizes, path = self.graph.sizes, Path(path)
        batch = torch.export.Dim("n")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision; we do not
        outputs = ["joint_targets", "next_state", "observation", "action_mean"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Positional(self.graph),
                tuple(torch.zeros(2, size) for size in sizes.values()),
                input_names=list(sizes),
                output_names=outputs,
                dynamic_shapes=(tuple({0: batch} for _ in sizes),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
        # Inner values by name, of which plain_form() makes a model of its own.
        del model.graph.output[2:]
        std = self.graph.actor.log_std.detach().exp().tolist()
        plain = plain_form(model, recording["observation"].shape[1], std)
        recording = {name: recording[name] for name in (*sizes, *outputs[:3])}
        rows = torch.linspace(0, len(recording["state"]) - 1, PROOF_STEPS).long()
        described = {
            "sensors": {name: {"size": sizes[name], "unit": SENSORS[name]} for name in self.graph.sensors},
            "state": {
                "size": sizes["state"],
                "unit": "last action; phase and coast of the gait, in [0, 1]; history: zeros at first",
            },
            "proof": {name: pack(values[rows].numpy()) for name, values in recording.items()},
        }
        forms = (
            (path, model, [*sizes], ["joint_targets", "next_state"]),
            (plain_path(path), plain, ["observation"], ["action_mean"]),
        )
        recording = {**recording, "action_mean": recording["next_state"][:, : len(std)]}
        difference, written = 0.0, []
        for file, form, inputs, results in forms:
            data = _signed(form, {**self.contract, **described})
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            found = session.run(results, {name: recording[name].numpy() for name in inputs})
            for name, value in zip(results, found, strict=True):
                difference = max(difference, float((torch.from_numpy(value) - recording[name]).abs().max()))
            written.append((file, data))
        if not difference <= PARITY:
            raise RuntimeError(
                f"{path}: the exported policy differs from the trained one by {difference:.2g} "
                f"(at most {PARITY:g} is allowed); nothing was written"
            )
        for file, data in written:
            with replacing(file) as temporary:
                temporary.write_bytes(data)
        return difference


def plain_form(model: Any, obs_dim: int, std: list[float]) -> Any:
    """The network in the model of a policy file: ``observation`` to ``action_mean`` and ``action_std``."""
    import onnx
    from onnx import helper
    from onnx.utils import Extractor

    for name, size in (("observation", obs_dim), ("action_mean", len(std))):
        info = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        model.graph.value_info.append(info)
    plain = Extractor(model).extract_model(["observation"], ["action_mean"])
    plain.graph.initializer.append(
        helper.make_tensor("action_std_row", onnx.TensorProto.FLOAT, [1, len(std)], std)
    )
    plain.graph.node.append(helper.make_node("Shape", ["action_mean"], ["action_shape"]))
    plain.graph.node.append(helper.make_node("Expand", ["action_std_row", "action_shape"], ["action_std"]))
    plain.graph.output.append(
        helper.make_tensor_value_info("action_std", onnx.TensorProto.FLOAT, ["n", len(std)])
    )
    return plain


def _signed(model: Any, contract: dict[str, Any]) -> bytes:
    """The file of a model and its contract, digest included."""
    import onnx

    model.producer_name = PRODUCER.decode()
    metadata = json.dumps({"contract_version": contract["contract_version"], "digest": NO_DIGEST, **contract})
    onnx.helper.set_model_props(model, {"kouros": metadata})
    onnx.checker.check_model(model)
    return signed(model.SerializeToString(deterministic=True))
