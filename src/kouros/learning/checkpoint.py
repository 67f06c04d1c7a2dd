"""Checkpoints: one file holds a run, or only its policy. Tensors and plain data, never pickled code."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kouros.files import replacing

FORMAT = 1


def pack(content: dict[str, Any]) -> bytes:
    """A checkpoint as bytes; files are written from them: torch reports a full disk in a way of its own."""
    buffer = io.BytesIO()
    torch.save({"kouros_format": FORMAT, **content}, buffer)
    return buffer.getvalue()


def write(path: str | Path, data: bytes) -> None:
    """Write what :func:`pack` gave; the file appears whole or not at all.

    Raises:
      OSError: it cannot be written; an older file of that name is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def save(path: str | Path, content: dict[str, Any]) -> None:
    """:func:`pack` and :func:`write`."""
    write(path, pack(content))


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not a checkpoint of Kouros, or of a format this version does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    return unpack(path.read_bytes(), f"checkpoint {path}", map_location)


def unpack(data: bytes, where: str, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of :func:`pack`; errors as of :func:`load`."""
    try:
        content = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    except Exception as error:  # what a stranger's bytes make torch raise is no fixed list
        raise ValueError(f"{where}: damaged, or not a checkpoint of Kouros") from error
    version = content.get("kouros_format") if isinstance(content, dict) else None
    if version is None:
        raise ValueError(f"{where}: not written by Kouros")
    if version != FORMAT:
        raise ValueError(
            f"{where}: format {version}, this version reads {FORMAT}; "
            "install the version of Kouros that wrote it"
        )
    return content


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a network's weights."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
