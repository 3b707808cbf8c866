"""What the parts of a spec must be, in the words of its errors."""

from __future__ import annotations

from typing import Any

from ...errors import InvalidCall


def require_tuple(owner: str, field: str, value: Any) -> None:
    """Parts come as a tuple: a spec is compared and kept by its value."""
    if not isinstance(value, tuple):
        meant = f"tuple({field})" if isinstance(value, list) else f"({field.rstrip('s')},)" if field != "penalties" else "(penalty,)"
        raise InvalidCall(f"{owner}: {field} is a {type(value).__name__}, expected a tuple: {field}={meant}.{called(value)}")


def called(value: Any) -> str:
    """A hint for a class or function that stands where what it returns is meant."""
    if isinstance(value, type):
        return f" It is a class: write {value.__name__}(...)."
    return f" It is a function: call it, {value.__name__}(...)." if callable(value) and hasattr(value, "__name__") else ""
