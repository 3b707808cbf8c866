"""A loss whose reduction couples tokens, near one point: a sum over rows has the same
derivatives there.

A backend's kernels find it in closed form. Elsewhere autograd differentiates the
reduction, which is a few operations on sequences. The row kernels do the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..calls.policy import LossCall
from ..formula.loss_program import Program
from ..rows.primitives import CoupledTerms


def at_this_point(
    call: LossCall,
    program: Program,
    params: Tensor,
    leaves: dict[str, Tensor],
    weights: Tensor,
    evaluate: Callable[..., Tensor],
    into: Tensor,
) -> tuple[Tensor, Tensor]:
    """Evaluate a loss with coupled reductions, from the table of its row weights.

    Return the table of row weights with which a sum over rows has the loss's
    derivatives, and which rows are unknown, bool ``[N]``. The derivative of an unknown
    row by its own log-prob is NaN. What flows through a ratio to other rows is as the
    formula has it. ``into`` ``[2, N]`` receives the weighted loss and the loss.
    """
    spec = call.spec
    outputs = ("loss", *[f"own{k}" for k in range(len(spec.rules))])
    pointwise = spec.ratio.one_pass_unsupported_reason is None
    terms = CoupledTerms(
        tuple([r.coupling(call.rows) if r.coupled else None for r in spec.reductions]),
        (1.0, *[p.coef for p in spec.penalties]),
        call.loss_scale,
        evaluate(program, params, leaves, weights, outputs, call.rows.keep),
        weights,
        call.adv,
        None if pointwise else leaves["logp"],
    )
    primitives, masked = call.rows.primitives, call.rows.masked
    if primitives is None or primitives.couple is None or not _is_closed(call, terms):
        return _by_autograd(call, terms, into)
    assert masked is not None
    return primitives.couple(masked, terms, into)


def _is_closed(call: LossCall, terms: CoupledTerms) -> bool:
    """Return whether a kernel knows every coupled term in closed form."""
    found = [coupling for coupling in terms.couplings if coupling is not None]
    if len(found) < sum(reduction.coupled for reduction in call.spec.reductions):
        return False  # a user's reduction, or numbers that only PyTorch takes
    prompts = [coupling.prompts for coupling in found if coupling.prompts is not None]
    # A kernel looks for the sequences of each prompt. It does so for one coupling, and
    # if there are not too many to look at.
    is_searched = any(groups.index is not None for groups in prompts)
    return len(prompts) <= 1 and not (is_searched and call.rows.by_prompt is None)


def _by_autograd(call: LossCall, terms: CoupledTerms, into: Tensor) -> tuple[Tensor, Tensor]:
    evaluated, logp = terms.evaluated, terms.logp
    loss, *own = evaluated.unbind()
    # Rules may compare a NaN, and a reduction may drop one.
    unknown = evaluated.isnan().any(0)
    total, table = torch.zeros_like(loss), list(terms.weights.unbind())
    reductions = call.spec.reductions
    for k, (reduction, coefficient) in enumerate(zip(reductions, terms.coefficients, strict=True)):
        if not reduction.coupled:
            total = total + coefficient * own[k]
            continue
        with torch.enable_grad():
            x = own[k].requires_grad_()
            contributions = call.contributions(reduction)(x)
            (slope,) = torch.autograd.grad(contributions.sum(), x)
        total = total + coefficient * contributions.detach()
        if logp is not None:
            # Where the formula makes a NaN of a known log-prob, so are its derivatives,
            # although the slope may be 0.
            slope = torch.where(own[k].isnan() & ~logp.isnan(), math.nan, slope)
        table[k] = table[k] * slope
    unknown = unknown | total.isnan()
    into[0].copy_(total.masked_fill_(unknown, math.nan))
    into[1].copy_(loss)
    weights = torch.stack(table)
    if logp is None:
        weights.masked_fill_(unknown, math.nan)
    return weights, unknown & call.rows.keep
