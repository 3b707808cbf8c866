"""A loss whose reduction couples tokens, near one point: a sum over rows has the same
derivatives there.

A backend's kernels find it in closed form. Elsewhere autograd differentiates the
reduction, which is a few operations on sequences. The row kernels do the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls.policy import LossCall
from ..formula.loss_program import Program
from ..rows.constants import parameter_vector
from ..rows.primitives import CoupledTerms, Coupling


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
    evaluated = evaluate(program, params, leaves, weights, outputs, call.rows.keep)
    logp = None if pointwise else leaves["logp"]
    primitives, masked = call.rows.primitives, call.rows.masked
    couplings = _couplings(call)
    if primitives is None or primitives.couple is None or couplings is None:
        return _by_autograd(call, evaluated, weights, logp, into)
    assert masked is not None
    numbers = _numbers(call, couplings)
    terms = CoupledTerms(couplings, numbers, evaluated, weights, call.adv, logp)
    return primitives.couple(masked, terms, into)


def _couplings(call: LossCall) -> tuple[Coupling | None, ...] | None:
    """Return the coupling of each term, or None if a kernel does not know the loss in
    closed form.
    """
    reductions = call.spec.reductions
    couplings = tuple([r.coupling(call.rows) if r.coupled else None for r in reductions])
    found = [coupling for coupling in couplings if coupling is not None]
    if len(found) < sum(reduction.coupled for reduction in reductions):
        return None  # a user's reduction, or numbers that only PyTorch takes
    prompts = [coupling.prompts for coupling in found if coupling.prompts is not None]
    # A kernel looks for the sequences of each prompt. It does so for one coupling, and
    # if there are not too many to look at.
    is_searched = any(groups.index is not None for groups in prompts)
    if len(prompts) > 1 or (is_searched and call.rows.by_prompt is None):
        return None
    return couplings


def _coefficients(call: LossCall) -> tuple[Any, ...]:
    return (1.0, *[penalty.coef for penalty in call.spec.penalties])


def _numbers(call: LossCall, couplings: tuple[Coupling | None, ...]) -> Tensor:
    """Return the numbers of :class:`CoupledTerms`."""
    values = [call.loss_scale]
    for coefficient, coupling in zip(_coefficients(call), couplings, strict=True):
        values += [coefficient, *((0.0, 0.0) if coupling is None else coupling.numbers)]
    return parameter_vector(tuple(values), torch.float32, call.rows.device)


def _by_autograd(
    call: LossCall, evaluated: Tensor, weights: Tensor, logp: Tensor | None, into: Tensor
) -> tuple[Tensor, Tensor]:
    loss, *own = evaluated.unbind()
    # Rules may compare a NaN, and a reduction may drop one.
    unknown = evaluated.isnan().any(0)
    total, table = torch.zeros_like(loss), list(weights.unbind())
    pairs = zip(call.spec.reductions, _coefficients(call), strict=True)
    for k, (reduction, coefficient) in enumerate(pairs):
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
