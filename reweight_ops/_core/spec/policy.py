"""The spec of a method: a surrogate, penalties, a ratio level, weights and a reduction.

Data and facts of the model head are call arguments.
"""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..compiler import constant_result
from ..formula.base import DIFFERENTIABLE_FIELDS, RULES, Rule, TokenWeight
from ..formula.loss_program import Program, loss_graph
from ..formula.monitor import Monitor
from ..formula.stages import CannotStage, Staged, formulas_of, is_row, staged, values_of
from ..formula.trace import Expr, trace_rule, trace_weight, walk
from ..ranges import Number, Real, ranged
from .compiled import describe, rebuild, set_default
from .learnt import detached_formula, refuse, stopped_in, tensors_of
from .parts import require_name, require_part, require_tuple
from .ratio import Ratio, TokenRatio
from .reduction import NoReduction, Reduction, TokenMean

#: ``exp`` of a larger number overflows in fp32, with some margin.
_LARGEST_EXPONENT = 80.0


@ranged
@dataclass(frozen=True)
class Penalty:
    """A penalty: ``coef * sum_i w_i * rule(row i)``.

    ``w`` comes from the spec's reduction or from the penalty's own. The coefficient is
    not part of the rule, so that the metric of the same name is unscaled.
    """

    rule: Rule
    coef: Real[Number]
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        require_part("Penalty", "rule", self.rule, Rule)
        if self.reduction is not None:
            require_part("Penalty", "reduction", self.reduction, Reduction)


@dataclass(frozen=True, kw_only=True)
class PolicyLossSpec:
    """``L = loss_scale * Σ_k coef_k · Σ_i w_ki · u_ki · ℓ_k(row i)``. k = 0 is the
    surrogate (coef 1), k > 0 are the penalties.

    ``w`` comes from the reductions, ``u`` from the weights (scope ``"surrogate"`` or
    ``"all"``). A hyper-parameter is a number, a 0-d tensor (a schedule: nothing is
    recompiled when its value changes), a per-row tensor, or a formula (a detached
    :class:`TokenWeight`). The last two take two_pass. The default of ``ratio`` is
    ``TokenRatio()``, and that of ``reduction`` is ``TokenMean()``.
    """

    surrogate: Rule
    penalties: tuple[Penalty, ...] = ()
    ratio: Ratio = None  # type: ignore[assignment]  # TokenRatio()
    weights: tuple[TokenWeight, ...] = ()
    reduction: Reduction = None  # type: ignore[assignment]  # TokenMean()
    name: str | None = None

    def __post_init__(self) -> None:
        set_default(self, "ratio", TokenRatio)
        set_default(self, "reduction", TokenMean)
        require_name("PolicyLossSpec", self.name)
        for field in ("penalties", "weights"):
            require_tuple("PolicyLossSpec", field, getattr(self, field))
        for field, kind in (("surrogate", Rule), ("ratio", Ratio), ("reduction", Reduction)):
            require_part("PolicyLossSpec", field, getattr(self, field), kind)
        if self.surrogate.kind == "penalty":
            raise InvalidCall(
                f"PolicyLossSpec: {self.surrogate.name!r} is a penalty; give it as "
                "Penalty(rule, coef)."
            )
        for p in self.penalties:
            if not isinstance(p, Penalty) or p.rule.kind == "surrogate":
                raise InvalidCall(
                    f"PolicyLossSpec: penalties holds {p!r}, expected Penalty(rule, coef) with "
                    f"a rule of kind 'penalty'.{_bare(p)}"
                )
            if p.reduction is not None and not (self.reduction.scalar and p.reduction.scalar):
                raise InvalidCall(
                    "PolicyLossSpec: a penalty's own reduction and NoReduction exclude each "
                    "other: the loss has one shape."
                )
        for w in self.weights:
            require_part("PolicyLossSpec", "weights", w, TokenWeight, word="holds")
        if isinstance(self.reduction, NoReduction) and self.reduction.weight is not None:
            raise InvalidCall("PolicyLossSpec: NoReduction takes no weight.")
        # Formulas are traced now and kept. A call, and torch.compile above it, only
        # reads the results.
        object.__setattr__(
            self,
            "_reductions",
            (self.reduction, *[p.reduction or self.reduction for p in self.penalties]),
        )
        object.__setattr__(self, "_is_coupled", any(r.coupled for r in self.reductions))
        object.__setattr__(
            self,
            "_reduction_of_term",
            (0, *[k if p.reduction else 0 for k, p in enumerate(self.penalties, 1)]),
        )
        if torch.compiler.is_compiling():
            for name, fact in getattr(_described, _facts_of(describe(self))).items():
                object.__setattr__(self, name, fact)
        else:
            self._find_facts()
            object.__setattr__(self, "_tensors", tensors_of(self))
        object.__setattr__(self, "_values", self._find_values())

    def _find_facts(self) -> None:
        """Find the facts of the formulas by tracing them. They depend only on the kinds
        of the hyper-parameters.
        """
        self._refuse_learnt()
        object.__setattr__(self, "_requires", self._find_requires())
        object.__setattr__(self, "_unsupported_reason", self._find_unsupported_reason())
        object.__setattr__(self, "_program", self._find_program())
        object.__setattr__(self, "_staged", self._find_staged())
        object.__setattr__(self, "_staged_weights", self._find_staged_weights())
        object.__setattr__(self, "_stored_program", self._find_stored_program())
        object.__setattr__(self, "_moving", self._find_moving())
        object.__setattr__(self, "_monitor", self._find_monitor())
        object.__setattr__(self, "_program_text", self.program and self.program.encode())
        object.__setattr__(self, "_unbounded", self._find_unbounded())
        object.__setattr__(self, "_weights_read_groups", self._find_weights_read_groups())

    # --- what follows from the fields -------------------------------------------------
    @property
    def requires(self) -> frozenset[str]:
        """Return the leaves that the formulas read. Tracing finds them."""
        return self._requires  # type: ignore[attr-defined,no-any-return]

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (self.surrogate, *(p.rule for p in self.penalties))

    @property
    def all_weights(self) -> tuple[TokenWeight, ...]:
        """Return the weights of the terms and those that reductions use."""
        own = [
            r.weight
            for r in (self.reduction, *(p.reduction for p in self.penalties))
            if r is not None and r.weight is not None
        ]
        return (*self.weights, *own)

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        """One a term."""
        return self._reductions  # type: ignore[attr-defined,no-any-return]

    @property
    def is_coupled(self) -> bool:
        """Return whether the loss is not a fixed sum over rows."""
        return self._is_coupled  # type: ignore[attr-defined,no-any-return]

    @property
    def reduction_of_term(self) -> tuple[int, ...]:
        """Return the reduction of each term, as the position of the first term that has
        it.
        """
        return self._reduction_of_term  # type: ignore[attr-defined,no-any-return]

    @property
    def couples_rows(self) -> bool:
        """Return whether a row's coefficients depend on the statistics of
        other rows."""
        formulas = (*self.all_weights, *self._inner_formulas())
        batch = any(trace_weight(type(w)).uses_batch for w in formulas)
        return self.ratio.level != "token" or batch or self.is_coupled

    @property
    def program(self) -> Program | None:
        """Return what a one-pass kernel evaluates in a row.

        It is None if :attr:`one_pass_unsupported_reason` gives a reason.
        """
        return self._program  # type: ignore[attr-defined,no-any-return]

    @property
    def stored_program(self) -> Program | None:
        """Return the program for stored rows, where a ratio of any level may be given.

        It is None if the loss cannot be a program.
        """
        return self._stored_program  # type: ignore[attr-defined,no-any-return]

    @property
    def staged(self) -> Staged | None:
        """Return how :attr:`stored_program` gets the rows of its table, or None if its
        only rows are row weights.
        """
        return self._staged  # type: ignore[attr-defined,no-any-return]

    @property
    def staged_weights(self) -> tuple[Staged | None, ...]:
        """Return how the weight of each term's reduction is evaluated on stored rows.

        It is None for a reduction without one, and for a weight that only PyTorch can
        evaluate.
        """
        return self._staged_weights  # type: ignore[attr-defined,no-any-return]

    @property
    def monitor(self) -> Monitor | None:
        """Return what metrics evaluate in a row, or None if no kernel can
        evaluate it."""
        return self._monitor  # type: ignore[attr-defined,no-any-return]

    @property
    def program_text(self) -> str | None:
        """Return :attr:`program` in the form that crosses the boundary of
        a custom op."""
        return self._program_text  # type: ignore[attr-defined,no-any-return]

    @property
    def one_pass_unsupported_reason(self) -> str | None:
        """Return why no call with this spec can take one pass on any backend, or None
        if one can.
        """
        return self._unsupported_reason  # type: ignore[attr-defined,no-any-return]

    @property
    def parameter_values(self) -> tuple[Any, ...]:
        """Return the hyper-parameters in the order of
        :class:`~reweight_ops._core.backends.base.Program`.
        """
        return self._values  # type: ignore[attr-defined,no-any-return]

    @property
    def unbounded(self) -> bool:
        """Return whether an ``exp`` in a formula may overflow.

        It cannot if its argument is clipped by numbers or is a log-prob.
        """
        return self._unbounded  # type: ignore[attr-defined,no-any-return]

    @property
    def reads_groups(self) -> bool:
        """Return whether the spec reads the call's ``group_ids``."""
        return self._weights_read_groups or any(r.reads_groups for r in self.reductions)  # type: ignore[attr-defined]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the hyper-parameters that are tensors, by the names that
        :meth:`replace` takes.
        """
        # a spec that a compiled graph has built has none
        found: dict[str, Tensor] | None = vars(self).get("_tensors")
        return tensors_of(self) if found is None else found

    def _refuse_learnt(self) -> None:
        """Raise for a hyper-parameter that requires grad but would get no gradient."""
        rules = {"surrogate": self.surrogate} | {
            f"penalties.{at}.rule": p.rule for at, p in enumerate(self.penalties)
        }
        for path, rule in rules.items():
            refuse(
                "PolicyLossSpec",
                stopped_in(rule, trace_rule(type(rule)), path),
                "the formula detaches it",
            )
        for at, w in enumerate(self.weights):
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
                    stopped_in(w, trace_weight(type(w)), path),
                    "the formula detaches it",
                )
        for reduction in self.reductions:
            owner = type(reduction).__name__
            refuse(
                owner, tensors_of(reduction.weight, "weight"), "a reduction's weight is detached"
            )
            for name in reduction.detaches:
                refuse(
                    owner, tensors_of(getattr(reduction, name), name), "the reduction detaches it"
                )
        for formula in (*self.rules, *self.all_weights):
            refuse(
                "PolicyLossSpec",
                detached_formula(formula),
                "a formula in the place of a number is detached",
            )

    def _find_unbounded(self) -> bool:
        traced = [(r, trace_rule(type(r))) for r in self.rules] + [
            (w, trace_weight(type(w))) for w in self.all_weights
        ]
        return any(
            not self._is_bounded(x.args[0], formula)
            for formula, t in traced
            for x in walk(t.result)
            if x.op in ("exp", "expm1")
        )

    def _is_bounded(self, x: Expr, formula: Rule | TokenWeight) -> bool:
        if x.op == "leaf":
            bounds = self.ratio.bounds() if x.args[0] == "log_ratio" else (0,)
        elif x.op == "clip":
            names = [a.args[0] for limit in x.args[1:] for a in walk(limit) if a.op == "param"]
            bounds = tuple(getattr(formula, name) for name in names)
        else:
            return False
        return all(isinstance(b, (int, float)) and abs(b) <= _LARGEST_EXPONENT for b in bounds)

    def _find_weights_read_groups(self) -> bool:
        return any(
            trace_weight(type(w)).reads_groups for w in (*self.all_weights, *self._inner_formulas())
        )

    def _find_requires(self) -> frozenset[str]:
        found = set(self.ratio.requires)
        for r in self.rules:
            found |= trace_rule(type(r)).leaves
        for w in (*self.all_weights, *self._inner_formulas()):
            found |= trace_weight(type(w)).leaves
        for reduction in self.reductions:
            found |= set(reduction.requires)
        if "log_ratio" in found and self.ratio.against == "ref":
            found.add("ref_logp")
        return frozenset(found)

    @property
    def moving(self) -> frozenset[str]:
        """Return the stored log-probs by which the loss has a gradient.

        A rule, the ratio or a weight reads them and does not detach them.
        """
        return self._moving  # type: ignore[attr-defined,no-any-return]

    def _find_moving(self) -> frozenset[str]:
        stored, program = {"old_logp", "ref_logp", "sampling_logp"}, self.stored_program
        if program is not None:  # its derivatives know which gradients a formula stops
            token = self.ratio.one_pass_unsupported_reason is None
            graph = loss_graph(program, not token)
            found = {name for name in stored if graph.moves(name)}
            ratio = not token and graph.moves("log_ratio")
        else:
            formulas = [trace_rule(type(r)).leaves for r in self.rules] + [
                trace_weight(type(w)).leaves for w in self.weights if not w.detach
            ]
            leaves = set().union(*formulas)
            found, ratio = leaves & stored, "log_ratio" in leaves
        return frozenset(found | {f"{self.ratio.against}_logp"} if ratio else found)

    def _inner_formulas(self) -> list[TokenWeight]:
        """Return the formulas that are hyper-parameters of rules and weights."""
        found: list[TokenWeight] = []
        waiting: list[Any] = [*self.rules, *self.all_weights]
        while waiting:
            inner = [v for v in waiting.pop().parameters().values() if isinstance(v, TokenWeight)]
            found += inner
            waiting += inner
        return found

    def _find_program(self) -> Program | None:
        return None if self.one_pass_unsupported_reason is not None else self._own_program()

    def _find_staged(self) -> Staged | None:
        if self._find_unstored_reason() is not None or self._find_given_reason() is None:
            return None
        with suppress(CannotStage):
            return staged(self.rules, self.weights, self._is_given_ratio)
        return None

    def _find_staged_weights(self) -> tuple[Staged | None, ...]:
        found: list[Staged | None] = [None] * len(self.reductions)
        for k, reduction in enumerate(self.reductions):
            with suppress(CannotStage):
                if reduction.weight is not None:
                    found[k] = staged([reduction.weight], (), self._is_given_ratio)
        return tuple(found)

    @property
    def _is_given_ratio(self) -> bool:
        return self.ratio.one_pass_unsupported_reason is not None

    def _find_stored_program(self) -> Program | None:
        if self._find_unstored_reason() is not None:
            return None
        if self._find_given_reason() is None:
            return self._own_program()
        return None if self.staged is None else self.staged.program

    def _find_monitor(self) -> Monitor | None:
        program = self.stored_program
        if self.staged is not None:
            return None if self.staged.monitor is None else self.staged.monitor[0]
        if program is None:
            return None
        try:
            return Monitor.of([type(rule) for rule in self.rules], program.terms)
        except (
            TypeError,
            AttributeError,
        ):  # a user's clipped() may do something that only torch can do
            return None

    def _own_program(self) -> Program:
        return Program.of(map(type, self.rules), [(type(w), w.scope) for w in self.weights])

    def _find_values(self) -> tuple[Any, ...]:
        if self.staged is not None:
            coefficients = iter([1.0, *(p.coef for p in self.penalties)])
            known = values_of(self.staged.values, formulas_of([*self.rules, *self.weights]))
            return (
                *self.ratio.bounds(),
                *[next(coefficients) if v is None else v for v in known],
            )
        values: list[Any] = [*self.ratio.bounds(), 1.0, *self.surrogate.parameters().values()]
        for p in self.penalties:
            values += [p.coef, *p.rule.parameters().values()]
        for w in self.weights:
            values += w.parameters().values()
        return tuple(values)

    def _find_unsupported_reason(self) -> str | None:
        return self.ratio.one_pass_unsupported_reason or self._find_row_unsupported_reason()

    def _find_row_unsupported_reason(self) -> str | None:
        """Return why a kernel of logits cannot evaluate the rest of the loss."""
        return (
            self._find_unstored_reason()
            or self._find_given_reason()
            or self._find_reduction_reason()
        )

    def _find_unstored_reason(self) -> str | None:
        """Return why a kernel cannot evaluate the rest of the loss even on stored
        rows.
        """
        for w in self.weights:
            if not w.detach:
                return f"the weight {w.name!r} is not detached"
        values: list[Any] = [*self.ratio.bounds(), *(p.coef for p in self.penalties)]
        if any(map(is_row, values)):
            return "a hyper-parameter is a per-row tensor"
        for formula in (*self.rules, *self.weights):
            values += formula.parameters().values()
        if any(isinstance(v, Tensor) and v.requires_grad for v in values):
            return "a hyper-parameter requires grad"
        return None

    def _find_given_reason(self) -> str | None:
        """Return why a formula of the loss needs more than the row's own numbers."""
        for w in self.weights:
            if trace_weight(type(w)).uses_batch:
                return f"the weight {w.name!r} uses batch statistics"
        if self._inner_formulas():
            return f"a hyper-parameter is the formula {self._inner_formulas()[0].name!r}"
        for formula in (*self.rules, *self.weights):
            if any(map(is_row, formula.parameters().values())):
                return "a hyper-parameter is a per-row tensor"
        return None

    def _find_reduction_reason(self) -> str | None:
        if not self.reduction.scalar:
            return "the loss is not reduced to a number"
        for r in self.reductions:
            if r.coupled:
                return (
                    f"{type(r).__name__} couples tokens: their coefficients depend on all of them"
                )
            if r.weight is not None and not reads_stored_only(r.weight):
                return (
                    f"a reduction is over the weight {r.weight.name!r}, which reads current "
                    "statistics"
                )
        return None

    # --- variations -------------------------------------------------------------------
    def replace(self, **fields: Any) -> PolicyLossSpec:
        """Return a copy with other fields. Dotted names reach inside.

        An example is ``spec.replace(**{"surrogate.epsilon_high": 0.28,
        "penalties.0.coef": 0.01})``.
        """
        result = self
        for path, value in fields.items():
            result = _replaced(result, path.split("."), value, path)
        return result

    def with_weight(self, weight: TokenWeight) -> PolicyLossSpec:
        """Return a copy with one more weight."""
        return dataclasses.replace(self, weights=(*self.weights, weight))

    def with_penalty(self, penalty: Penalty) -> PolicyLossSpec:
        """Return a copy with one more penalty."""
        return dataclasses.replace(self, penalties=(*self.penalties, penalty))


def _bare(penalty: Any) -> str:
    """A hint for a rule that stands without its coefficient."""
    if isinstance(penalty, str):
        return (
            f" Write rw.Penalty(rw.rules.RULES[{penalty!r}](), coef)." if penalty in RULES else ""
        )
    kind = penalty if isinstance(penalty, type) else type(penalty)
    return f" Write rw.Penalty({kind.__name__}(...), coef)." if issubclass(kind, Rule) else ""


#: The facts that :meth:`PolicyLossSpec._find_facts` finds.
_FACTS = (
    "_requires",
    "_moving",
    "_unsupported_reason",
    "_program",
    "_staged",
    "_staged_weights",
    "_stored_program",
    "_monitor",
    "_program_text",
    "_unbounded",
    "_weights_read_groups",
)


class _Described:
    """The facts of specs that compiled graphs build. Each is an attribute, where
    torch.compile looks for it.
    """


_described = _Described()
_attributes: dict[Any, str] = {}  # by description
# not len(_attributes): two threads may describe one at the same time
_serial = itertools.count()


@constant_result
def _facts_of(description: Any) -> str:
    # This returns a name, so that torch.compile finds the finished facts in the global
    # above.
    if description not in _attributes:
        spec = rebuild(description)
        object.__setattr__(
            spec,
            "_reductions",
            (spec.reduction, *[p.reduction or spec.reduction for p in spec.penalties]),
        )
        spec._find_facts()
        name = f"facts{next(_serial)}"
        setattr(_described, name, {fact: getattr(spec, fact) for fact in _FACTS})
        _attributes[description] = name
    return _attributes[description]


def _replaced(node: Any, path: list[str], value: Any, whole: str) -> Any:
    if not path:
        return value
    head, *rest = path
    if isinstance(node, tuple):
        if not head.isdigit() or int(head) >= len(node):
            raise InvalidCall(
                f"replace: {whole!r}: {head!r} is not a position in a tuple of {len(node)}."
            )
        at = int(head)
        return (*node[:at], _replaced(node[at], rest, value, whole), *node[at + 1 :])
    if not dataclasses.is_dataclass(node) or head not in {f.name for f in dataclasses.fields(node)}:
        known = (
            ", ".join(f.name for f in dataclasses.fields(node))
            if dataclasses.is_dataclass(node)
            else "none"
        )
        raise InvalidCall(
            f"replace: {whole!r}: {type(node).__name__} has no field {head!r}; it has: {known}."
        )
    return dataclasses.replace(node, **{head: _replaced(getattr(node, head), rest, value, whole)})  # type: ignore[type-var]


def reads_stored_only(weight: TokenWeight) -> bool:
    """Return whether a weight is known before the pass, because it reads nothing of the
    current policy.
    """
    inner = (v for v in weight.parameters().values() if isinstance(v, TokenWeight))
    return trace_weight(type(weight)).leaves.isdisjoint(DIFFERENTIABLE_FIELDS) and all(
        map(reads_stored_only, inner)
    )


def resolved(formula: Any, resolve: Any) -> Any:
    """Return a rule or weight whose per-row hyper-parameters are passed through
    ``resolve(name, tensor or formula)``.

    It is returned as it is if it has none.
    """
    rows = {
        name: v
        for name, v in formula.parameters().items()
        if isinstance(v, TokenWeight) or (isinstance(v, Tensor) and v.dim() > 0)
    }
    return (
        dataclasses.replace(
            formula, **{name: resolve(f"{formula.name}.{name}", v) for name, v in rows.items()}
        )
        if rows
        else formula
    )
