"""What follows from the formulas of a policy loss's spec: the statistics that they
read, their program, and why they have none. Tracing finds it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..formula.base import DIFFERENTIABLE_FIELDS, Rule, TokenWeight
from ..formula.loss_program import Program, loss_graph
from ..formula.monitor import Monitor
from ..formula.stages import CannotStage, Staged, formulas_of, is_row, staged, values_of
from ..formula.trace import Expr, trace_rule, trace_weight, walk
from .learnt import tensors_of
from .policy_parts import SpecParts

#: ``exp`` of a larger number overflows in fp32, with some margin.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class Facts:
    """The facts of a spec. They depend only on the kinds of its hyper-parameters.

    ``PolicyLossSpec`` has a property for each, which says what it is.
    """

    requires: frozenset[str]
    unsupported_reason: str | None
    program: Program | None
    program_text: str | None
    staged: Staged | None
    staged_weights: Staged | None
    stored_program: Program | None
    moving: frozenset[str]
    monitor: Monitor | None
    unbounded: bool
    weights_read_groups: bool


def facts_of(spec: SpecParts) -> Facts:
    """Find the facts of a spec whose fields and reductions are there."""
    given_reason, unstored_reason = _given_reason(spec), _unstored_reason(spec)
    reason = (
        spec.ratio.one_pass_unsupported_reason
        or unstored_reason
        or given_reason
        or _reduction_reason(spec)
    )
    program = _own_program(spec) if reason is None else None
    in_stages, stored_program = None, None
    if unstored_reason is None and given_reason is None:
        stored_program = _own_program(spec)
    elif unstored_reason is None:
        with suppress(CannotStage):
            in_stages = staged(spec.rules, spec.weights, _is_given_ratio(spec))
            stored_program = in_stages.program
    return Facts(
        _requires(spec),
        reason,
        program,
        program and program.encode(),
        in_stages,
        _staged_weights(spec),
        stored_program,
        _moving(spec, stored_program),
        _monitor(spec, stored_program, in_stages),
        _is_unbounded(spec),
        any(trace_weight(type(w)).reads_groups for w in (*spec.all_weights, *inner_formulas(spec))),
    )


def parameter_values(spec: SpecParts, in_stages: Staged | None) -> tuple[Any, ...]:
    """Return the hyper-parameters in the order of the parameters of the program for
    stored rows.
    """
    coefficients = (1.0, *(p.coef for p in spec.penalties))
    if in_stages is not None:
        following = iter(coefficients)
        known = values_of(in_stages.values, formulas_of([*spec.rules, *spec.weights]))
        return (*spec.ratio.bounds(), *[next(following) if v is None else v for v in known])
    values = [*spec.ratio.bounds()]
    for coefficient, rule in zip(coefficients, spec.rules, strict=True):
        values += [coefficient, *rule.parameters().values()]
    for w in spec.weights:
        values += w.parameters().values()
    return tuple(values)


def inner_formulas(spec: SpecParts) -> list[TokenWeight]:
    """Return the formulas that are hyper-parameters of rules and weights."""
    found: list[TokenWeight] = []
    waiting: list[Any] = [*spec.rules, *spec.all_weights]
    while waiting:
        inner = [v for v in waiting.pop().parameters().values() if isinstance(v, TokenWeight)]
        found += inner
        waiting += inner
    return found


def reads_stored_only(weight: TokenWeight) -> bool:
    """Return whether a weight is known before the pass, because it reads nothing of the
    current policy.
    """
    inner = (v for v in weight.parameters().values() if isinstance(v, TokenWeight))
    return trace_weight(type(weight)).leaves.isdisjoint(DIFFERENTIABLE_FIELDS) and all(
        map(reads_stored_only, inner)
    )


def _own_program(spec: SpecParts) -> Program:
    return Program.of(map(type, spec.rules), [(type(w), w.scope) for w in spec.weights])


def _is_given_ratio(spec: SpecParts) -> bool:
    return spec.ratio.one_pass_unsupported_reason is not None


def _requires(spec: SpecParts) -> frozenset[str]:
    found = set(spec.ratio.requires)
    for r in spec.rules:
        found |= trace_rule(type(r)).leaves
    for w in (*spec.all_weights, *inner_formulas(spec)):
        found |= trace_weight(type(w)).leaves
    for reduction in spec.reductions:
        found |= set(reduction.requires)
    if "log_ratio" in found and spec.ratio.against == "ref":
        found.add("ref_logp")
    return frozenset(found)


def _moving(spec: SpecParts, stored_program: Program | None) -> frozenset[str]:
    stored = {"old_logp", "ref_logp", "sampling_logp"}
    if stored_program is not None:  # its derivatives know which gradients a formula stops
        given = _is_given_ratio(spec)
        graph = loss_graph(stored_program, given)
        found = {name for name in stored if graph.moves(name)}
        ratio = given and graph.moves("log_ratio")
    else:
        formulas = [trace_rule(type(r)).leaves for r in spec.rules] + [
            trace_weight(type(w)).leaves for w in spec.weights if not w.detach
        ]
        leaves = set().union(*formulas)
        found, ratio = leaves & stored, "log_ratio" in leaves
    return frozenset(found | {f"{spec.ratio.against}_logp"} if ratio else found)


def _staged_weights(spec: SpecParts) -> Staged | None:
    with suppress(CannotStage):
        if spec.weights_of_reductions:
            return staged(spec.weights_of_reductions, (), _is_given_ratio(spec))
    return None


def _monitor(
    spec: SpecParts, stored_program: Program | None, in_stages: Staged | None
) -> Monitor | None:
    if in_stages is not None:
        return None if in_stages.monitor is None else in_stages.monitor[0]
    if stored_program is None:
        return None
    # a user's clipped() may do something that only torch can do
    with suppress(TypeError, AttributeError):
        return Monitor.of([type(rule) for rule in spec.rules], stored_program.terms)
    return None


def _is_unbounded(spec: SpecParts) -> bool:
    traced = [(r, trace_rule(type(r))) for r in spec.rules] + [
        (w, trace_weight(type(w))) for w in spec.all_weights
    ]
    return any(
        not _is_bounded(spec, x.args[0], formula)
        for formula, t in traced
        for x in walk(t.result)
        if x.op in ("exp", "expm1")
    )


def _is_bounded(spec: SpecParts, x: Expr, formula: Rule | TokenWeight) -> bool:
    if x.op == "leaf":
        bounds = spec.ratio.bounds() if x.args[0] == "log_ratio" else (0,)
    elif x.op == "clip":
        names = [a.args[0] for limit in x.args[1:] for a in walk(limit) if a.op == "param"]
        bounds = tuple(getattr(formula, name) for name in names)
    else:
        return False
    return all(isinstance(b, (int, float)) and abs(b) <= _LARGEST_EXPONENT for b in bounds)


def _unstored_reason(spec: SpecParts) -> str | None:
    """Return why a kernel cannot evaluate the loss even on stored rows, if the ratio is
    given.
    """
    for w in spec.weights:
        if not w.detach:
            return f"the weight {w.name!r} is not detached"
    values: list[Any] = [*spec.ratio.bounds(), *(p.coef for p in spec.penalties)]
    if any(map(is_row, values)):
        return "a hyper-parameter is a per-row tensor"
    for formula in (*spec.rules, *spec.weights):
        values += formula.parameters().values()
    for reduction in spec.reductions:
        values += tensors_of(reduction).values()
    if any(isinstance(v, Tensor) and v.requires_grad for v in values):
        return "a hyper-parameter requires grad"
    return None


def _given_reason(spec: SpecParts) -> str | None:
    """Return why a formula of the loss needs more than the row's own numbers."""
    for w in spec.weights:
        if trace_weight(type(w)).uses_batch:
            return f"the weight {w.name!r} uses batch statistics"
    if inner := inner_formulas(spec):
        return f"a hyper-parameter is the formula {inner[0].name!r}"
    for formula in (*spec.rules, *spec.weights):
        if any(map(is_row, formula.parameters().values())):
            return "a hyper-parameter is a per-row tensor"
    return None


def _reduction_reason(spec: SpecParts) -> str | None:
    if not spec.reduction.scalar:
        return "the loss is not reduced to a number"
    for r in spec.reductions:
        if r.coupled:
            return f"{type(r).__name__} couples tokens: their coefficients depend on all of them"
        if r.weight is not None and not reads_stored_only(r.weight):
            return (
                f"a reduction is over the weight {r.weight.name!r}, which reads current statistics"
            )
    return None
