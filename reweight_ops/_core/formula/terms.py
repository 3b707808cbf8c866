"""From row statistics to per-row losses: rules, weights and coefficients on ``[N]``
vectors.

This is the middle of the two-pass plan. Autograd differentiates it. The one-pass plan
evaluates the same loss as a graph in the kernel (:mod:`.loss_program`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Rule, TokenWeight
from .leaves import Leaves, safe_where
from .namespace import TorchNamespace, lifted


class Term(NamedTuple):
    """One term of the loss: a rule whose fields are bound to values, and its
    coefficient (a number or a 0-d tensor).

    ``contributions`` belongs to a coupled reduction. It maps the term's weighted token
    losses, without the coefficient, to what they add to the loss.
    """

    rule: Rule
    coef: Any
    contributions: Callable[[Tensor], Tensor] | None = None


class Terms(NamedTuple):
    """All terms (0 is the surrogate) and the weights, with bound fields.

    With ``unbounded``, a log-ratio may be larger than ``exp`` can take.
    """

    terms: Sequence[Term]
    weights: Sequence[TokenWeight]
    unbounded: bool = True


class TermResult(NamedTuple):
    weighted_loss: Tensor  # [N]: sum_k w_k * coef_k * u_k * rule_k
    loss: Tensor  # [N]: the same without w_k


def combine_terms(
    terms: Terms, leaves: dict[str, Tensor], row_weights: Tensor, keep: Tensor, batch: Any
) -> TermResult:
    """Compute the per-row losses from every leaf (``log_ratio`` included) and the row
    weights ``[K, N]``.

    A term selects the rows where its weight is not zero and evaluates only those.
    Nothing of the other rows, not even an overflow, reaches the loss or a gradient. A
    weight that requires grad selects every row, because its gradient is not zero where
    the weight is.
    """
    xp = TorchNamespace(leaves["logp"].dtype, terms.unbounded)
    scoped: dict[str, Tensor | None] = {"surrogate": None, "all": None}
    if terms.weights:
        inside = Leaves(safe_where(keep, leaves))
        for w in terms.weights:
            u = lifted(w.weight(xp, inside, batch), xp.dtype, keep.device)
            u = u.detach() if w.detach else u
            so_far = scoped[w.scope]
            scoped[w.scope] = u if so_far is None else so_far * u

    weighted = loss = torch.zeros_like(leaves["logp"])
    chosen = torch.zeros_like(keep)
    coupled: list[Tensor] = []  # weighted losses that a reduction couples
    for k, term in enumerate(terms.terms):
        us = [u for u in (scoped["all"], scoped["surrogate"] if k == 0 else None) if u is not None]
        factor: Any = functools.reduce(operator.mul, us, term.coef)
        share = row_weights[k] * factor
        selected = keep if share.requires_grad else keep & (share != 0)
        value = term.rule.loss(xp, Leaves(safe_where(selected, leaves)))
        loss = loss + torch.where(selected, factor * value, 0)
        if term.contributions is None:
            weighted = weighted + torch.where(selected, share * value, 0)
        else:
            own = torch.where(
                selected, functools.reduce(operator.mul, us, row_weights[k]) * value, 0
            )
            weighted = weighted + term.coef * term.contributions(own)
            coupled.append(own)
        chosen = chosen | selected
    # A NaN in a counted row must become the row's loss and gradient. Every comparison
    # with NaN is false, so a clip would have stopped the gradient. What flows through a
    # ratio to other rows is as the formula has it.
    # Only NaN rows are multiplied by NaN. In the other rows a NaN, although discarded,
    # would alarm autograd's anomaly mode.
    logp = leaves["logp"]
    unknown = chosen & logp.isnan()
    is_nan = unknown | (keep & weighted.isnan())
    if coupled:  # the reduction may drop a NaN
        is_nan = is_nan | torch.stack([loss, *coupled]).isnan().any(0)
    spoiled = logp * torch.ones_like(logp).masked_fill(is_nan, math.nan)
    return TermResult(
        weighted + torch.where(is_nan, spoiled, 0), torch.where(unknown, math.nan, loss)
    )
