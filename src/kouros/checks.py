"""Errors that name the field, the value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any


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
