"""Published losses by name: each is one function that returns a spec with the paper's defaults."""

from __future__ import annotations

import functools
from typing import Any

from ..catalogue import registry
from ..spec import PolicyLossSpec

#: Name to :class:`~reweight_ops.catalogue.Entry`: the losses of the catalogue.
METHODS = registry.CATALOGUE["policy_loss"]

#: Register a function that returns a spec: ``@published("dapo", "full name", paper=..., arxiv=...)``.
published = functools.partial(registry.published, kind="policy_loss")


def method(name: str, **options: Any) -> PolicyLossSpec:
    """The spec of the method of that name: ``method("dapo", epsilon_high=0.3)`` is ``methods.dapo(epsilon_high=0.3)``."""
    spec: PolicyLossSpec = registry.find(name, "policy_loss")[0].function(**options)
    return spec
