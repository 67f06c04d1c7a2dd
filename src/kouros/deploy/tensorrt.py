"""Runs a policy file as a TensorRT engine, which is built once for each file, GPU and version of TensorRT.

One backend serves ``tensorrt`` and ``tensorrt_rtx``, which have one interface. Needs torch with CUDA: the
engine's memory is torch's.
"""

from __future__ import annotations

import importlib
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kouros.deploy.runner import PARITY, differs, make_buffers
from kouros.files import replacing

LIBRARIES = ("tensorrt", "tensorrt_rtx")
MAX_ROWS = 1024

# What FP16 may differ, of targets in rad and of actions: the shipped policies differ by 0.0013 rad and 0.003
# in 1,000 steps; robust ones are trained with encoders that are off by 0.006 rad; 0.5 Nm at a G1's knee.
HALF_PARITY = 5e-3

# Multiplications by less than this, such as the gait clock's by 2 x 2, stay FP32: nothing is gained there.
SMALL = 8


def library() -> Any:
    """The module ``tensorrt``, or else ``tensorrt_rtx``.

    Raises:
      ImportError: neither is installed.
    """
    for name in LIBRARIES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError(
        "use_tensorrt: TensorRT is not installed: pip install tensorrt-rtx (GeForce and RTX), or pip install "
        "tensorrt"
    )


def capability() -> str:
    """The compute capability of the GPU, such as ``sm89``; ``any`` where there is none."""
    if not torch.cuda.is_available():
        return "any"
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def build_engine(data: bytes, half: bool = False) -> bytes:
    """Build an engine for 1 to 1,024 rows, best at one.

    TensorRT-RTX builds without a GPU too, for all that it supports by default: Ampere and later.

    Args:
      data: a policy file, or its plain form.
      half: multiply by the network's weights in FP16; all else stays FP32.

    Raises:
      ImportError: no TensorRT.
      RuntimeError: it cannot build here, or not from this file.
    """
    trt, target = library(), capability()
    if target == "any" and trt.__name__ != "tensorrt_rtx":
        raise RuntimeError(
            "use_tensorrt: tensorrt builds on the GPU that it builds for, and there is none here"
        )
    builder = trt.Builder(_logger(trt))
    # The default since TensorRT 11, which left FP16 to the network alone.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, _logger(trt))
    if not parser.parse(data):
        raise RuntimeError(
            f"use_tensorrt: TensorRT cannot read the policy file: {parser.get_error(0).desc()}"
        )
    if half:
        _halve(trt, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and as coarse as FP16
    if target != "any" and hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    profile = builder.create_optimization_profile()
    for name, size in ((i.name, i.shape[1]) for i in map(network.get_input, range(network.num_inputs))):
        profile.set_shape(name, (1, size), (1, size), (MAX_ROWS, size))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(
            f"use_tensorrt: {_title(trt)} cannot build for {target}; its reason is printed above"
        )
    return bytes(engine)


def cached_engine(path: Path, data: bytes, digest: str, half: bool = False) -> bytes:
    """The engine beside a policy file, built if it is not there or not to be trusted.

    Args:
      path: of the policy file.
      data: its content.
      digest: its digest.
      half: see :func:`build_engine`, which says what is raised.
    """
    trt = library()
    version, precision = f"{trt.__name__}-{trt.__version__}", "fp16" if half else "fp32"
    file = path.with_name(f"{path.stem}.{digest[:12]}.{version}.{capability()}.{precision}.engine")
    engine = read_trusted(file)
    if engine is None:
        engine = build_engine(data, half)
        try:
            with replacing(file) as temporary, open(temporary, "xb", opener=_private) as out:
                out.write(engine)
        except OSError as error:
            warnings.warn(f"{error}: the engine will be built again next time", stacklevel=2)
    return engine


def read_trusted(file: Path) -> bytes | None:
    """The content of a file that nobody but this user can have written: an engine is code. Else None."""
    # What is looked at is what is read: no link to another file, no pipe to wait for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(file, "rb", opener=lambda path, _: os.open(path, flags)) as opened:
            status = os.fstat(opened.fileno())
            mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
            return opened.read() if mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None
    except OSError:
        return None


class Engine:
    """TensorRT on torch's current GPU; see :class:`kouros.deploy.runner.PolicyRunner` for what a backend is.

    FP16 where it repeats the steps that were recorded at the export within :data:`HALF_PARITY`, else, with a
    warning, FP32.

    Args:
      path: of the policy file; engines lie beside it.
      data: its content.
      contract: what it says of itself.

    Attributes:
      parity: what the engine may differ from the recorded steps.

    Raises:
      ImportError: no TensorRT.
      RuntimeError: no GPU, or TensorRT does not work on it.
    """

    def __init__(self, path: Path, data: bytes, contract: dict[str, Any]) -> None:
        title = _title(library())
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"use_tensorrt: {title} runs on an NVIDIA GPU, and torch {torch.__version__} finds none; "
                "install its driver and a torch with CUDA, or leave use_tensorrt out"
            )
        self.name, self.parity = f"{title}, {capability()}, FP16", HALF_PARITY
        self._load(cached_engine(path, data, contract["digest"], half=True))
        difference = differs(self, contract)
        if not difference <= HALF_PARITY:
            warnings.warn(
                f"{path}: in FP16 {title} differs by {difference:.2g} from the steps that were recorded at "
                f"the export (at most {HALF_PARITY:g} is allowed); FP32 is used",
                stacklevel=3,
            )
            self.name, self.parity = f"{title}, {capability()}, FP32", PARITY
            self._load(cached_engine(path, data, contract["digest"]))

    def _load(self, engine: bytes) -> None:
        trt = library()
        self._runtime = trt.Runtime(_logger(trt))
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise RuntimeError(
                f"use_tensorrt: {_title(trt)} cannot load its engine; its reason is printed above"
            )
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        sizes = {name: self._engine.get_tensor_shape(name)[1] for name in names}
        given = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        given.sort(key=lambda name: name == "state")  # sensors come first
        self.inputs = make_buffers({name: sizes[name] for name in given})
        self.outputs = make_buffers({name: sizes[name] for name in names if name not in given})
        # One allocation for each: TensorRT wants them aligned to 256 bytes.
        self._device = {name: torch.zeros(MAX_ROWS, sizes[name], device="cuda") for name in names}
        for name, tensor in self._device.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self._run(self.inputs, self.outputs)

    def many(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs for inputs of any number of rows."""
        rows = len(next(iter(inputs.values())))
        outputs = {name: np.empty((rows, row.shape[1]), np.float32) for name, row in self.outputs.items()}
        for start in range(0, rows, MAX_ROWS):
            part = slice(start, start + MAX_ROWS)
            self._run(
                {name: array[part] for name, array in inputs.items()},
                {name: array[part] for name, array in outputs.items()},
            )
        return outputs

    def _run(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        """Fill ``outputs`` from ``inputs``, ``(n, size)`` by name with n of at most ``MAX_ROWS``."""
        with torch.cuda.stream(self._stream):
            for name, array in inputs.items():
                self._context.set_input_shape(name, array.shape)
                self._device[name][: len(array)].copy_(torch.from_numpy(array))
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(f"{self.name}: could not run the engine; the reason is printed above")
            for name, array in outputs.items():
                torch.from_numpy(array).copy_(self._device[name][: len(array)])  # waits for the stream


def _halve(trt: Any, network: Any) -> None:
    """Make a network multiply by its weights in FP16."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        if layer.type != trt.LayerType.MATRIX_MULTIPLY or min(layer.get_input(1).shape) < SMALL:
            continue
        product = layer.get_output(0)
        for place in range(2):
            halved = network.add_cast(layer.get_input(place), trt.float16)
            layer.set_input(place, halved.get_output(0))
        single = network.add_cast(product, trt.float32).get_output(0)
        for reader in layers:
            for place in range(reader.num_inputs):
                given = reader.get_input(place)
                if given is not None and given.name == product.name:
                    reader.set_input(place, single)


def _logger(trt: Any) -> Any:
    return trt.Logger(trt.Logger.ERROR)


def _title(trt: Any) -> str:
    return f"{'TensorRT-RTX' if trt.__name__ == 'tensorrt_rtx' else 'TensorRT'} {trt.__version__}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
