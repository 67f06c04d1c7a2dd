"""Checkpoints: one file holds a run, or only its policy. Tensors and plain data, never pickled code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from kouros.files import replacing

FORMAT = 1


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Raises:
      OSError: it cannot be written; an older file of that name is untouched.
    """
    # Through memory: torch reports a full disk as an error of its own kind.
    buffer = io.BytesIO()
    torch.save({"kouros_format": FORMAT, **content}, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not a checkpoint of Kouros, or of a format this version does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # what a stranger's bytes make torch raise is no fixed list
        raise ValueError(f"checkpoint {path}: damaged, or not a checkpoint of Kouros") from error
    version = content.get("kouros_format") if isinstance(content, dict) else None
    if version is None:
        raise ValueError(f"checkpoint {path}: not written by Kouros")
    if version != FORMAT:
        raise ValueError(
            f"checkpoint {path}: format {version}, this version reads {FORMAT}; "
            "install the version of Kouros that wrote it"
        )
    return content
