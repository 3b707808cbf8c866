"""What ``help`` says of a public class or function that is neither an op nor an entry
of the catalogue: its arguments, what it is for, its shapes, its errors, an example.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Container, Iterator
from types import ModuleType
from typing import Any

from .arguments import with_arguments
from .registry import CATALOGUE, KINDS
from .sections import with_sections
from .tiers import TIERS


def parts(module: ModuleType, ops: Container[Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``(name after "rw.", class or function)`` of a public module, without the
    ``ops``, the entries and the exceptions.
    """
    package, _, inside = module.__name__.partition(".")
    entries = {id(e.function) for of_kind in CATALOGUE.values() for e in of_kind.values()}
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if (
            (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__.startswith(f"{package}.")
            and id(value) not in entries
            and not (inspect.isclass(value) and issubclass(value, Exception))
            and value not in ops
        ):
            yield f"{inside}.{name}".lstrip("."), value


def tiers_text(namespace: str) -> str:
    """The entries of a namespace by tier, for its docstring; empty without entries."""
    entries = [
        entry
        for kind, (where, _) in KINDS.items()
        if where == namespace
        for entry in CATALOGUE[kind].values()
    ]
    parts_of = {
        tier: sorted(e.function.__name__ for e in entries if e.tier == tier) for tier in TIERS
    }
    return "\n\n".join(
        textwrap.fill(f"{tier.capitalize()} ({TIERS[tier]}): {', '.join(names)}.", 88)
        for tier, names in parts_of.items()
        if names
    )


def complete(module: ModuleType, ops: Container[Any]) -> None:
    """Give every part of a public module the sections that its docstring lacks, and the
    module its entries by tier.
    """
    tiers = tiers_text(f"rw.{module.__name__.partition('.')[2]}")
    if tiers:
        module.__doc__ = f"{(module.__doc__ or '').rstrip()}\n\n{tiers}\n"
    for name, value in parts(module, ops):
        doc = with_arguments(value, name)
        value.__doc__ = with_sections(value, doc, "part", name)
