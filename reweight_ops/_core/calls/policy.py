"""Resolution of a call of a policy loss: its rows, its spec, and everything per row as
``[N]``.

Both plans and the metrics start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.base import RowInputs
from ..formula.leaves import Leaves, safe_where
from ..formula.namespace import TorchNamespace, lifted
from ..formula.stages import formulas_of, values_of
from ..formula.terms import Term, TermResult, Terms, combine_terms
from ..formula.trace import trace_rule
from ..rows.batch import BatchStatistics
from ..rows.constants import at_hand, parameter_vector
from ..rows.primitives import Averaged, Masked, Weighing
from ..rows.rows import Rows
from ..spec.compiled import with_tensors
from ..spec.policy import PolicyLossSpec, resolved
from ..spec.reduction import Divisors, Reduction
from .keywords import PolicyOptions
from .softmax import refuse_learnt
from .staged import Table
from .unused import without_unused

#: Maps stored log-probs to the leaf of a formula.
_FIELDS = {
    "old_per_token_logps": "old_logp",
    "ref_per_token_logps": "ref_logp",
    "sampling_per_token_logps": "sampling_logp",
}

#: The statistics of the current policy through which the loss is differentiated.
STATISTICS = ("logp", "entropy", "log_sum_p_sq")


@dataclass(frozen=True)
class LossCall:
    """A resolved call of a policy loss.

    ``factor`` is the caller's detached factor of the surrogate (token weights,
    importance-sampling ratio). It is part of the row weight of the surrogate.
    """

    spec: PolicyLossSpec
    rows: Rows
    divisors: Divisors
    loss_scale: Any
    adv: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    sampling_logp: Tensor | None
    factor: Tensor | None
    adv_per_sequence: bool = False

    def by_argument(self) -> dict[str, Tensor | None]:
        """Return the arguments of the call that formulas read, by name."""
        return {
            "advantages": self.adv,
            "old_per_token_logps": self.old_logp,
            "ref_per_token_logps": self.ref_logp,
            "sampling_per_token_logps": self.sampling_logp,
        }

    def differentiated(self) -> dict[str, Tensor]:
        """Return the stored log-probs that require grad, by leaf."""
        stored = {
            "old_logp": self.old_logp,
            "ref_logp": self.ref_logp,
            "sampling_logp": self.sampling_logp,
        }
        return (
            {name: t for name, t in stored.items() if t is not None and t.requires_grad}
            if torch.is_grad_enabled()
            else {}
        )

    @property
    def inputs_require_grad(self) -> bool:
        """Return whether any per-row argument of the call requires grad."""
        # This is a loop, because every call comes here, and a generator's steps are as
        # many Python calls.
        for t in (self.adv, self.factor, self.old_logp, self.ref_logp, self.sampling_logp):
            if t is not None and t.requires_grad:
                return True
        return False

    def without_inputs(self) -> LossCall:
        """Return the same call without its arguments, which are kept for error
        messages.

        A result must not keep the logits alive.
        """
        if not self.rows.tensors:
            return self
        # This is written out, because older versions of torch.compile cannot trace
        # dataclasses.replace.
        rows = self.rows.without_inputs()
        return LossCall(
            self.spec,
            rows,
            self.divisors,
            self.loss_scale,
            self.adv,
            self.old_logp,
            self.ref_logp,
            self.sampling_logp,
            self.factor,
            self.adv_per_sequence,
        )

    def row_weights(
        self, statistics: dict[str, Tensor] | None = None, into: Tensor | None = None
    ) -> Tensor:
        """Return ``[K, N]``: the row weight of every term, ``loss_scale`` included.

        ``statistics`` are needed only if a reduction is over a weight. ``into`` is the
        memory of the result, new by default.
        """
        if self.rows.primitives is not None:
            fused = self._fused_row_weights(statistics, into)
            if fused is not None:
                return fused
        found = self._formed_row_weights(statistics)
        return found if into is None else into.copy_(found)

    def _formed_row_weights(self, statistics: dict[str, Tensor] | None) -> Tensor:
        """Return the row weights as PyTorch forms them."""
        found: dict[int, Tensor] = {}
        own = sorted(set(self.spec.reduction_of_term))
        weighted = [k for k in own if self.spec.reductions[k].weight is not None]
        values = self._token_weights(statistics).unbind() if weighted else ()
        u = dict(zip(weighted, values, strict=True))
        for k in own:
            reduction = self.spec.reductions[k]
            w = reduction.row_weights(self.rows, self.divisors, u.get(k)).to(self.rows.dtype)
            found[k] = w * self._scale if self._is_scaled and not reduction.coupled else w
        per_term = [found[k] for k in self.spec.reduction_of_term]
        if self.factor is None and len(found) == 1:
            return per_term[0].expand(len(per_term), -1)
        if self.factor is not None:
            per_term[0] = per_term[0] * self.factor
        return torch.stack(per_term)

    def reduction_weights(self) -> Tensor:
        """Return ``[N]``: the row weights of the surrogate's reduction, for a term
        beside those of the spec.

        They include ``loss_scale`` and not the caller's factors.
        """
        reduction = self.spec.reduction
        if reduction.coupled or reduction.weight is not None or not reduction.scalar:
            raise self.rows.error(
                f"a term beside the spec's has no row weights by {type(reduction).__name__}, "
                "which is not a fixed sum over rows."
            )
        found = reduction.row_weights(self.rows, self.divisors).to(self.rows.dtype)
        return found * self._scale if self._is_scaled else found

    def stored_weights(self, leaves: dict[str, Tensor], evaluate: Callable[..., Tensor]) -> Tensor:
        """Return the table of row weights that the spec's stored program reads.

        ``leaves`` are all that it reads, and ``evaluate`` is a backend's
        ``evaluate_rows``.
        """
        spec = self.spec
        if spec.staged is None:
            return self.row_weights(leaves)
        roots = [*spec.rules, *spec.weights]
        table = Table(self.rows, spec.staged, roots, leaves, spec.ratio.bounds(), evaluate)
        self.row_weights(leaves, into=table.values[: len(spec.rules)])
        return table.fill()

    def _token_weights(self, statistics: dict[str, Tensor] | None) -> Tensor:
        """Return ``[M, N]``: the token weights over which reductions are, in the order
        of terms.
        """
        weights, staged = self.spec.weights_of_reductions, self.spec.staged_weights
        primitives, n = self.rows.primitives, self.rows.count
        if primitives is None or primitives.evaluate is None or staged is None:
            return torch.stack([self._evaluate_weight(u, statistics).expand(n) for u in weights])
        known = statistics or {}
        leaves = {name: t.detach() for name, t in {**self.stored(), **known}.items()}
        if "logp" in leaves:
            leaves.setdefault("old_logp", leaves["logp"])
            # the program forms a token's ratio
            formed = self.spec.ratio.one_pass_unsupported_reason is None or "log_ratio" in leaves
            if not formed and "log_ratio" in self.spec.requires:
                # that of the call may be an expanded number
                leaves["log_ratio"] = self.log_ratio(leaves["logp"]).detach().contiguous()
        bounds, evaluate = self.spec.ratio.bounds(), primitives.evaluate
        table = Table(self.rows, staged, weights, leaves, bounds, evaluate)
        coefficients = [1.0 if value is None else value for value in staged.values]
        program, params = staged.program, table.params(tuple(coefficients))
        filled = table.fill()[: program.table_rows()]
        outputs = tuple([f"d_w{k}" for k in range(len(weights))])
        found: Tensor = evaluate(program, params, leaves, filled, outputs, self.rows.keep)
        return found

    def _fused_row_weights(
        self, statistics: dict[str, Tensor] | None = None, into: Tensor | None = None
    ) -> Tensor | None:
        """Return the row weights, or None if a kernel cannot form one of them.

        The contributions of a coupled reduction are scaled instead, because it is not
        linear. The terms whose reductions are over the same sequences take one launch.
        """
        rows, own = self.rows, self.spec.reduction_of_term
        assert rows.primitives is not None and rows.masked is not None
        for x in (self.loss_scale, self.factor):
            if isinstance(x, Tensor) and x.requires_grad:
                return None
        weigh, weighted = rows.primitives.weigh, 0
        weighings: dict[int, Weighing] = {}
        over: dict[int, Masked] = {}
        for k in sorted(set(own)):
            reduction = self.spec.reductions[k]
            weighing = reduction.weighing(rows, self.divisors)
            if weighing is None:
                return None
            if isinstance(weighing.divisor, Tensor) and weighing.divisor.requires_grad:
                return None
            if reduction.weight is not None:
                weighing, weighted = weighing._replace(weight=weighted), weighted + 1
            weighings[k], over[k] = weighing, reduction.masked(rows)
        if weighted:
            assert rows.primitives.measure is not None
            measured = rows.primitives.measure(rows.masked, self._token_weights(statistics))
            over = {k: measured if x is rows.masked else x for k, x in over.items()}
        if len(over) == 1 and self.factor is None and into is None:
            scale = 1.0 if self.spec.reduction.coupled else self.loss_scale
            found = weigh(over[0], (weighings[0],), scale, None)
            return found.expand(len(own), -1)
        alike: dict[tuple[int, bool], list[int]] = {}
        for k, masked in over.items():
            is_unscaled = self._is_scaled and self.spec.reductions[k].coupled
            alike.setdefault((id(masked), is_unscaled), []).append(k)
        for (_, is_unscaled), members in alike.items():
            terms = tuple([weighings[k] if k in members else None for k in own])
            scale = 1.0 if is_unscaled else self.loss_scale
            into = weigh(over[members[0]], terms, scale, self.factor, into)
        return into

    @property
    def _is_scaled(self) -> bool:
        return self.rows.trust is not None or not (
            isinstance(self.loss_scale, (int, float)) and self.loss_scale == 1
        )

    @property
    def _scale(self) -> Any:
        return self.loss_scale if self.rows.trust is None else self.loss_scale + self.rows.trust

    def inputs(self) -> RowInputs:
        """Return the per-row inputs of a one-pass kernel."""
        return RowInputs(
            self.row_weights(), self.old_logp, self.adv, self.ref_logp, self.sampling_logp
        )

    def bound(self, formula: Any, statistics: dict[str, Tensor] | None) -> Any:
        """Return a rule or weight with its per-row hyper-parameters as ``[N]``.

        Tensors are flattened. Formulas are evaluated and detached.
        """

        def resolve(name: str, value: Any) -> Tensor:
            return (
                self.rows.flatten_per_token(name, value)
                if isinstance(value, Tensor)
                else self._evaluate_weight(value, statistics)
            )

        return resolved(formula, resolve)

    def terms(self, statistics: dict[str, Tensor]) -> Terms:
        """Return the spec's rules and weights, bound to this call's values."""
        spec = self.spec
        terms = []
        coefficients = [1.0, *(p.coef for p in spec.penalties)]
        for rule, coef, reduction in zip(spec.rules, coefficients, spec.reductions, strict=True):
            terms.append(
                Term(
                    self.bound(rule, statistics),
                    coef,
                    self.contributions(reduction) if reduction.coupled else None,
                )
            )
        return Terms(
            terms, [self.bound(weight, statistics) for weight in spec.weights], spec.unbounded
        )

    def contributions(self, reduction: Reduction) -> Callable[[Tensor], Tensor]:
        """Return what a coupled reduction makes of a term's weighted token losses."""

        def contributions(weighted: Tensor) -> Tensor:
            found = reduction.contributions(self.rows, weighted, self.adv)
            return found * self._scale if self._is_scaled else found

        return contributions

    def log_ratio(self, logp: Tensor) -> Tensor:
        """Return the clamped log-ratio at the spec's level."""
        denominator = self.ref_logp if self.spec.ratio.against == "ref" else self.old_logp
        found = self.spec.ratio.log_ratio(
            self.rows, logp, logp.detach() if denominator is None else denominator, self.adv
        )
        return (
            found
            if self.rows.trust is None or self.spec.ratio.level == "token"
            else found + self.rows.trust
        )

    def averaged(self, logp: Tensor, params: Tensor) -> Averaged | None:
        """Return what the backend's kernel averages to the ratio of ``logp``, or None
        if only :meth:`log_ratio` can form it. ``params`` are those of the call.
        """
        rows = self.rows
        if rows.primitives is None or rows.primitives.ratio is None:
            return None
        if rows.sequences is None and self.spec.ratio.level != "batch":
            return None  # log_ratio says what is missing
        old = self.ref_logp if self.spec.ratio.against == "ref" else self.old_logp
        return self.spec.ratio.averaged(logp, old, self.adv, params)

    def leaves(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every leaf that this call can give to a formula."""
        logp = statistics["logp"]
        found = {
            **statistics,
            "old_logp": logp.detach() if self.old_logp is None else self.old_logp,
            "log_ratio": self.log_ratio(logp),
        }
        return {**found, **self.stored()}

    def safe_leaves(self, statistics: dict[str, Tensor]) -> Leaves:
        """Return the same leaves with harmless values in the ignored rows."""
        return Leaves(safe_where(self.rows.keep, self.leaves(statistics)))

    def token_losses(self, statistics: dict[str, Tensor]) -> TermResult:
        """Compute per-row losses from :data:`STATISTICS`. They are exact under
        autograd.
        """
        leaves = self.leaves(statistics)
        return combine_terms(
            self.terms(statistics),
            leaves,
            self.row_weights(statistics),
            self.rows.keep,
            BatchStatistics(self.rows),
        )

    def _evaluate_weight(self, weight: Any, statistics: dict[str, Tensor] | None) -> Tensor:
        """Evaluate a weight outside of the terms: that of a reduction or of a
        hyper-parameter.

        Without statistics it may read stored leaves only.
        """
        leaves = (
            self.safe_leaves(statistics)
            if statistics is not None
            else Leaves(safe_where(self.rows.keep, self.stored()))
        )
        xp, bound = TorchNamespace(self.rows.dtype), self.bound(weight, statistics)
        with torch.no_grad():
            found = bound.weight(xp, leaves, BatchStatistics(self.rows))
        return lifted(found, xp.dtype, self.rows.device).detach()

    def stored(self) -> dict[str, Tensor]:
        """Return the leaves that the call was given."""
        found = {
            "old_logp": self.old_logp,
            "adv": self.adv,
            "ref_logp": self.ref_logp,
            "sampling_logp": self.sampling_logp,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def params(self) -> Tensor:
        """Return the hyper-parameters as one vector on the rows' device. It crosses the
        op boundary.
        """
        return parameter_vector(self.spec.parameter_values, self.rows.dtype, self.rows.device)

    @property
    def monitor_params(self) -> Tensor:
        """Return those that the spec's monitor reads."""
        spec = self.spec
        if spec.staged is None or spec.staged.monitor is None:
            return self.params
        fields = values_of(spec.staged.monitor[1], formulas_of([*spec.rules, *spec.weights]))
        numbers = (*spec.ratio.bounds(), *fields)
        return parameter_vector(numbers, self.rows.dtype, self.rows.device)


def resolve_loss(
    rows: Rows, advantages: Any, spec: PolicyLossSpec, data: PolicyOptions
) -> LossCall:
    """Check a call's per-row arguments against what its spec reads, and
    flatten them."""
    spec = with_tensors(spec, rows.dtype, rows.device)
    requires = spec.requires
    advantages, data = without_unused(rows, advantages, spec, data)
    estimators = [r.name for r in spec.rules[1:] if r.name != "entropy_bonus"]
    reader = estimators[0] if estimators else spec.surrogate.name
    for name, leaf, why in (
        ("ref_per_token_logps", "ref_logp", f"the penalty {reader!r}"),
        (
            "sampling_per_token_logps",
            "sampling_logp",
            f"a weight of the spec ({', '.join(w.name for w in spec.weights)})",
        ),
    ):
        if leaf in requires and getattr(data, name) is None:
            raise rows.error(f"{why} needs {name}.")
    if advantages is None and "adv" in requires:
        own = "adv" in trace_rule(type(spec.surrogate)).leaves
        reader = f"the surrogate {spec.surrogate.name!r}" if own else "the spec"
        raise rows.error(f"{reader} reads advantages, which is None.")
    divisors = _divisors(rows, data.num_items_in_batch, data.num_sequences_in_batch)
    _check_divisors(rows, spec, divisors)
    if data.group_ids is not None and not spec.reads_groups:
        raise rows.error(
            "no reduction or weight of the spec reads prompts; group_ids would have no effect."
        )
    for reduction in spec.reductions:
        reduction.check(rows)
    spec.ratio.check(rows, advantages)
    scale = data.loss_scale
    if isinstance(scale, Tensor) and scale.dim() != 0:
        raise rows.error(
            f"loss_scale has shape {tuple(scale.shape)}, expected a number or a 0-d tensor; "
            "per-row factors are token_weights."
        )
    for name in ("loss_scale", "num_items_in_batch", "num_sequences_in_batch"):
        refuse_learnt(getattr(data, name), rows.error, name)
    if rows.across is not None:
        rows.across.asks(spec, divisors, data.old_per_token_logps is None, str(rows.dtype))
    return bind_loss(rows, {**data.named(), "advantages": advantages}, spec)


def bind_loss(rows: Rows, data: Mapping[str, Any], spec: PolicyLossSpec) -> LossCall:
    """Return the call with these values, given by the names of arguments.

    Only checks that need a single argument are made here.
    """

    differentiable = bool(data.get("differentiable_inputs"))

    def flat(name: str) -> Tensor | None:
        value, logps = data.get(name), name != "advantages"
        if logps and isinstance(value, Tensor) and value.requires_grad:
            _check_differentiable(rows, spec, name, differentiable)
        return (
            None
            if value is None
            else rows.flatten_per_token(name, value, logps=logps, differentiable=differentiable)
        )

    old, ref, sampling = (
        flat("old_per_token_logps"),
        flat("ref_per_token_logps"),
        flat("sampling_per_token_logps"),
    )
    advantages, copied = data.get("advantages"), None if rows.masked is None else rows.masked.values
    adv = flat("advantages") if advantages is None or copied is None else copied
    per_sequence = isinstance(advantages, Tensor) and tuple(advantages.shape) != rows.shape
    divisors = _divisors(rows, data.get("num_items_in_batch"), data.get("num_sequences_in_batch"))
    scale = at_hand(data.get("loss_scale", 1.0), rows.device)
    return LossCall(
        spec, rows, divisors, scale, adv, old, ref, sampling, _factor(rows, data), per_sequence
    )


def _divisors(rows: Rows, *numbers: Any) -> Divisors:
    return Divisors(*[at_hand(number, rows.device) for number in numbers])


def _check_differentiable(rows: Rows, spec: PolicyLossSpec, name: str, allowed: bool) -> None:
    """Raise for stored log-probs that require grad if no gradient is requested for
    them, or none can reach them.
    """
    if not allowed:
        raise rows.error(
            f"{name} requires grad, but no gradient flows to stored log-probs: pass it "
            "detached, or differentiable_inputs=True for its gradient."
        )
    leaf = _FIELDS[name]
    if leaf not in spec.moving and torch.is_grad_enabled():
        raise rows.error(
            f"{name} requires grad, but the spec detaches everything it reads of it, so it "
            "would get no gradient: pass it detached."
        )


def _factor(rows: Rows, data: Mapping[str, Any]) -> Tensor | None:
    factor = None
    for name in ("importance_sampling_ratio", "token_weights"):
        value = data.get(name)
        if value is not None:
            if (
                name == "importance_sampling_ratio"
                and isinstance(value, Tensor)
                and value.requires_grad
            ):
                raise rows.error(
                    "importance_sampling_ratio requires grad; it is a detached factor. Factors "
                    "with a gradient are token_weights."
                )
            row = rows.flatten_per_token(name, value)
            factor = row if factor is None else factor * row
    return factor


def _check_divisors(rows: Rows, spec: PolicyLossSpec, divisors: Divisors) -> None:
    for name in ("num_items_in_batch", "num_sequences_in_batch"):
        value = getattr(divisors, name)
        if value is None:
            continue
        rows.check_divisor(name, value)
        if isinstance(value, Tensor) and value.dim() != 0:
            raise rows.error(
                f"{name} has shape {tuple(value.shape)}, expected a number or a 0-d tensor."
            )
        if not any(name in r.reads and not getattr(r, "per_call", False) for r in spec.reductions):
            reduction, other = (
                type(spec.reduction).__name__,
                {"num_items_in_batch": "num_sequences_in_batch"}.get(name, "num_items_in_batch"),
            )
            reads = f"divides by {other}" if other in spec.reduction.reads else "has no divisor"
            raise rows.error(f"{reduction} {reads}; {name} would have no effect.")
