"""TensorRT engines: where they lie, whose are trusted, and what they compute, as far as this machine goes."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kouros.deploy import tensorrt
from kouros.deploy.export import plain_path
from kouros.deploy.policy_file import read_policy_file
from kouros.deploy.runner import PARITY, PolicyRunner, _Onnx, differs
from kouros.deploy.tensorrt import HALF_PARITY, Engine, build_engine, cached_engine, read_trusted


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """The policy file in a folder without engines."""
    path = tmp_path / exported.name
    path.write_bytes(exported.read_bytes())
    return path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The precisions of the engines that were built; one is four bytes that count them."""
    engines: list[bool] = []

    def build(data: bytes, half: bool = False) -> bytes:
        engines.append(half)
        return b"%03d%s" % (len(engines), b"h" if half else b"s")

    library = types.SimpleNamespace(__name__="tensorrt_rtx", __version__="1.2.3")
    monkeypatch.setattr(tensorrt, "library", lambda: library)
    monkeypatch.setattr(tensorrt, "capability", lambda: "sm89")
    monkeypatch.setattr(tensorrt, "build_engine", build)
    return engines


def test_a_missing_library_is_said_in_one_line(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tensorrt.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="TensorRT is not installed: pip install tensorrt-rtx") as error:
        PolicyRunner(exported, use_tensorrt=True)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="TensorRT builds from a policy file: kouros export walk"):
        PolicyRunner("walk", use_tensorrt=True)


@pytest.mark.parametrize(("mode", "trusted"), [(0o600, True), (0o644, True), (0o664, False), (0o602, False)])
def test_an_engine_that_others_can_write_is_not_trusted(tmp_path: Path, mode: int, trusted: bool) -> None:
    file = tmp_path / "an.engine"
    file.write_bytes(b"code")
    file.chmod(mode)
    assert read_trusted(file) == (b"code" if trusted else None)


def test_another_users_engine_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link, pipe = (tmp_path / name for name in ("an.engine", "link", "pipe"))
    file.write_bytes(b"code")
    link.symlink_to(file)
    os.mkfifo(pipe)
    assert [read_trusted(path) for path in (file, link, pipe, tmp_path)] == [b"code", None, None, None]
    assert read_trusted(tmp_path / "none") is None
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    assert read_trusted(file) is None


def test_the_cache(copied: Path, built: list[bool]) -> None:
    """One engine for each policy file, precision, GPU and version, written so that it will be trusted."""

    def names() -> set[str]:
        return {path.name for path in copied.parent.iterdir()} - {copied.name}

    before = os.umask(0o002)  # Ubuntu's
    try:
        assert cached_engine(copied, b"", "a" * 64) == b"001s"
    finally:
        os.umask(before)
    assert names() == {"policy.aaaaaaaaaaaa.tensorrt_rtx-1.2.3.sm89.fp32.engine"}
    assert cached_engine(copied, b"", "a" * 64) == b"001s"
    assert cached_engine(copied, b"", "a" * 64, half=True) == b"002h"
    assert cached_engine(copied, b"", "b" * 64) == b"003s"
    for name in names():
        (copied.parent / name).chmod(0o666)
    assert cached_engine(copied, b"", "a" * 64) == b"004s"
    assert cached_engine(copied, b"", "a" * 64) == b"004s"
    assert len(names()) == 3


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(
    copied: Path, built: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def refused(path: Path):
        raise PermissionError("no room")
        yield

    monkeypatch.setattr(tensorrt, "replacing", refused)
    with pytest.warns(UserWarning, match="no room: the engine will be built again next time"):
        assert cached_engine(copied, b"", "a" * 64) == b"001s"


@pytest.mark.parametrize(("error", "precision"), [(1e-3, "FP16"), (1e-2, "FP32"), (np.nan, "FP32")])
def test_half_where_accurate_else_a_warning_and_single(
    copied: Path, built: list[bool], monkeypatch: pytest.MonkeyPatch, error: float, precision: str
) -> None:
    """The rule alone: onnxruntime stands in for the engine, and is off by ``error`` where it is FP16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data, _ = read_policy_file(copied)

    def load(self: Any, engine: bytes) -> None:
        self.onnx, self.error = _Onnx(data, "cpu"), error if engine.endswith(b"h") else 0.0
        self.inputs, self.outputs = self.onnx.inputs, self.onnx.outputs

    def run(self: Any) -> None:
        self.onnx()
        self.outputs["joint_targets"] += self.error

    monkeypatch.setattr(Engine, "_load", load)
    monkeypatch.setattr(Engine, "__call__", run)
    half = precision == "FP16"
    with contextlib.nullcontext() if half else pytest.warns(UserWarning, match="in FP16 .* FP32 is used"):
        runner = PolicyRunner(copied, use_tensorrt=True)
    assert runner.backend == f"TensorRT-RTX 1.2.3, sm89, {precision}"
    assert built == ([True] if half else [True, False])


def an_engine_library() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX here: pip install tensorrt-rtx")


@pytest.mark.parametrize("half", [False, True])
def test_an_engine_is_built_once(copied: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    an_engine_library()
    data, contract = read_policy_file(copied)
    calls: list[int] = []
    monkeypatch.setattr(
        tensorrt, "build_engine", lambda *args: calls.append(len(args)) or build_engine(*args)
    )
    digest = contract["digest"]
    engine = cached_engine(copied, data, digest, half)
    assert cached_engine(copied, data, digest, half) == engine
    assert len(calls) == 1
    (file,) = copied.parent.glob("*.engine")
    assert file.read_bytes() == engine and file.stat().st_mode & 0o777 == 0o600
    assert digest[:12] in file.name and file.name.endswith(f".{'fp16' if half else 'fp32'}.engine")
    file.chmod(0o666)
    cached_engine(copied, data, digest, half)
    assert len(calls) == 2 and file.stat().st_mode & 0o777 == 0o600
    cached_engine(copied, data, "0" * 64, half)
    assert len(calls) == 3 and len([*copied.parent.glob("*.engine")]) == 2


def test_both_forms_are_built_and_half_is_smaller(exported: Path) -> None:
    an_engine_library()
    for path in (exported, plain_path(exported)):
        single, half = (build_engine(path.read_bytes(), half) for half in (False, True))
        assert len(half) < 0.9 * len(single)  # weights of 2 bytes


def test_what_is_no_network_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    an_engine_library()
    with pytest.raises(RuntimeError, match="use_tensorrt: TensorRT cannot read the policy file"):
        build_engine(b"nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(copied: Path) -> None:
    an_engine_library()
    with pytest.raises(RuntimeError, match=r"use_tensorrt: TensorRT.* runs on an NVIDIA GPU") as error:
        PolicyRunner(copied, use_tensorrt=True)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_an_engine_repeats_the_policy(copied: Path, exported: Path) -> None:
    """On a GPU: both precisions, both forms, and any number of rows."""
    try:
        tensorrt.library()
    except ImportError as error:
        pytest.skip(str(error))
    data, contract = read_policy_file(copied)
    try:
        runner = PolicyRunner(copied, use_tensorrt=True)
    except RuntimeError as error:
        if "cannot load its engine" not in str(error):
            raise
        pytest.skip(f"a GPU that this TensorRT does not know: {error}")
    assert differs(runner._backend, contract) <= runner._backend.parity <= HALF_PARITY
    runner._backend._load(cached_engine(copied, data, contract["digest"]))
    assert differs(runner._backend, contract) <= PARITY
    plain = plain_path(exported)
    obs = np.random.default_rng(0).standard_normal((2500, 98), np.float32)
    found = PolicyRunner(plain, use_tensorrt=True).step(obs)
    np.testing.assert_allclose(found, PolicyRunner(plain).step(obs), rtol=0.01, atol=10 * HALF_PARITY)
