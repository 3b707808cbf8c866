"""The ``Args`` of an entry, from its signature: type, default, range, and a
description.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..ranges import Kind, Range
from .descriptions import description


def _ranges(function: Callable[..., Any]) -> dict[str, Range]:
    """Return the ranges that say what a parameter is. A type alone does not."""
    found = getattr(function, "__ranges__", {})
    return {name: allowed for name, allowed in found.items() if not isinstance(allowed, Kind)}


def with_arguments(function: Callable[..., Any], owner: str) -> str:
    """Return the docstring with every parameter.

    What :func:`.descriptions.description` does not know of an ``owner`` is left to the
    docstring: only a user's own entry may have such arguments.
    """
    text, ranges = inspect.cleandoc(function.__doc__ or ""), _ranges(function)
    lines = []
    for name, p in inspect.signature(function).parameters.items():
        if name.startswith("_"):
            continue
        # those of a named tuple are ForwardRef("Tensor")
        kind = (
            ""
            if p.annotation is p.empty
            else getattr(p.annotation, "__forward_arg__", str(p.annotation))
        )
        default = "" if p.default is p.empty else f"default {p.default!r}"
        about = ", ".join(part for part in (kind, default) if part)
        said = description(owner, name) or (f"{ranges[name]}." if name in ranges else "See above.")
        lines.append(f"    {name}{f' ({about})' if about else ''}: {said}")
    if not lines or "\nArgs:" in text:
        return text
    return "\n".join([text, "", "Args:", *lines])
