"""Hyper-parameters that are tensors, and those among them that require grad where no
gradient reaches: an option without effect is an error.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import Tensor

from ...errors import InvalidCall
from ..formula.base import Formula, Rule, TokenWeight
from ..formula.trace import COMPARISONS, Expr, Traced, trace_rule, trace_weight
from .ratio import Ratio
from .reduction import Reduction


class SpecParts(Protocol):
    """The parts of a policy loss's spec; see ``PolicyLossSpec``."""

    @property
    def rules(self) -> tuple[Rule, ...]: ...
    @property
    def penalties(self) -> tuple[Any, ...]: ...
    @property
    def weights(self) -> tuple[TokenWeight, ...]: ...
    @property
    def weights_of_reductions(self) -> tuple[TokenWeight, ...]: ...
    @property
    def all_weights(self) -> tuple[TokenWeight, ...]: ...
    @property
    def ratio(self) -> Ratio: ...
    @property
    def reduction(self) -> Reduction: ...
    @property
    def reductions(self) -> tuple[Reduction, ...]: ...


def tensors_of(node: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a spec or of a part, by the dotted names that
    ``replace`` takes."""
    if isinstance(node, Tensor):
        return {path: node}
    if isinstance(node, tuple):
        children = {str(at): child for at, child in enumerate(node)}
    elif dataclasses.is_dataclass(node):
        children = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    else:
        return {}
    return {
        name: t
        for head, child in children.items()
        for name, t in tensors_of(child, f"{path}.{head}".lstrip(".")).items()
    }


def refuse(owner: str, tensors: dict[str, Tensor], why: str) -> None:
    """Raise for a tensor that requires grad."""
    for name, value in tensors.items():
        if value.requires_grad:
            raise InvalidCall(
                f"{owner}: {name} requires grad, but no gradient reaches it: {why}. Pass "
                f"{name.rpartition('.')[2]}.detach()."
            )


def refuse_learnt(spec: SpecParts) -> None:
    """Raise for a hyper-parameter of a spec that requires grad but would get no
    gradient.
    """
    paths = ("surrogate", *[f"penalties.{at}.rule" for at in range(len(spec.penalties))])
    for path, rule in zip(paths, spec.rules, strict=True):
        refuse(
            "PolicyLossSpec",
            _stopped_in(rule, trace_rule(type(rule)), path),
            "the formula detaches it",
        )
    for at, w in enumerate(spec.weights):
        path = f"weights.{at}"
        if w.detach:
            refuse(
                "PolicyLossSpec",
                tensors_of(w, path),
                "the weight is detached, unless detach=False",
            )
        else:
            refuse(
                "PolicyLossSpec",
                _stopped_in(w, trace_weight(type(w)), path),
                "the formula detaches it",
            )
    for reduction in spec.reductions:
        owner = type(reduction).__name__
        refuse(owner, tensors_of(reduction.weight, "weight"), "a reduction's weight is detached")
        for name in reduction.detaches:
            refuse(owner, tensors_of(getattr(reduction, name), name), "the reduction detaches it")
    for formula in (*spec.rules, *spec.all_weights):
        refuse(
            "PolicyLossSpec",
            _detached_formula(formula),
            "a formula in the place of a number is detached",
        )


def _stopped_in(formula: Rule | TokenWeight, traced: Traced, path: str) -> dict[str, Tensor]:
    """The tensors among a formula's hyper-parameters that its result has no gradient
    by.
    """
    moving = _moving(traced.result)
    return {
        f"{path}.{n}": v
        for n, v in formula.parameters().items()
        if isinstance(v, Tensor) and n not in moving
    }


def _detached_formula(formula: Formula) -> dict[str, Tensor]:
    """The tensors of formulas that stand for hyper-parameters."""
    inner = {n: v for n, v in formula.parameters().items() if isinstance(v, TokenWeight)}
    return {
        name: t
        for n, v in inner.items()
        for name, t in tensors_of(v, f"{formula.name}.{n}").items()
    }


def _moving(result: Expr) -> set[str]:
    """The hyper-parameters that a gradient reaches: neither beneath a stop nor in a
    condition alone.
    """
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [result]
    while waiting:
        x = waiting.pop()
        if x.index in seen or x.op == "stop" or x.op in COMPARISONS:
            continue
        seen.add(x.index)
        if x.op == "param":
            found.add(x.args[0])
        waiting += x.operands[1:] if x.op == "where" else x.operands
    return found
