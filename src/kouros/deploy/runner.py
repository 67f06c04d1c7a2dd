"""Runs a policy: named sensors in, named joint targets out. A policy file needs NumPy and onnxruntime."""

from __future__ import annotations

import difflib
import math
import operator
import struct
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from kouros.deploy.policy_file import read_policy_file, unpack

if TYPE_CHECKING:
    import torch

# What a backend may differ from the steps recorded at the export: targets in rad, states in their units.
PARITY = 1e-4

# Beyond this (SI units) a number is no measurement, and its square no float32.
LARGEST = 1e18

FLOAT = np.dtype(np.float32)

Sensors = Mapping[str, Any]
Targets = dict[str, float]
Gains = tuple[dict[str, float], dict[str, float]]


class SensorError(ValueError):
    """A sensor is missing, unknown, of another shape, not finite, or of the past."""


class PolicyRunner:
    """A policy that can be run, from a policy file or a checkpoint.

    The plain form of a policy file (``policy.plain.onnx``) is a network: :meth:`step`. The policy file itself
    is a controller: :meth:`act`. A checkpoint is both. The backend is onnxruntime on the CPU unless another
    is asked for, and there is no fallback: one that is missing, or does not repeat the steps that were
    recorded at the export, is an error that says what to do.

    Args:
      policy: ``policy.onnx`` or its plain form; or, with torch and MuJoCo installed, a run folder, a ``.pt``
        file or the name of a shipped policy.
      device: ``cpu`` or ``cuda``: onnxruntime's, or torch's for a checkpoint.
      use_tensorrt: build a TensorRT engine from the file, or take the one beside it.
      robot: name of the robot that it is to move, if that is to be checked.

    Attributes:
      contract: what the policy says of itself: robot, joints, gains, limits, clocks, see docs/policy-file.md.
      joint_names: the joints that it moves.
      sensors: names of what :meth:`act` takes besides ``time``.
      control_dt: time between two calls of :meth:`act`, s.
      gains: stiffness and damping of the servos, N m/rad and N m s/rad, by joint name.
      backend: what runs it, in words.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, foreign, of another version or robot.
      ImportError, RuntimeError: the backend is not installed, does not work here, or differs.
    """

    def __init__(
        self,
        policy: str | Path,
        device: str = "cpu",
        use_tensorrt: bool = False,
        robot: str | None = None,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device={device!r}: choose from cpu, cuda")
        self._path, self._torch = Path(policy), None
        if self._path.suffix == ".onnx":
            data, self.contract = read_policy_file(self._path)
            if use_tensorrt:
                from kouros.deploy.tensorrt import Engine

                self._backend: Any = Engine(self._path, data, self.contract)
            else:
                self._backend = _Onnx(data, device)
        elif use_tensorrt:
            raise ValueError(f"policy {policy}: TensorRT builds from a policy file: kouros export {policy}")
        else:
            self._torch = _Checkpoint(self._path, device)
            self._backend, self.contract = self._torch, self._torch.contract
        if robot not in (None, self.contract["robot"]):
            raise ValueError(f"robot={robot!r}: {policy} was trained on {self.contract['robot']!r}")
        self.backend: str = self._backend.name
        self.joint_names: tuple[str, ...] = tuple(self.contract["joint_names"])
        self.control_dt: float = self.contract["control_dt"]
        stiffness, damping = (
            dict(zip(self.joint_names, self.contract[figure], strict=True))
            for figure in ("stiffness", "damping")
        )
        self.gains: Gains = (stiffness, damping)
        inputs, outputs = self._backend.inputs, self._backend.outputs
        self.sensors: tuple[str, ...] = tuple(name for name in inputs if name not in ("observation", "state"))
        self._expected = {"time", *self.sensors}
        self._vectors = tuple(name for name in self.sensors if name not in JOINT_SENSORS)
        self._joints = tuple(name for name in self.sensors if name in JOINT_SENSORS)
        self._in_order = joints_getter(self.joint_names)
        if self.sensors:
            # The sensors are the first part of one array: all are written at once. As memory, not through
            # NumPy, whose calls cost more than so few numbers do.
            self._flat = memoryview(inputs[self.sensors[0]].base)
            self._write = struct.Struct(f"{sum(inputs[name].size for name in self.sensors)}f").pack_into
            self._state, self._next_state = (
                memoryview(array).cast("B") for array in (inputs["state"], outputs["next_state"])
            )
            self._targets = memoryview(outputs["joint_targets"][0])
            zeros = dict.fromkeys(self.joint_names, 0.0)
            self._nothing: dict[str, Any] = {
                name: zeros if name in self._joints else (0.0,) * 3 for name in self.sensors
            }
        self._verify()
        self.reset()

    def reset(self) -> None:
        """Begin anew: no last action, no history, the gait clock at zero."""
        self._time = -math.inf
        if self.sensors:
            self._state[:] = bytes(len(self._state))

    def act(self, sensors: Sensors) -> Targets:
        """One control step.

        Args:
          sensors: by name, in any order: ``time``, when they were read on the robot's own clock, s, and all
            of :attr:`sensors`: of three numbers, or of a number for each joint by its name. For frames and
            units see docs/policy-file.md.

        Returns:
          A position target for each joint by its name, rad.

        Raises:
          SensorError: a sensor is missing, unknown, mis-shaped, not finite, or not newer than the last; the
            policy has not moved on.
          RuntimeError: the policy gave a target that is not finite.
        """
        self.read(sensors)
        self._backend()
        targets = self._targets.tolist()
        if not math.hypot(*targets) < LARGEST:
            raise RuntimeError(f"{self._path}: gave a joint target that is not finite")
        self._state[:] = self._next_state
        return dict(zip(self.joint_names, targets, strict=True))

    def peek(self, sensors: Sensors) -> Targets:
        """What :meth:`act` would return, without moving on."""
        time, state = self._time, bytes(self._state)
        try:
            return self.act(sensors)
        finally:
            self._time = time
            self._state[:] = state

    def warm(self) -> None:
        """Take a step for nothing, so that the next one finds all of it in the processor's caches."""
        if self.sensors:
            self.peek({"time": math.nextafter(self._time, math.inf), **self._nothing})
        else:
            self._backend()

    def read(self, sensors: Sensors) -> None:
        """Take in sensors, or raise :class:`SensorError`."""
        if not self.sensors:
            raise ValueError(
                f"{self._path}: a plain network from observations to actions: use step(), or act() of the "
                "policy file beside it"
            )
        if sensors.keys() != self._expected:
            raise SensorError(_names("sensors", sensors, self._expected))
        time, number = sensors["time"], len(self.joint_names)
        values: list[float] = []
        try:
            if not self._time < time < math.inf:
                raise ValueError
            for name in self._vectors:
                value = sensors[name]
                if len(value) != 3:
                    raise ValueError
                values.extend(value)
            for name in self._joints:
                value = sensors[name]
                values += self._in_order(value)
                if len(value) != number:
                    raise ValueError
            if not math.hypot(*values) < LARGEST:
                raise ValueError
            self._write(self._flat, 0, *values)
        except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise SensorError(self._first_wrong(sensors)) from error
        self._time = time

    def step(self, obs: ArrayLike) -> np.ndarray:
        """The action for an observation, as the environment takes it, of the plain form or a checkpoint.

        Args:
          obs: ``(obs_dim,)`` or ``(n, obs_dim)``, after all wrappers.

        Returns:
          ``(num_joints,)`` or ``(n, num_joints)`` float32: for targets multiply by
          ``contract["action_scale"]`` and add ``contract["action_offset"]``, or the commanded pose where
          ``contract["action_about"]`` says so.

        Raises:
          ValueError: of another shape, or not finite; or this is a policy file, which takes named sensors.
        """
        inputs = self._backend.inputs
        if "observation" not in inputs:
            raise ValueError(
                f"{self._path}: takes named sensors: use act(), or step() of the plain form beside it"
            )
        buffer = inputs["observation"][0]
        if not isinstance(obs, np.ndarray) or obs.dtype != FLOAT:
            with np.errstate(over="ignore"):  # what float32 has no room for is not finite
                obs = np.asarray(obs, FLOAT)
        if obs.shape[-1:] != buffer.shape or obs.ndim not in (1, 2):
            raise ValueError(f"obs of shape {obs.shape}: expected ({len(buffer)},) or (n, {len(buffer)})")
        if not (isfinite(sum(obs.tolist())) if obs.ndim == 1 else np.isfinite(obs).all()):
            raise ValueError("obs: not finite")
        if obs.ndim == 2:
            return self._backend.many({"observation": obs})["action_mean"]
        buffer[:] = obs
        self._backend()
        return self._backend.outputs["action_mean"][0].copy()

    def get_action_and_value(
        self, obs: torch.Tensor, critic_obs: torch.Tensor | None = None, action: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw from the policy, or judge an action, as in training; of a run's checkpoint only.

        Args:
          obs: ``(n, obs_dim)``.
          critic_obs: ``(n, critic_dim)``; ``obs`` if None.
          action: ``(n, num_joints)`` to be judged; drawn if None.

        Returns:
          The action before it is bounded, its log-probability ``(n,)``, the entropy ``()`` and the value
          ``(n,)``.

        Raises:
          ValueError: this is no checkpoint, or one without a critic.
        """
        if self._torch is None:
            raise ValueError(f"{self._path}: a value needs a checkpoint: PolicyRunner of the run's folder")
        return self._torch.get_action_and_value(obs, critic_obs, action)

    def _first_wrong(self, sensors: Sensors) -> str:
        """What is wrong with sensors that are all there."""
        found = (self._wrong(name, sensors[name]) for name in ("time", *self.sensors))
        return next(filter(None, found), "sensors: not to be read as numbers")

    def _wrong(self, name: str, value: Any) -> str:
        """What is wrong with the value of a sensor; empty if nothing is."""
        if name == "time":
            size = _size(value)
            if size is None or not size < math.inf:
                return f"time={value!r}: not a finite number of seconds"
            stale = not value > self._time
            return f"time={value!r}: stale, the last sensors were of {self._time!r}" if stale else ""
        places: Iterable[Any] = range(3)
        if name in JOINT_SENSORS:
            places = self.joint_names
            if not isinstance(value, Mapping):
                return f"{name}: {type(value).__name__} has no joint names; expected {{joint: number}}"
            if set(value) != set(places):
                return _names(name, value, places)
        elif (shape := _shape(value)) != (3,):
            return f"{name} of shape {shape}: expected 3 numbers"
        for place in places:
            size = _size(value[place])
            if size is None:
                return f"{name}[{place}]={value[place]!r}: not a number"
            if not size < LARGEST:
                return f"{name}[{place}]={value[place]!r}: not finite, or beyond {LARGEST:g}"
        return ""

    def _verify(self) -> None:
        """Repeat the steps that were recorded at the export."""
        if "proof" not in self.contract:
            return  # a checkpoint: torch itself
        difference = differs(self._backend, self.contract)
        tolerance = getattr(self._backend, "parity", PARITY)
        if not difference <= tolerance:
            raise RuntimeError(
                f"{self._path}: {self.backend} differs by {difference:.2g} from the steps that were recorded "
                f"at the export (at most {tolerance:g} is allowed): use another backend, or export again"
            )


JOINT_SENSORS = ("pose_command", "joint_pos", "joint_vel")


def differs(backend: Any, contract: Mapping[str, Any]) -> float:
    """By how much a backend differs from the steps that were recorded at the export, at most."""
    proof = {name: unpack(packed) for name, packed in contract["proof"].items()}
    proof["action_mean"] = proof["next_state"][:, : len(contract["joint_names"])]
    difference = 0.0
    for row in range(len(proof["state"])):
        for name, buffer in backend.inputs.items():
            buffer[0] = proof[name][row]
        backend()
        for name in proof.keys() & backend.outputs.keys():
            gap = float(np.abs(backend.outputs[name][0] - proof[name][row]).max())
            difference = max(difference, gap if isfinite(gap) else math.inf)
    return difference


def make_buffers(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """``(1, size)`` float32 for each name, one after the other in one array."""
    flat, buffers, start = np.zeros(sum(sizes.values()), np.float32), {}, 0
    for name, size in sizes.items():
        buffers[name] = flat[start : start + size].reshape(1, size)
        start += size
    return buffers


def joints_getter(names: tuple[str, ...]) -> Callable[[Mapping[str, float]], tuple[float, ...]]:
    """From a number for each joint by name to the numbers in the order of ``names``."""
    getter = operator.itemgetter(*names)
    return getter if len(names) > 1 else lambda values: (getter(values),)


def _size(value: Any) -> float | None:
    """The absolute value, None for what is no number."""
    try:
        return math.hypot(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _shape(value: Any) -> tuple[int, ...] | str:
    try:
        return np.shape(value)
    except ValueError:
        return "ragged"


def _names(what: str, given: Iterable[str], expected: Iterable[str]) -> str:
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    parts = [f"{name!r} is missing" for name in missing[:3]]
    for name in unknown[:3]:
        close = difflib.get_close_matches(name, missing, 1)
        parts.append(f"{name!r} is unknown" + (f", did you mean {close[0]!r}?" if close else ""))
    return f"{what}: {'; '.join(parts)}; expected {', '.join(sorted(expected))}"


class _Onnx:
    """onnxruntime. A backend reads ``inputs``, ``(1, size)`` float32 by name, and writes ``outputs``."""

    def __init__(self, data: bytes, device: str) -> None:
        import onnxruntime

        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeError(
                f"device={device!r}: onnxruntime {onnxruntime.__version__} here is built without CUDA; "
                "pip uninstall onnxruntime; pip install onnxruntime-gpu"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(data, options, [provider])
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(
                f"device={device!r}: onnxruntime cannot use CUDA here and would go on with the CPU; update "
                "the driver and CUDA's libraries, or use device='cpu'"
            )
        self.name = f"onnxruntime {onnxruntime.__version__}, {provider.removesuffix('ExecutionProvider')}"
        self.inputs = make_buffers({i.name: i.shape[1] for i in self._session.get_inputs()})
        self.outputs = make_buffers({o.name: o.shape[1] for o in self._session.get_outputs()})
        self._binding = self._session.io_binding()
        value = onnxruntime.OrtValue.ortvalue_from_numpy  # of the same memory
        self._values = {name: value(array) for name, array in {**self.inputs, **self.outputs}.items()}
        for name in self.inputs:
            self._binding.bind_ortvalue_input(name, self._values[name])
        for name in self.outputs:
            self._binding.bind_ortvalue_output(name, self._values[name])

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def many(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs for inputs of any number of rows."""
        return dict(zip(self.outputs, self._session.run(list(self.outputs), inputs), strict=True))


class _Checkpoint:
    """torch, from a checkpoint: both forms of the policy, and its critic."""

    def __init__(self, path: Path, device: str) -> None:
        try:
            import torch

            from kouros.deploy.export import PolicyGraph
            from kouros.learning.run import load_policy
        except ImportError as error:
            raise ImportError(
                f"policy {path}: a checkpoint needs torch and MuJoCo: pip install kouros with all that it "
                "depends on, or run the policy file that kouros export writes"
            ) from error
        if device == "cuda":
            from kouros.devices import require_cuda

            require_cuda(device)
        actor, _, self.contract = load_policy(path)
        self._path, self._device, self._graph = path, device, PolicyGraph(actor, self.contract).eval()
        self._graph.to(device)
        self.name = f"torch {torch.__version__}, {device}"
        obs_dim, joints = len(actor.normalizer.mean), len(self.contract["joint_names"])
        sizes = {**self._graph.sizes, "observation": obs_dim}
        self.inputs = make_buffers(sizes)
        sizes = {"joint_targets": joints, "next_state": sizes["state"], "action_mean": joints}
        self.outputs = make_buffers(sizes)
        self._tensors = {name: torch.from_numpy(array) for name, array in self.inputs.items()}
        self._critic: Any = None

    def __call__(self) -> None:
        import torch

        with torch.no_grad():
            given = {name: tensor.to(self._device) for name, tensor in self._tensors.items()}
            observation = given.pop("observation")
            results = self._graph(given) | {"action_mean": self._graph.actor.act(observation)}
            for name, array in self.outputs.items():
                array[:] = results[name].cpu().numpy()

    def many(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.no_grad():
            obs = torch.from_numpy(inputs["observation"]).to(self._device)
            return {"action_mean": self._graph.actor.act(obs).cpu().numpy()}

    def get_action_and_value(self, obs: Any, critic_obs: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        import torch

        from kouros.learning.networks import entropy, log_prob
        from kouros.learning.run import load_critic

        if self._critic is None:
            self._critic = load_critic(self._path).to(self._device)
        actor = self._graph.actor
        with torch.no_grad():
            mean = actor(obs.to(self._device))
            if action is None:
                action = mean + actor.log_std.exp() * torch.randn_like(mean)
            action = action.to(self._device)
            if critic_obs is None:
                critic_obs = obs
            size = len(self._critic.normalizer.mean)
            if critic_obs.shape[-1] != size:
                raise ValueError(
                    f"critic_obs of shape {tuple(critic_obs.shape)}: the critic sees {size} numbers, "
                    "info['critic_obs'] of the environment"
                )
            value = self._critic(critic_obs.to(self._device))
            return action, log_prob(action, mean, actor.log_std), entropy(actor.log_std), value
