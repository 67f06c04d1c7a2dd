"""How long one step of a policy takes on one core: PolicyRunner against onnxruntime, torch and NumPy.

    python benchmarks/inference.py --output benchmarks/results/inference.json

All take the same recorded step, in turn, on one core that the process pins itself to, so that the machine's
moods fall on all alike; a ratio is of medians within a turn, and of those the median over the turns. The
first call of a turn is not counted: it finds the caches as the one before it left them.

Then ``act`` in a real loop, where it finds them as everybody left them, with three ways to wait for a tick,
a second of each in turn: asleep, or asleep until a little before it, then ``warm()``, then awake. With an
NVIDIA GPU also torch, onnxruntime and TensorRT on it, those that are installed.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import tyro
from rich.console import Console
from rich.table import Table

from kouros.deploy.export import OnnxExporter, plain_path
from kouros.deploy.runner import JOINT_SENSORS, PolicyRunner
from kouros.envs.contract import record_policy
from kouros.files import write_json
from kouros.learning.run import load_policy

CALLS = 20
RAW = "onnxruntime, IO binding: plain form"

# What a way to wait does before a tick: sleep until so many seconds before it, then run warm(), then spin.
WAITS = {"sleep": 0.0, "sleep until 0.3 ms before, warm(), spin": 3e-4, "the same, 0.6 ms": 6e-4}


@dataclasses.dataclass
class Config:
    """Microseconds for one observation."""

    policy: str = "walk"
    """A run folder, a checkpoint or the name of a shipped policy; with ELU networks and clipped actions."""
    turns: int = 300
    """Turns of 20 calls of each that count."""
    seconds: int = 20
    """Time in the loop for each way to wait, s."""
    rate: float = 200.0
    """Of the loop, Hz."""
    output: Path | None = None
    """JSON file for the figures."""


class Step:
    """One recorded step of a policy, and the policy's files."""

    def __init__(self, policy: str, folder: Path) -> None:
        self.policy, self.path = policy, folder / "policy.onnx"
        self.actor, config, contract = load_policy(policy)
        recording = record_policy(self.actor.act, config, statistics=contract.get("statistics"))
        OnnxExporter(copy.deepcopy(self.actor), contract).export(self.path, recording)
        self.row = {name: values[500:501].numpy() for name, values in recording.items()}
        self.obs, self.names = self.row["observation"], contract["joint_names"]

    def sensors(self, runner: PolicyRunner) -> dict[str, Any]:
        """What ``runner.act`` takes."""
        values = {name: self.row[name][0].tolist() for name in runner.sensors}
        joints = {
            name: dict(zip(self.names, values[name], strict=True))
            for name in values.keys() & {*JOINT_SENSORS}
        }
        return {"time": 0.0, **values, **joints}


def acting(step: Step, runner: PolicyRunner) -> Callable[[], None]:
    sensors = step.sensors(runner)

    def act() -> None:
        sensors["time"] += runner.control_dt
        runner.act(sensors)

    return act


def stepping(step: Step, policy: str | Path, **options: Any) -> Callable[[], np.ndarray]:
    runner, obs = PolicyRunner(policy, **options), step.obs[0]
    return lambda: runner.step(obs)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def bound(step: Step, path: Path) -> Callable[[], None]:
    """onnxruntime at its fastest: memory bound once, nothing checked, nothing returned."""
    session = session_of(path)
    binding, value = session.io_binding(), onnxruntime.OrtValue.ortvalue_from_numpy
    for given in session.get_inputs():
        binding.bind_ortvalue_input(given.name, value(step.row[given.name]))
    for result in session.get_outputs():
        binding.bind_ortvalue_output(result.name, value(np.zeros((1, result.shape[1]), np.float32)))
    return lambda: session.run_with_iobinding(binding)


def unbound(step: Step) -> Callable[[], list[np.ndarray]]:
    session = session_of(plain_path(step.path))
    return lambda: session.run(["action_mean"], {"observation": step.obs})


def in_torch(step: Step, compiled: bool) -> Callable[[], None]:
    act = torch.compile(step.actor.act) if compiled else step.actor.act
    obs = torch.from_numpy(step.obs)

    def call() -> None:
        with torch.inference_mode():
            act(obs)

    call()
    return call


def in_numpy(step: Step) -> Callable[[], np.ndarray]:
    """The network by hand."""
    actor, obs = step.actor, step.obs[0]
    mean, scale = actor.normalizer.mean.numpy(), actor.normalizer.variance.add(1e-5).rsqrt().numpy()
    clip, low, high = actor.normalizer.clip, actor.low.numpy(), actor.high.numpy()
    linear = [layer for layer in actor.mlp if isinstance(layer, torch.nn.Linear)]
    *hidden, last = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]

    def act() -> np.ndarray:
        x = np.clip((obs - mean) * scale, -clip, clip)
        for weight, bias in hidden:
            x = weight @ x + bias
            x = np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0)))
        return np.clip(last[0] @ x + last[1], low, high)

    with torch.no_grad():
        np.testing.assert_allclose(act(), actor.act(torch.from_numpy(obs)).numpy(), atol=1e-4)
    return act


def contestants(step: Step) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes the functions to be timed, or raises where that is not to be had."""
    plain = plain_path(step.path)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        RAW: lambda: bound(step, plain),
        "onnxruntime, IO binding: policy file": lambda: bound(step, step.path),
        "onnxruntime, run(): plain form": lambda: unbound(step),
        "PolicyRunner.step: plain form": lambda: stepping(step, plain),
        "PolicyRunner.act: policy file": lambda: acting(step, PolicyRunner(step.path)),
        "torch": lambda: in_torch(step, compiled=False),
        "torch.compile": lambda: in_torch(step, compiled=True),
        "NumPy": lambda: in_numpy(step),
    }
    on_gpu: dict[str, Callable[[], Callable[[], Any]]] = {
        "step, GPU: torch": lambda: stepping(step, step.policy, device="cuda"),
        "step, GPU: onnxruntime": lambda: stepping(step, plain, device="cuda"),
        "step, GPU: TensorRT": lambda: stepping(step, plain, use_tensorrt=True),
        "act, GPU: TensorRT": lambda: acting(step, PolicyRunner(step.path, use_tensorrt=True)),
    }
    return makers | on_gpu


def in_turn(functions: dict[str, Callable[[], Any]], turns: int) -> dict[str, np.ndarray]:
    """Microseconds of each call, ``(turns, CALLS)``."""
    clock, times = time.perf_counter_ns, {name: np.zeros((turns, CALLS)) for name in functions}
    for turn in range(-3, turns):  # the first ones warm up
        for name, function in functions.items():
            function()
            for call in range(CALLS):
                before = clock()
                function()
                times[name][turn, call] = 1e-3 * (clock() - before)
    return times


def loop(step: Step, rate: float, seconds: int) -> dict[str, np.ndarray]:
    """Microseconds that ``act`` took, and from the tick until its targets were there, ``(ticks, 2)``."""
    clock, runner = time.perf_counter, PolicyRunner(step.path)
    act = acting(step, runner)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAITS}
    for _ in range(seconds):
        for way, lead in WAITS.items():
            tick = clock()
            for _ in range(round(rate)):
                tick += 1.0 / rate
                time.sleep(max(tick - lead - clock(), 0.0))
                if lead:
                    runner.warm()
                    while clock() < tick:
                        pass
                before = clock()
                act()
                after = clock()
                times[way].append((1e6 * (after - before), 1e6 * (after - tick)))
    return {way: np.array(of) for way, of in times.items()}


def main(config: Config) -> None:
    console = Console(width=110)
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        step = Step(config.policy, Path(folder))
        functions = {}
        for name, make in contestants(step).items():
            try:
                functions[name] = make()
            except Exception as error:  # whatever a missing compiler, library or GPU makes of itself
                console.print(f"left out: {name}: {str(error).splitlines()[0]}")
        times = in_turn(functions, config.turns)
        ticks = loop(step, config.rate, config.seconds)

    result: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    result |= {"cores": os.cpu_count(), "load average at the end": os.getloadavg()[0]}
    table = Table("one observation, one core", "median, us", "p99, us", "against IO binding")
    medians = {name: np.median(of, axis=1) for name, of in times.items()}
    for name, of in times.items():
        median, p99 = (float(np.percentile(of, share)) for share in (50, 99))
        ratio = statistics.median((medians[name] / medians[RAW]).tolist())
        result[name] = {"median us": median, "p99 us": p99, "against IO binding": ratio}
        table.add_row(name, f"{median:.1f}", f"{p99:.1f}", f"{ratio:.2f}")
    console.print(table)

    table = Table(
        f"act at {config.rate:g} Hz", "median, us", "p99, us", "from tick to targets, median", "p99"
    )
    for way, of in ticks.items():
        act, late = ([float(np.percentile(of[:, what], share)) for share in (50, 99)] for what in (0, 1))
        result[f"act at {config.rate:g} Hz: {way}"] = {
            "median us": act[0],
            "p99 us": act[1],
            "tick to targets, median us": late[0],
            "tick to targets, p99 us": late[1],
        }
        table.add_row(way, *(f"{value:.0f}" for value in (*act, *late)))
    console.print(table)
    if config.output:
        write_json(config.output, result)


if __name__ == "__main__":
    main(tyro.cli(Config))
