"""The spec of a method: a surrogate, penalties, a ratio level, weights and a reduction.

Data and facts of the model head are call arguments.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..compiler import constant_result
from ..formula.base import RULES, Rule, TokenWeight
from ..formula.loss_program import Program
from ..formula.monitor import Monitor
from ..formula.stages import Staged
from ..formula.trace import trace_weight
from ..ranges import Number, Real, ranged
from .compiled import describe, rebuild, set_default
from .facts import Facts, facts_of, inner_formulas, parameter_values
from .learnt import refuse_learnt, tensors_of
from .parts import require_name, require_part, require_tuple
from .ratio import Ratio, TokenRatio
from .reduction import NoReduction, Reduction, TokenMean


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
    if TYPE_CHECKING:
        _facts: ClassVar[Facts]  # an attribute of each spec, and no field

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
            object.__setattr__(self, "_facts", getattr(_described, _described_as(describe(self))))
        else:
            refuse_learnt(self)
            object.__setattr__(self, "_facts", facts_of(self))
            object.__setattr__(self, "_tensors", tensors_of(self))
        object.__setattr__(self, "_values", parameter_values(self, self.staged))

    # --- what follows from the fields -------------------------------------------------
    @property
    def requires(self) -> frozenset[str]:
        """Return the leaves that the formulas read. Tracing finds them."""
        return self._facts.requires

    @property
    def moving(self) -> frozenset[str]:
        """Return the stored log-probs by which the loss has a gradient.

        A rule, the ratio or a weight reads them and does not detach them.
        """
        return self._facts.moving

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (self.surrogate, *(p.rule for p in self.penalties))

    @property
    def weights_of_reductions(self) -> tuple[TokenWeight, ...]:
        """Return the weights that reductions use, in the order of terms."""
        own = (self.reduction, *[p.reduction for p in self.penalties])
        return tuple([r.weight for r in own if r is not None and r.weight is not None])

    @property
    def all_weights(self) -> tuple[TokenWeight, ...]:
        """Return the weights of the terms and those that reductions use."""
        return (*self.weights, *self.weights_of_reductions)

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
        formulas = (*self.all_weights, *inner_formulas(self))
        batch = any(trace_weight(type(w)).uses_batch for w in formulas)
        return self.ratio.level != "token" or batch or self.is_coupled

    @property
    def program(self) -> Program | None:
        """Return what a one-pass kernel evaluates in a row.

        It is None if :attr:`one_pass_unsupported_reason` gives a reason.
        """
        return self._facts.program

    @property
    def stored_program(self) -> Program | None:
        """Return the program for stored rows, where a ratio of any level may be given.

        It is None if the loss cannot be a program.
        """
        return self._facts.stored_program

    @property
    def staged(self) -> Staged | None:
        """Return how :attr:`stored_program` gets the rows of its table, or None if its
        only rows are row weights.
        """
        return self._facts.staged

    @property
    def staged_weights(self) -> Staged | None:
        """Return how :attr:`weights_of_reductions` are evaluated on stored rows, a term
        each.

        It is None if there are none, or one that only PyTorch can evaluate.
        """
        return self._facts.staged_weights

    @property
    def monitor(self) -> Monitor | None:
        """Return what metrics evaluate in a row, or None if no kernel can
        evaluate it."""
        return self._facts.monitor

    @property
    def program_text(self) -> str | None:
        """Return :attr:`program` in the form that crosses the boundary of
        a custom op."""
        return self._facts.program_text

    @property
    def one_pass_unsupported_reason(self) -> str | None:
        """Return why no call with this spec can take one pass on any backend, or None
        if one can.
        """
        return self._facts.unsupported_reason

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
        return self._facts.unbounded

    @property
    def reads_groups(self) -> bool:
        """Return whether the spec reads the call's ``group_ids``."""
        return self._facts.weights_read_groups or any(r.reads_groups for r in self.reductions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the hyper-parameters that are tensors, by the names that
        :meth:`replace` takes.
        """
        # a spec that a compiled graph has built has none
        found: dict[str, Tensor] | None = vars(self).get("_tensors")
        return tensors_of(self) if found is None else found

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


class _Described:
    """The facts of specs that compiled graphs build. Each is an attribute, where
    torch.compile looks for it.
    """


_described = _Described()
_attributes: dict[Any, str] = {}  # by description
# not len(_attributes): two threads may describe one at the same time
_serial = itertools.count()


@constant_result
def _described_as(description: Any) -> str:
    # This returns a name, so that torch.compile finds the finished facts in the global
    # above.
    if description not in _attributes:
        spec = rebuild(description)
        object.__setattr__(
            spec,
            "_reductions",
            (spec.reduction, *[p.reduction or spec.reduction for p in spec.penalties]),
        )
        refuse_learnt(spec)
        name = f"facts{next(_serial)}"
        setattr(_described, name, facts_of(spec))
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
