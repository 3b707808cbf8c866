"""Published methods by name: each is one function that returns a spec with the paper's defaults."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidCall
from ..spec import PolicyLossSpec

Builder = Callable[..., PolicyLossSpec]


@dataclass(frozen=True)
class Method:
    """A registry entry: ``certainty`` is ``verified`` (the paper or the authors' code), ``secondary`` (a port, notes) or ``derived``."""

    name: str
    full_name: str
    paper: str
    arxiv: str
    certainty: str
    build: Builder

    @property
    def formula(self) -> str:
        """The builder's docstring: formula, equation, and what differs from the paper."""
        return inspect.getdoc(self.build) or ""

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: p.default for name, p in inspect.signature(self.build).parameters.items()}


METHODS: dict[str, Method] = {}


def published(name: str, full_name: str, *, paper: str, arxiv: str, certainty: str = "verified") -> Callable[[Builder], Builder]:
    """Register a function that returns a spec. ``arxiv`` is the id, or ``unknown``; never invented."""

    def register(build: Builder) -> Builder:
        known = METHODS.get(name)
        if known is not None and known.build.__module__ != build.__module__:
            raise InvalidCall(f"the method {name!r} is taken by {known.build.__module__}.")
        METHODS[name] = Method(name, full_name, paper, arxiv, certainty, build)
        return build

    return register


def method(name: str, **options: Any) -> PolicyLossSpec:
    """The spec of the method of that name: ``method("dapo", epsilon_high=0.3)`` is ``methods.dapo(epsilon_high=0.3)``."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise InvalidCall(
            f"no method {name!r}.{f' Did you mean {near[0]!r}?' if near else ''} The methods are: {', '.join(sorted(METHODS))}."
        )
    return METHODS[name].build(**options)
