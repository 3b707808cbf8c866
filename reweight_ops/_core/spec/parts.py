"""Checks of the parts of a spec, with their error messages."""

from __future__ import annotations

import difflib
import re
from typing import Any

from ...errors import InvalidCall
from ..formula.base import RULES, WEIGHTS, Rule, TokenWeight


def require_tuple(owner: str, field: str, value: Any) -> None:
    """Raise unless the parts are a tuple. A spec is compared and kept by its value."""
    if not isinstance(value, tuple):
        meant = (
            f"tuple({field})"
            if isinstance(value, list)
            else f"({field.rstrip('s')},)"
            if field != "penalties"
            else "(penalty,)"
        )
        raise InvalidCall(
            f"{owner}: {field} is a {type(value).__name__}, expected a tuple: "
            f"{field}={meant}.{called(value)}"
        )


def require_name(owner: str, value: Any) -> None:
    """A spec's name is text, for tables and messages, or None."""
    if value is not None and not isinstance(value, str):
        raise InvalidCall(f"{owner}: name is {value!r}, expected a string or None.")


def require_part(
    owner: str, field: str, value: Any, kind: type, where: str = "rw", word: str = "is"
) -> None:
    """Raise if a value is not a part of the kind.

    ``where`` is the namespace of its classes. The registry names rules and weights.
    """
    if not isinstance(value, kind):
        raise InvalidCall(
            f"{owner}: {field} {word} {value!r}, expected a "
            f"{kind.__name__}.{called(value) or _named(value, kind, where)}"
        )


def called(value: Any) -> str:
    """Return a hint if the value is a class or a function whose result is meant."""
    if isinstance(value, type):
        return f" It is a class: write {value.__name__}(...)."
    return (
        f" It is a function: call it, {value.__name__}(...)."
        if callable(value) and hasattr(value, "__name__")
        else ""
    )


def _named(value: Any, kind: type, where: str) -> str:
    """A hint for a part's name that stands for the part."""
    if not isinstance(value, str):
        return ""
    if kind is Rule:
        known: dict[str, str] = {name: f"rw.rules.RULES[{name!r}](...)" for name in RULES}
    elif kind is TokenWeight:
        known = {name: f"rw.weights.{cls.__name__}(...)" for name, cls in WEIGHTS.items()}
    else:
        known = {_snake(cls.__name__): f"{where}.{cls.__name__}(...)" for cls in _below(kind)}
    near = difflib.get_close_matches(_snake(value), known, n=1)
    return (
        f" Write {known[near[0]]}."
        if near
        else f" A name is none: the classes are {', '.join(sorted(known.values()))}."
    )


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _below(kind: type) -> list[type]:
    """Return the classes that a user may name."""
    found: list[type] = []
    below: list[type] = kind.__subclasses__()
    for cls in below:
        found += [*([] if cls.__name__.startswith("_") else [cls]), *_below(cls)]
    return found
