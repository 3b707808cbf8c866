"""A loss whose reduction couples tokens, near one point: a sum over rows has the same
derivatives there.

Autograd differentiates the reduction, which is a few operations on sequences. The row
kernels do the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls.policy import LossCall
from ..formula.loss_program import Program


class AtThisPoint(NamedTuple):
    """``weights`` is the table of row weights with which a sum over rows has the loss's
    derivatives. ``weighted_loss`` and ``loss`` ``[N]`` are those of the loss itself.
    The derivative of an ``unknown`` row by its own log-prob is NaN. What flows through
    a ratio to other rows is as the formula has it.
    """

    weights: Tensor
    weighted_loss: Tensor
    loss: Tensor
    unknown: Tensor


def at_this_point(
    call: LossCall,
    program: Program,
    params: Tensor,
    leaves: dict[str, Tensor],
    weights: Tensor,
    evaluate: Callable[..., Tensor],
) -> AtThisPoint:
    """Evaluate a loss with coupled reductions, from the table of its row weights."""
    pointwise = call.spec.ratio.one_pass_unsupported_reason is None
    spec, count = call.spec, len(call.spec.rules)
    coefficients: tuple[Any, ...] = (1.0, *(p.coef for p in spec.penalties))
    outputs = ("loss", *[f"own{k}" for k in range(count)])
    evaluated = evaluate(program, params, leaves, weights, outputs, call.rows.keep)
    loss, *own = evaluated.unbind()
    # Rules may compare a NaN, and a reduction may drop one.
    unknown = evaluated.isnan().any(0)
    total, slopes = torch.zeros_like(loss), list(weights.unbind())
    for k, (reduction, coefficient) in enumerate(zip(spec.reductions, coefficients, strict=True)):
        if not reduction.coupled:
            total = total + coefficient * own[k]
            continue
        with torch.enable_grad():
            x = own[k].requires_grad_()
            contributions = call.contributions(reduction)(x)
            (slope,) = torch.autograd.grad(contributions.sum(), x)
        total = total + coefficient * contributions.detach()
        if not pointwise:
            # Where the formula makes a NaN of a known log-prob, so are its derivatives,
            # although the slope may be 0.
            unfit = own[k].isnan() & ~leaves["logp"].isnan()
            slope = torch.where(unfit, math.nan, slope)
        slopes[k] = weights[k] * slope
    unknown = unknown | total.isnan()
    table = torch.stack(slopes)
    return AtThisPoint(
        torch.where(unknown, math.nan, table) if pointwise else table,
        torch.where(unknown, math.nan, total),
        loss,
        unknown,
    )
