"""Checks of the parts of a spec, with their error messages."""

from __future__ import annotations

from typing import Any

from ...errors import InvalidCall


def require_tuple(owner: str, field: str, value: Any) -> None:
    """Raise unless the parts are a tuple. A spec is compared and kept by its value."""
    if not isinstance(value, tuple):
        meant = f"tuple({field})" if isinstance(value, list) else f"({field.rstrip('s')},)" if field != "penalties" else "(penalty,)"
        raise InvalidCall(f"{owner}: {field} is a {type(value).__name__}, expected a tuple: {field}={meant}.{called(value)}")


def called(value: Any) -> str:
    """Return a hint if the value is a class or a function whose result is meant."""
    if isinstance(value, type):
        return f" It is a class: write {value.__name__}(...)."
    return f" It is a function: call it, {value.__name__}(...)." if callable(value) and hasattr(value, "__name__") else ""
