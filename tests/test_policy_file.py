"""The policy file: what it says of itself, and that nothing else is taken for one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kouros import CONTRACT_VERSION
from kouros.deploy.export import plain_path
from kouros.deploy.policy_file import pack, read_policy_file, signed, unpack
from kouros.deploy.runner import PolicyRunner
from kouros.learning.run import load_policy

ROOT = Path(__file__).parent.parent

# A folder of its own is enough for all examples: each writes its file anew.
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tiny_model(producer: str, **metadata: str) -> onnx.ModelProto:
    """Somebody's network: twice the input."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, producer_name=producer)
    onnx.helper.set_model_props(model, metadata)
    return model


def changed(path: Path, change: Callable[[onnx.ModelProto, dict[str, Any]], None], to: Path) -> Path:
    """A policy file after a change of its graph or its contract, with a digest that is right again."""
    model = onnx.load(path)
    contract = json.loads(model.metadata_props[0].value)
    change(model, contract)
    onnx.helper.set_model_props(model, {"kouros": json.dumps(contract)})
    to.write_bytes(signed(model.SerializeToString()))
    return to


@pytest.mark.parametrize("form", ["policy.onnx", "policy.plain.onnx"])
def test_the_contract_is_what_onnx_reads(exported: Path, form: str) -> None:
    """By an independent reader; and the digest by its definition."""
    path = exported.with_name(form)
    data, contract = read_policy_file(path)
    assert data == path.read_bytes()
    (entry,) = onnx.load(path).metadata_props
    assert json.loads(entry.value) == contract
    told = contract["digest"].encode()
    assert data.count(told) == 1
    assert hashlib.sha256(data.replace(told, b"0" * 64)).hexdigest().encode() == told
    assert signed(data) == data
    _, _, learnt = load_policy("walk")
    same = json.loads(json.dumps(learnt))
    assert {name: contract[name] for name in same} == same
    assert set(contract) - set(same) == {"digest", "sensors", "state", "proof"}


def test_inputs_and_sensors_have_one_order(exported: Path) -> None:
    model, (_, contract) = onnx.load(exported), read_policy_file(exported)
    inputs = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in model.graph.input}
    sizes = {name: sensor["size"] for name, sensor in contract["sensors"].items()}
    assert list(inputs.items()) == [*sizes.items(), ("state", contract["state"]["size"])]
    assert all(sensor["unit"] for sensor in contract["sensors"].values())


def test_the_proof_is_of_different_steps(exported: Path) -> None:
    _, contract = read_policy_file(exported)
    proof = {name: unpack(packed) for name, packed in contract["proof"].items()}
    for name, values in proof.items():
        assert len(values) == 16 and np.isfinite(values).all(), name
        assert len(np.unique(values, axis=0)) > 1, name
    assert proof.keys() == {*contract["sensors"], "state", "joint_targets", "next_state", "observation"}


@QUICK
@given(st.data(), st.integers(1, 255))
def test_any_changed_byte_is_noticed(exported: Path, tmp_path: Path, data: st.DataObject, flip: int) -> None:
    whole = bytearray(exported.read_bytes())
    digest, version = (whole.rindex(key) for key in (b'"digest"', b'"contract_version"'))
    near = st.integers(min(digest, version), max(digest, version) + 90)
    place = data.draw(st.integers(0, len(whole) - 1) | near | st.integers(0, 63))
    whole[place] ^= flip
    path = tmp_path / "policy.onnx"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"policy.onnx: (damaged|cut short|not written by|contract version)"):
        read_policy_file(path)


@QUICK
@given(st.data())
def test_any_missing_end_is_noticed(exported: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = exported.read_bytes()
    path = tmp_path / "policy.onnx"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"policy.onnx: (damaged|cut short|not written by)"):
        read_policy_file(path)


@QUICK
@given(st.binary(min_size=1, max_size=200))
def test_anything_behind_the_end_is_noticed(exported: Path, tmp_path: Path, more: bytes) -> None:
    path = tmp_path / "policy.onnx"
    path.write_bytes(exported.read_bytes() + more)
    with pytest.raises(ValueError, match=r"policy.onnx: damaged, .*copy the file again"):
        read_policy_file(path)


@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=3, min_side=0)))
def test_arrays_come_back_bit_for_bit(array: np.ndarray) -> None:
    again = unpack(json.loads(json.dumps(pack(array))))
    assert again.shape == array.shape and again.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda _: tiny_model("pytorch").SerializeToString(),
            "not written by kouros export.*which sensors, joints",
        ),
        (lambda _: b"", "not written by kouros export"),
        (lambda _: os.urandom(1000), "not written by kouros export"),
        (lambda _: tiny_model("kouros").SerializeToString(), "cut short or damaged; export the policy again"),
        (
            lambda _: tiny_model("pytorch", kouros='{"contract_version": 1}').SerializeToString(),
            f"contract version 1, written by an older Kouros; this one reads {CONTRACT_VERSION}: export",
        ),
        (
            lambda whole: signed(whole.replace(b'"contract_version": 2', b'"contract_version": 3')),
            "contract version 3, written by a newer Kouros; .* or install that one",
        ),
    ],
)
def test_what_is_no_policy_file_is_refused(exported: Path, tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content(exported.read_bytes()))
    for read in (read_policy_file, PolicyRunner):
        with pytest.raises(ValueError, match=f"a.onnx: {message}"):
            read(path)


def test_no_file_is_said_with_the_way_to_one(tmp_path: Path) -> None:
    for read in (read_policy_file, PolicyRunner):
        for path in (tmp_path / "a.onnx", tmp_path):
            with pytest.raises(
                FileNotFoundError, match=r"(no such file; kouros export|neither a run folder)"
            ):
                read(path)


def _proof(name: str) -> Callable[[onnx.ModelProto, dict[str, Any]], None]:
    def change(model: onnx.ModelProto, contract: dict[str, Any]) -> None:
        values = unpack(contract["proof"][name]).copy()
        values[11, 3] += 0.01
        contract["proof"][name] = pack(values)

    return change


def _weight(model: onnx.ModelProto, contract: dict[str, Any]) -> None:
    bias = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(bias.raw_data, np.float32) + np.float32(0.01)
    bias.raw_data = values.tobytes()


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("policy.onnx", _proof("joint_targets")),
        ("policy.onnx", _proof("next_state")),
        ("policy.onnx", _proof("joint_pos")),
        ("policy.onnx", _weight),
        ("policy.plain.onnx", _proof("observation")),
        ("policy.plain.onnx", _weight),
    ],
)
def test_a_file_that_does_not_repeat_its_proof_is_refused(
    exported: Path, tmp_path: Path, form: str, change
) -> None:
    """Its digest is right: whoever changed it signed it again."""
    same = changed(exported.with_name(form), lambda model, contract: None, tmp_path / "same.onnx")
    PolicyRunner(same)
    path = changed(exported.with_name(form), change, tmp_path / "other.onnx")
    read_policy_file(path)
    with pytest.raises(
        RuntimeError, match=r"other.onnx: onnxruntime .* differs by 0\.\d+ from the steps that"
    ):
        PolicyRunner(path)


def test_the_plain_form_lies_beside(exported: Path) -> None:
    assert plain_path(exported) == exported.with_name("policy.plain.onnx")
    assert sorted(path.name for path in exported.parent.iterdir()) == ["policy.onnx", "policy.plain.onnx"]


class Trap:
    """As a pickle it creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_that_is_read_is_run(tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "policy.pt"
    torch.save({"kouros_format": 1, "contract": Trap(sprung)}, path)
    for read in (PolicyRunner, load_policy):
        with pytest.raises(ValueError, match=r"policy\.pt: damaged, or not a checkpoint of Kouros"):
            read(path)
        assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists()  # the trap is one


HOOK = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}, by order of the test", name=name)

sys.meta_path.insert(0, Refuse())
"""
HEAVY = ("torch", "mujoco", "gymnasium", "onnx", "onnxscript", "rich", "matplotlib", "tensorboard", "scipy")


def without(refused: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a machine that lacks some packages, or seems to."""
    return subprocess.run(
        [sys.executable, "-c", HOOK.format(refused=refused) + code], capture_output=True, text=True
    )


# What a robot's computer does with a policy file.
ROBOT = """
from kouros.deploy.runner import PolicyRunner
runner = PolicyRunner({path!r}, robot="g1")
joints = dict(zip(runner.joint_names, runner.contract["default_joint_pos"]))
still = dict.fromkeys(joints, 0.0)
sensors = dict(time=0.0, base_ang_vel=[0, 0, 0], projected_gravity=[0, 0, -1], command=[0, 0, 0])
targets = runner.act(dict(sensors, joint_pos=joints, joint_vel=still))
assert list(targets) == list(joints)
assert PolicyRunner({plain!r}).step([0.0] * 98).shape == (29,)
try:
    PolicyRunner("walk")
except ImportError as error:
    print(error)
"""


def on_a_robot(path: Path) -> str:
    return ROBOT.format(path=str(path), plain=str(plain_path(path)))


def test_running_a_policy_needs_numpy_and_onnxruntime_alone(exported: Path) -> None:
    """Every module of ``kouros.deploy`` but those that are for something else: they say what they need."""
    import kouros.deploy

    folder, others = Path(kouros.deploy.__path__[0]), {"__init__", "export", "simulator", "tensorrt"}
    modules = sorted({path.stem for path in folder.glob("*.py")} - others)
    assert {"policy_file", "runner", "manager", "loop", "udp"} <= set(modules)
    code = f"""
import importlib
for name in {modules}:
    importlib.import_module("kouros.deploy." + name)
"""
    done = without((*HEAVY, "tyro"), code + on_a_robot(exported))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("policy walk: a checkpoint needs torch and MuJoCo: pip install")


def test_the_command_line_needs_tyro_alone() -> None:
    """What a command needs beyond that it says, and how to get it."""
    refused = (*HEAVY, "numpy", "onnxruntime")
    done = without(refused, "import kouros.cli; kouros.cli.main(['--help'])")
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout
    done = without(refused, "import kouros.cli; sys.exit(kouros.cli.main(['export']))")
    assert done.returncode == 1
    assert re.fullmatch("kouros: No module named .*needs all that kouros depends on: pip.*\n", done.stderr)


def test_a_bare_environment_runs_a_policy(exported: Path, tmp_path: Path) -> None:
    """A new one, with what is on the package index, as docs/policy-file.md has it."""
    shutil.copytree(ROOT / "src", tmp_path / "kouros" / "src")  # a build writes into its source
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "kouros")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(arg) for arg in args]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    def install(*args: object) -> None:
        pip = (sys.executable, "-m", "pip", "--python", binaries / "python")
        done = run(*pip, "install", "--quiet", "--no-compile", "--retries=1", "--timeout=30", *args)
        if done.returncode and "Retrying" in done.stderr:
            pytest.skip("no package index can be reached from here")
        assert done.returncode == 0, done.stderr

    install("-c", ROOT / "constraints.txt", "onnxruntime", "tyro")
    install("--no-deps", tmp_path / "kouros")
    done = run(binaries / "python", "-c", on_a_robot(exported))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("policy walk: a checkpoint needs torch and MuJoCo")
    shown = run(binaries / "kouros", "--help")
    assert shown.returncode == 0 and "export" in shown.stdout, shown.stderr
