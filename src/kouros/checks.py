"""Errors that name the field, the value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def check_choice(field: str, value: object, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``; suggest the nearest."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field}={value!r}: choose from {', '.join(choices)}{hint}")


def require(config: object, field: str, ok: bool, rule: str) -> None:
    """Raise ``ValueError`` with the field's value and the rule unless ``ok``."""
    if not ok:
        raise ValueError(f"{field}={getattr(config, field)!r}: {rule}")


def require_range(config: object, field: str) -> None:
    """Raise ``ValueError`` unless the field is a pair of numbers, the lowest first."""
    pair = getattr(config, field)
    ok = isinstance(pair, tuple | list) and len(pair) == 2 and pair[0] <= pair[1]
    require(config, field, ok, "must be (lowest, highest)")


def require_state(what: str, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ValueError`` unless a state holds tensors of these names and shapes, and no others."""
    found = {name: tuple(x.shape) for name, x in state.items() if hasattr(x, "shape")}
    if found != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise ValueError(f"{what}: the state is of another one; use the run's own configuration and num_envs")


def require_numbers(config: Any) -> None:
    """Raise ``ValueError`` if a number in a configuration, or in its tables, is NaN, infinite, or not whole
    where the field is an int."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        whole = field.type != "int" or (isinstance(value, int) and not isinstance(value, bool))
        require(config, field.name, whole, "must be a whole number")
        values = value.values() if isinstance(value, dict) else value
        for x in values if isinstance(values, Iterable) else [values]:
            require(config, field.name, not isinstance(x, float) or math.isfinite(x), "must be finite")
