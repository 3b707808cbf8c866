"""The middle of the computation, on ``[N]`` vectors: rules, weights and coefficients from row statistics to per-row losses.

Both plans mean exactly this function: two_pass runs it in torch with autograd, one_pass runs its generated twin inside the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.base import Program, RowInputs
from .rules.base import RULES, WEIGHTS, Formula, Rule, TokenWeight
from .rules.namespace import TorchNamespace

#: What a row that a term does not select is evaluated at: finite for every rule, so that its discarded derivative is no NaN.
_SAFE = {
    "logp": -1.0, "old_logp": -1.0, "log_ratio": 0.0, "ref_logp": -1.0, "sampling_logp": -1.0, "adv": 1.0, "entropy": 1.0, "log_sum_p_sq": -1.0,
}  # fmt: skip


class Leaves:
    """What a formula reads of its tokens: attributes ``[N]``."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"the formula reads {name!r}, which this call was not given")


def safe_where(selected: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves with harmless values in the rows that are not selected."""
    return {name: torch.where(selected, value, _SAFE[name]) for name, value in values.items()}


class Term(NamedTuple):
    """One term of the loss: a rule whose fields are bound to values, and its coefficient (a number or 0-d tensor)."""

    rule: Rule
    coef: Any


class Terms(NamedTuple):
    """All terms (0 is the surrogate), the weights evaluated in the row, and the bounds of the log-ratio."""

    terms: Sequence[Term]
    weights: Sequence[TokenWeight]
    clamp: tuple[Any, Any]


class TermResult(NamedTuple):
    weighted_loss: Tensor  # [N]: sum_k w_k * coef_k * u_k * rule_k
    loss: Tensor  # [N]: the same without w_k


def bind(cls: type[Formula], values: dict[str, Any], settings: dict[str, Any] | None = None) -> Any:
    """An instance of a rule or weight whose fields are the given values, tensors included; validated nowhere, they are validated already."""
    instance = object.__new__(cls)
    for name, value in {**values, **(settings or {})}.items():
        object.__setattr__(instance, name, value)
    return instance


def parse_params(program: Program, params: Tensor) -> Terms:
    """The program of a one-pass call back as bound rules: what a kernel does with ids and an offset."""
    at = 2

    def take(cls: type[Formula]) -> dict[str, Tensor]:
        nonlocal at
        names = cls.parameter_names()
        at += len(names)
        return dict(zip(names, params[at - len(names) : at].unbind(), strict=True))

    terms = []
    for name in program.terms:
        coef = params[at]
        at += 1
        terms.append(Term(bind(RULES[name], take(RULES[name])), coef))
    weights = [bind(WEIGHTS[name], take(WEIGHTS[name]), {"scope": scope, "detach": True}) for name, scope in program.weights]
    return Terms(terms, weights, (params[0], params[1]))


def evaluate(
    terms: Terms, leaves: dict[str, Tensor], inputs: RowInputs, keep: Tensor, *, log_ratio: Tensor | None = None, batch: Any = None
) -> TermResult:
    """Per-row losses. ``log_ratio`` is given by two_pass (any level), else it is ``clip(logp - old_logp)``.

    A term selects the rows where its weight is not
    zero and evaluates only those, so that nothing of the others, not even an overflow, reaches the loss or a gradient.
    """
    logp = leaves["logp"]
    xp = TorchNamespace(logp.dtype)
    old = logp.detach() if inputs.old_logp is None else inputs.old_logp
    everything: dict[str, Tensor] = {**leaves, "old_logp": old}
    everything["log_ratio"] = (logp - old).clamp(*terms.clamp) if log_ratio is None else log_ratio
    for name, stored in (("adv", inputs.adv), ("ref_logp", inputs.ref_logp), ("sampling_logp", inputs.sampling_logp)):
        if stored is not None:
            everything[name] = stored
    scoped: dict[str, Tensor | None] = {"surrogate": None, "all": None}
    if terms.weights:
        inside = Leaves(safe_where(keep, everything))
        for w in terms.weights:
            u = w.weight(xp, inside, batch)
            u = u.detach() if w.detach else u
            so_far = scoped[w.scope]
            scoped[w.scope] = u if so_far is None else so_far * u

    weighted: Tensor = torch.zeros_like(logp)
    loss: Tensor = torch.zeros_like(logp)
    for k, term in enumerate(terms.terms):
        factor: Any = term.coef
        for u in (scoped["all"], scoped["surrogate"] if k == 0 else None):
            factor = factor if u is None else factor * u
        row_weight = inputs.weights[k]
        selected = keep & (row_weight * factor != 0)
        value = torch.where(selected, factor * term.rule.loss(xp, Leaves(safe_where(selected, everything))), 0)
        loss = loss + value
        weighted = weighted + row_weight * value
    return TermResult(weighted, loss)

