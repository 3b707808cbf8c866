"""The package's own rules and weights that a kernel can evaluate, sorted by name,
without those of tests.
"""

from __future__ import annotations

import reweight_ops  # noqa: F401  (registers them)
from reweight_ops._core.formula.trace import trace_weight
from reweight_ops.rules import RULES, WEIGHTS, Rule, TokenWeight


def _own(registry: dict[str, type]) -> dict[str, type]:
    return {
        name: cls
        for name, cls in sorted(registry.items())
        if cls.__module__.split(".")[0] == "reweight_ops"
    }


def own_rules() -> dict[str, type[Rule]]:
    return _own(RULES)


def own_weights() -> dict[str, type[TokenWeight]]:
    """The weights that are pointwise and detached."""
    return {
        n: cls
        for n, cls in _own(WEIGHTS).items()
        if not trace_weight(cls).uses_batch and getattr(cls, "detach", True)
    }
