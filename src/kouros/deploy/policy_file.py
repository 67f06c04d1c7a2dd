"""Reads the policy file and refuses what is not one. Needs NumPy alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from kouros import CONTRACT_VERSION

PRODUCER = b"kouros"
NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')
_VERSION = re.compile(rb'"contract_version": (\d+)')
AGAIN = "export the policy again (kouros export), or copy the file again"


def _with_digest(data: bytes, value: str) -> bytes:
    return _DIGEST.sub(f'"digest": "{value}"'.encode(), data)


def signed(data: bytes) -> bytes:
    """A policy file with the digest of its own in the place for it: SHA-256 while that place is blank."""
    blank = _with_digest(data, NO_DIGEST)
    return _with_digest(blank, hashlib.sha256(blank).hexdigest())


def read_policy_file(path: str | Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a policy file and its contract. Nothing of the file is run.

    Raises:
      FileNotFoundError: no such file.
      ValueError: foreign, cut short, damaged, or with a contract of another version; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; kouros export writes one")
    data = path.read_bytes()
    version = _VERSION.search(data)
    if version and int(version[1]) != CONTRACT_VERSION:
        age = "an older" if int(version[1]) < CONTRACT_VERSION else "a newer"
        raise ValueError(
            f"{path}: contract version {int(version[1])}, written by {age} Kouros; this one reads "
            f"{CONTRACT_VERSION}: export the policy with this version, or install that one"
        )
    if PRODUCER not in data[:64]:
        raise ValueError(
            f"{path}: not written by kouros export, or damaged at its start: there is no contract that says "
            "which sensors, joints and gains it means"
        )
    if not (version and _DIGEST.search(data)):
        raise ValueError(f"{path}: cut short or damaged; {AGAIN}")
    if signed(data) != data:
        raise ValueError(f"{path}: damaged, its digest is another; {AGAIN}")
    start = data.rindex(b"{", 0, version.start())
    contract, _ = json.JSONDecoder().raw_decode(data[start:].decode("utf-8", "replace"))
    return data, contract


def plain_path(path: str | Path) -> Path:
    """Where the plain form of a policy file lies: ``policy.plain.onnx`` beside ``policy.onnx``."""
    return Path(path).with_suffix(".plain.onnx")


def pack(array: np.ndarray) -> dict[str, Any]:
    """An array as plain data, float32."""
    data = np.ascontiguousarray(array, np.float32)
    return {"shape": list(data.shape), "float32": base64.b64encode(data.tobytes()).decode()}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The array that :func:`pack` packed."""
    return np.frombuffer(base64.b64decode(packed["float32"]), np.float32).reshape(packed["shape"])
